//! The sources of a pull: the mirrors that `hosts.toml` names, then the registry.

use std::time::Duration;

use oci_spec::distribution::Reference;
use reqwest::{Certificate, Client, ClientBuilder};

use super::{Error, TRIES, pause};
use crate::hosts::{Connection, Host, Hosts};
use crate::registry::{Credentials, Registry};
use crate::{ImageConfig, MAX_PEM};
use husk_base::{chain, text_file};

/// A registry or a mirror, and the requests that it may serve.
pub(super) struct Source {
    pub registry: Registry,
    /// Whether the source may resolve tags.
    resolve: bool,
    /// Whether the source may serve content by its digest.
    pull: bool,
    /// A mirror's name, for messages.
    name: Option<String>,
}

/// The sources for `reference`, in the order in which they are asked. The last one is
/// the registry, or the server that replaces it.
pub(super) fn sources(
    config: &ImageConfig,
    reference: &Reference,
    credentials: &Credentials,
) -> Result<Vec<Source>, Error> {
    let hosts = Hosts::load(&config.hosts_dir, reference.registry())?;
    let own = reference.resolve_registry();
    let mut sources = Vec::with_capacity(hosts.mirrors.len() + 1);
    for mirror in &hosts.mirrors {
        // A mirror on another host must not get the registry's password.
        let same = mirror.address == own || mirror.address == reference.registry();
        let credentials = if same { credentials.clone() } else { Credentials::Anonymous };
        sources.push(Source::at(mirror, config, reference, credentials)?);
    }
    sources.push(match &hosts.server {
        Some(server) => Source::at(server, config, reference, credentials.clone())?,
        None => {
            // If there are certificates for it, it uses TLS.
            let plain = hosts.registry.ca.is_empty() && plain(config, own);
            let client = client(config, &hosts.registry)?;
            let registry = Registry::new(
                client,
                (plain, own),
                reference.repository(),
                None,
                credentials.clone(),
                &config.trusted_hosts,
            );
            Source {
                registry: registry.map_err(|cause| unusable(config, reference, cause))?,
                resolve: true,
                pull: true,
                name: None,
            }
        }
    });
    Ok(sources)
}

impl Source {
    fn at(
        host: &Host,
        config: &ImageConfig,
        reference: &Reference,
        credentials: Credentials,
    ) -> Result<Self, Error> {
        let authority = host.address.split('/').next().unwrap_or_default();
        let address = (host.plain.unwrap_or_else(|| plain(config, authority)), host.address.as_str());
        let repository = match host.prefix.as_str() {
            "" => reference.repository().to_owned(),
            prefix => format!("{prefix}/{}", reference.repository()),
        };
        let client = client(config, &host.connection)?;
        let namespace = Some(reference.registry());
        let registry =
            Registry::new(client, address, &repository, namespace, credentials, &config.trusted_hosts);
        Ok(Self {
            registry: registry.map_err(|cause| unusable(config, reference, cause))?,
            resolve: host.resolve,
            pull: host.pull,
            name: Some(host.name.clone()),
        })
    }
}

fn unusable(config: &ImageConfig, reference: &Reference, cause: String) -> Error {
    Error::Hosts { path: config.hosts_dir.join(reference.registry()), cause }
}

/// Returns a function that makes clients for a host.
fn client(config: &ImageConfig, connection: &Connection) -> Result<impl Fn() -> ClientBuilder, Error> {
    let mut certificates = Vec::new();
    for path in &connection.ca {
        let wrong = |cause: String| Error::Hosts { path: path.clone(), cause };
        let text = text_file::read(path, MAX_PEM).map_err(|error| wrong(error.to_string()))?;
        let found = Certificate::from_pem_bundle(text.as_bytes()).map_err(|error| wrong(chain(&error)))?;
        if found.is_empty() {
            return Err(wrong("there is no PEM certificate in it".into()));
        }
        certificates.extend(found);
    }
    let stall_timeout = config.stall_timeout;
    let dial_timeout = connection.dial_timeout.unwrap_or(stall_timeout.min(Duration::from_secs(30)));
    let skip_verify = connection.skip_verify;
    Ok(move || {
        Client::builder()
            .user_agent(concat!("husk/", env!("CARGO_PKG_VERSION")))
            .read_timeout(stall_timeout)
            .connect_timeout(dial_timeout)
            .tls_danger_accept_invalid_certs(skip_verify)
            .tls_certs_merge(certificates.clone())
    })
}

/// Whether a host is asked without TLS if its address does not say.
fn plain(config: &ImageConfig, registry: &str) -> bool {
    is_loopback(registry) || config.insecure_registries.iter().any(|insecure| insecure == registry)
}

/// Whether the registry is on this machine; it is then asked without TLS.
fn is_loopback(registry: &str) -> bool {
    let host = match registry.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => host,
        _ => registry,
    };
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// The kind of content that is requested.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Wanted {
    /// The manifest that a tag leads to.
    Tag,
    /// Content that is named by its digest, so that any source will do.
    Content,
}

/// Asks one source after another, and all of them again while their errors may
/// be temporary.
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

    /// The next source to ask, after a pause if all have failed.
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

    /// Notes that the last source of `next` has failed, and whether trying again may
    /// help.
    pub(super) fn failed(&mut self, error: Error, passing: bool) {
        let name = self.sources.get(self.at.saturating_sub(1)).and_then(|source| source.name.as_deref());
        if let Some(mirror) = name {
            tracing::debug!(mirror, %error, "failed to pull from an image source");
        }
        self.passing |= passing;
        self.failures.push((name, error));
    }

    /// The error when all sources have failed: that of the last source, then those of
    /// the others.
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
