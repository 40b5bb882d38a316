//! Whom a pull asks: the mirrors that `hosts.toml` names, then the registry.

use std::time::Duration;

use oci_client::Reference;
use oci_client::client::{Certificate, CertificateEncoding, Client, ClientConfig, ClientProtocol};
use oci_client::secrets::RegistryAuth;

use super::{Error, TRIES, pause};
use crate::image::ImageConfig;
use crate::image::hosts::{Host, Hosts};

/// One registry, and the image as it is called there.
pub(super) struct Source {
    pub client: Client,
    pub auth: RegistryAuth,
    pub reference: Reference,
    /// Whether it may say what a tag leads to.
    resolve: bool,
    /// Whether it may hand out what is named by a digest.
    pull: bool,
    /// For messages; the registry itself needs none.
    name: Option<String>,
}

/// All that may be asked for `reference`, in order; the last is the registry
/// or what stands for it.
pub(super) fn sources(
    config: &ImageConfig,
    reference: &Reference,
    auth: &RegistryAuth,
) -> Result<Vec<Source>, Error> {
    let hosts = Hosts::load(&config.hosts_dir, reference.registry())?;
    let mut sources = Vec::with_capacity(hosts.mirrors.len() + 1);
    for mirror in &hosts.mirrors {
        // The registry's password is nothing to a mirror on another host.
        let same = mirror.address == reference.resolve_registry() || mirror.address == reference.registry();
        let auth = if same { auth.clone() } else { RegistryAuth::Anonymous };
        sources.push(Source::at(mirror, config, reference, auth)?);
    }
    sources.push(match &hosts.server {
        Some(server) => Source::at(server, config, reference, auth.clone())?,
        None => Source {
            client: Client::new(client_config(config, plain(config, reference.resolve_registry()))),
            auth: auth.clone(),
            reference: reference.clone(),
            resolve: true,
            pull: true,
            name: None,
        },
    });
    Ok(sources)
}

impl Source {
    fn at(
        host: &Host,
        config: &ImageConfig,
        reference: &Reference,
        auth: RegistryAuth,
    ) -> Result<Self, Error> {
        let authority = host.address.split('/').next().unwrap_or_default();
        let plain = host.plain.unwrap_or_else(|| plain(config, authority));
        let mut settings = client_config(config, plain);
        settings.accept_invalid_certificates = host.skip_verify;
        settings.connect_timeout = host.dial_timeout.or(settings.connect_timeout);
        for path in &host.ca {
            let wrong = |cause: String| Error::Hosts { path: path.clone(), cause };
            let text = std::fs::read_to_string(path).map_err(|error| wrong(error.to_string()))?;
            let certificates = certificates(&text);
            if certificates.is_empty() {
                return Err(wrong("there is no PEM certificate in it".into()));
            }
            settings.extra_root_certificates.extend(certificates);
        }
        let client = Client::try_from(settings).map_err(|error| Error::Hosts {
            path: config.hosts_dir.join(reference.registry()),
            cause: format!("host `{}`: {error}", host.name),
        })?;
        let repository = match host.prefix.as_str() {
            "" => reference.repository().to_owned(),
            prefix => format!("{prefix}/{}", reference.repository()),
        };
        let registry = reference.registry().to_owned();
        let mut reference = match (reference.digest(), reference.tag()) {
            (Some(digest), _) => Reference::with_digest(registry, repository, digest.to_owned()),
            (None, tag) => Reference::with_tag(registry, repository, tag.unwrap_or("latest").to_owned()),
        };
        reference.set_mirror_registry(host.address.clone());
        let (resolve, pull) = (host.resolve, host.pull);
        Ok(Self { client, auth, reference, resolve, pull, name: Some(host.name.clone()) })
    }
}

/// The certificates of a PEM file, one by one.
fn certificates(text: &str) -> Vec<Certificate> {
    const END: &str = "-----END CERTIFICATE-----";
    text.split_inclusive(END)
        .filter_map(|part| Some((part, part.find("-----BEGIN CERTIFICATE-----")?)))
        .filter(|(part, _)| part.ends_with(END))
        .filter_map(|(part, start)| {
            let data = part.get(start..)?.as_bytes().to_vec();
            Some(Certificate { encoding: CertificateEncoding::Pem, data })
        })
        .collect()
}

fn client_config(config: &ImageConfig, plain: bool) -> ClientConfig {
    ClientConfig {
        protocol: if plain { ClientProtocol::Http } else { ClientProtocol::Https },
        read_timeout: Some(config.stall_timeout),
        connect_timeout: Some(config.stall_timeout.min(Duration::from_secs(30))),
        user_agent: concat!("husk/", env!("CARGO_PKG_VERSION")),
        ..ClientConfig::default()
    }
}

/// Whether a host whose address does not say so is spoken to without TLS.
fn plain(config: &ImageConfig, registry: &str) -> bool {
    is_loopback(registry) || config.insecure_registries.iter().any(|insecure| insecure == registry)
}

/// A registry on this machine is spoken to without TLS.
fn is_loopback(registry: &str) -> bool {
    let host = match registry.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => host,
        _ => registry,
    };
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// What is asked for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Wanted {
    /// What a tag leads to.
    Tag,
    /// Something that its digest names, so that it matters little who gives it.
    Content,
}

/// Asks one source after another, and all of them again while what went wrong
/// may pass.
pub(super) struct Rounds<'a> {
    sources: Vec<&'a Source>,
    at: usize,
    tries: u32,
    passing: bool,
    failures: Vec<(Option<&'a str>, Error)>,
}

impl<'a> Rounds<'a> {
    pub(super) fn new(sources: &'a [Source], wanted: Wanted) -> Self {
        let fits = |source: &&Source| match wanted {
            Wanted::Tag => source.resolve,
            Wanted::Content => source.pull,
        };
        let sources = sources.iter().filter(fits).collect();
        Self { sources, at: 0, tries: 1, passing: false, failures: Vec::new() }
    }

    /// The next to ask; after a pause if all have failed.
    pub(super) async fn next(&mut self) -> Option<&'a Source> {
        if self.at == self.sources.len() && self.passing && self.tries < TRIES {
            pause(self.tries).await;
            self.tries += 1;
            (self.at, self.passing) = (0, false);
            self.failures.clear();
        }
        let source = self.sources.get(self.at)?;
        self.at += 1;
        Some(source)
    }

    /// The source that `next` gave last has failed; whether that may pass.
    pub(super) fn failed(&mut self, error: Error, passing: bool) {
        let name = self.sources.get(self.at.saturating_sub(1)).and_then(|source| source.name.as_deref());
        if let Some(mirror) = name {
            tracing::debug!(mirror, %error, "image source");
        }
        self.passing |= passing;
        self.failures.push((name, error));
    }

    /// Why nobody had it: what the last one said, and then the others.
    pub(super) fn error(mut self, nobody: impl FnOnce() -> Error) -> Error {
        let Some((name, mut error)) = self.failures.pop() else { return nobody() };
        if let Some(cause) = error.cause_mut() {
            if let Some(name) = name {
                *cause = format!("{name}: {cause}");
            }
            for (name, mut earlier) in self.failures {
                let text = earlier.cause_mut().map_or_else(String::new, |cause| cause.clone());
                cause.push_str(&format!("; mirror {}: {text}", name.unwrap_or_default()));
            }
        }
        error
    }
}
