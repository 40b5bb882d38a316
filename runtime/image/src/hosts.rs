//! Reads `certs.d/<host>/hosts.toml`, which names the mirrors of a registry, as containerd does.
//!
//! The files are read at every pull, so that a change needs no restart. A file that cannot be read, or that asks
//! for an unsupported feature, fails the pull: silently skipping a mirror could send a node to the internet that
//! must not go there.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use serde::de::IgnoredAny;
use toml::Spanned;

use super::Error;
use husk_base::text_file;

/// Most bytes of a `hosts.toml`, which is small.
const MAX_FILE: u64 = 1 << 20;

/// The reason that a host which demands a client certificate is not asked.
const CLIENT: &str = "client certificates are not supported";

/// A host that may be asked for an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Host {
    /// The host's name in the file, for messages.
    pub name: String,
    /// Whether plain HTTP is used; `None` where the name does not say.
    pub plain: Option<bool>,
    /// Host and port, and the part of the path that comes before `/v2`.
    pub address: String,
    /// The part of the path that comes after `/v2`, before the repository.
    pub prefix: String,
    /// Whether the host may resolve tags.
    pub resolve: bool,
    /// Whether the host may serve content by its digest.
    pub pull: bool,
    /// The way to connect to it.
    pub connection: Connection,
}

/// The way to connect to a host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Connection {
    /// Whether verification of the host's certificate is off.
    pub skip_verify: bool,
    /// Certificate authorities of the host, besides the system's.
    pub ca: Vec<PathBuf>,
    /// The time limit for establishing a connection.
    pub dial_timeout: Option<Duration>,
}

/// The hosts for one registry.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Hosts {
    /// Mirrors, in the order in which they are asked.
    pub mirrors: Vec<Host>,
    /// The host that is asked last, in place of the registry.
    pub server: Option<Host>,
    /// The way to connect to the registry itself, if no `server` replaces it.
    pub registry: Connection,
}

/// The keys of a host, and of the file for its `server`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Settings {
    capabilities: Option<Vec<String>>,
    ca: Option<OneOrMany>,
    client: Option<IgnoredAny>,
    header: Option<BTreeMap<String, IgnoredAny>>,
    skip_verify: Option<bool>,
    override_path: bool,
    dial_timeout: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(PathBuf),
    Many(Vec<PathBuf>),
}

#[derive(Debug, Deserialize)]
struct File {
    server: Option<String>,
    // Spans keep the order of the mirrors, which a table does not.
    #[serde(default)]
    host: BTreeMap<String, Spanned<Settings>>,
}

impl Hosts {
    /// Reads the configuration below `root` of `registry`, a host with or without a port.
    /// Without a file the registry itself is asked, with the certificates in the folder as
    /// authorities, as Docker does.
    ///
    /// # Errors
    /// A file that is there and cannot be used.
    pub(super) fn load(root: &Path, registry: &str) -> Result<Self, Error> {
        let Some(folder) = folder(root, registry) else { return Ok(Self::default()) };
        let path = folder.join("hosts.toml");
        let refused = |cause: String| Error::Hosts { path: path.clone(), cause };
        let text = match text_file::read(&path, MAX_FILE) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(error) => return Err(refused(error.to_string())),
        };
        if text.is_empty() {
            return Self::of_certificates(&folder);
        }
        Self::parse(&text, &folder).map_err(refused)
    }

    /// Reads a folder without a `hosts.toml`, or with an empty one.
    fn of_certificates(folder: &Path) -> Result<Self, Error> {
        let refused = |path: &Path, cause: String| Error::Hosts { path: path.to_owned(), cause };
        let entries = std::fs::read_dir(folder).and_then(Iterator::collect::<Result<Vec<_>, _>>);
        let mut files: Vec<_> = entries
            .map_err(|error| refused(folder, error.to_string()))?
            .into_iter()
            .map(|entry| entry.path())
            .filter(|path| !path.is_dir())
            .collect();
        files.sort();
        let is = |path: &Path, kind: &str| path.as_os_str().as_encoded_bytes().ends_with(kind.as_bytes());
        // Without the client certificate, the registry would be asked under
        // another identity.
        if let Some(path) = files.iter().find(|path| is(path, ".cert")) {
            return Err(refused(path, format!("{CLIENT}: move it away if the registry needs none")));
        }
        let ca = files.into_iter().filter(|path| is(path, ".crt")).collect();
        Ok(Self { registry: Connection { ca, ..Connection::default() }, ..Self::default() })
    }

    /// Parses `text`, in which relative paths start from `folder`.
    pub(super) fn parse(text: &str, folder: &Path) -> Result<Self, String> {
        let read = |error: toml::de::Error| error.to_string().trim_end().to_owned();
        let file: File = toml::from_str(text).map_err(read)?;
        let mut mirrors: Vec<_> = file.host.into_iter().collect();
        mirrors.sort_by_key(|(_, settings)| settings.span().start);
        let mirrors = mirrors
            .into_iter()
            .map(|(name, settings)| Host::new(&name, settings.into_inner(), folder))
            .collect::<Result<_, _>>()?;
        let settings: Settings = toml::from_str(text).map_err(read)?;
        let mut hosts = Self { mirrors, ..Self::default() };
        match file.server.as_deref() {
            None | Some("") => {
                settings.capabilities().and(settings.connection(folder)).map(|it| hosts.registry = it)
            }
            Some(server) => Host::new(server, settings, folder).map(|it| hosts.server = Some(it)),
        }
        .map(|()| hosts)
    }
}

impl Settings {
    /// Whether tags may be resolved and content be pulled.
    fn capabilities(&self) -> Result<(bool, bool), String> {
        let named = self.capabilities.as_deref().unwrap_or_default();
        let (mut resolve, mut pull) = (named.is_empty(), named.is_empty());
        for capability in named {
            match capability.to_lowercase().as_str() {
                "resolve" => resolve = true,
                "pull" => pull = true,
                "push" => {}
                _ => return Err(format!("unknown capability `{capability}`: pull, resolve or push")),
            }
        }
        Ok((resolve, pull))
    }

    fn connection(&self, folder: &Path) -> Result<Connection, String> {
        // Without these headers or certificates, the host would be asked under
        // another identity.
        if self.client.is_some() {
            return Err(format!("`client`: {CLIENT}"));
        }
        if self.header.as_ref().is_some_and(|header| !header.is_empty()) {
            return Err("`header` is not supported".into());
        }
        let dial_timeout = match self.dial_timeout.as_deref() {
            None | Some("") => None,
            Some(text) => match duration(text) {
                None => return Err(format!("dial_timeout `{text}` is not like `3s` or `500ms`")),
                timeout => timeout,
            },
        };
        let ca = match &self.ca {
            None => Vec::new(),
            Some(OneOrMany::One(path)) => vec![folder.join(path)],
            Some(OneOrMany::Many(paths)) => paths.iter().map(|path| folder.join(path)).collect(),
        };
        Ok(Connection { skip_verify: self.skip_verify.unwrap_or(false), ca, dial_timeout })
    }
}

impl Host {
    fn new(name: &str, settings: Settings, folder: &Path) -> Result<Self, String> {
        let wrong = |what: &str| format!("host `{name}`: {what}");
        let (resolve, pull) = settings.capabilities().map_err(|what| wrong(&what))?;
        let connection = settings.connection(folder).map_err(|what| wrong(&what))?;
        let Some((plain, address, prefix)) = split(name, settings.override_path) else {
            return Err(wrong(
                "is not http(s)://HOST[:PORT][/PATH], or its path under override_path has no /v2",
            ));
        };
        Ok(Self { name: name.to_owned(), plain, address, prefix, resolve, pull, connection })
    }
}

/// The folder for a registry: `host_port_` where a colon is awkward, the plain
/// name, else `_default`.
fn folder(root: &Path, registry: &str) -> Option<PathBuf> {
    if registry.is_empty() || registry.starts_with('.') || registry.contains(['/', '\0']) {
        return None;
    }
    let escaped = registry.rsplit_once(':').map(|(host, port)| format!("{host}_{port}_"));
    let names = [escaped.as_deref(), Some(registry), Some("_default")];
    names.into_iter().flatten().map(|name| root.join(name)).find(|folder| folder.is_dir())
}

/// Splits a host's URL into: whether it is plain HTTP, the part before `/v2`
/// without the scheme, and the part after it.
fn split(url: &str, override_path: bool) -> Option<(Option<bool>, String, String)> {
    let (plain, rest) = match url.split_once("://") {
        Some(("http", rest)) => (Some(true), rest),
        Some(("https", rest)) => (Some(false), rest),
        Some(_) => return None,
        None => (None, url),
    };
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    let is_host = |c: char| c.is_ascii_alphanumeric() || ".-_:[]".contains(c);
    let is_path = |c: char| c.is_ascii_alphanumeric() || ".-_~%/".contains(c);
    if authority.is_empty() || !authority.chars().all(is_host) || !path.chars().all(is_path) {
        return None;
    }
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
    if parts.contains(&"..") {
        return None;
    }
    let (before, after) = if override_path {
        let at = parts.iter().position(|part| *part == "v2")?;
        (parts.get(..at)?, parts.get(at + 1..)?)
    } else {
        (parts.strip_suffix(&["v2"]).unwrap_or(&parts), &[][..])
    };
    let address = [&[authority], before].concat().join("/");
    Some((plain, address, after.join("/")))
}

/// Parses a duration in Go's notation, of one number and one unit.
fn duration(text: &str) -> Option<Duration> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.')?;
    let (number, unit) = text.split_at(digits);
    let seconds = match unit {
        "ms" => number.parse::<f64>().ok()? / 1000.0,
        "s" => number.parse().ok()?,
        "m" => number.parse::<f64>().ok()? * 60.0,
        _ => return None,
    };
    Duration::try_from_secs_f64(seconds).ok().filter(|time| !time.is_zero())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::indexing_slicing)]

    use proptest::prelude::*;

    use super::*;

    fn parse(text: &str) -> Result<Hosts, String> {
        Hosts::parse(text, Path::new("/certs.d/host"))
    }

    #[test]
    fn a_file_is_read_as_containerd_reads_it() {
        let hosts = parse(
            r#"
            server = "https://registry-1.example"
            ca = "server.crt"

            [host."https://z.example:5000"]
              capabilities = ["pull", "resolve", "push"]
              ca = ["a.crt", "/etc/b.crt"]
              skip_verify = true
              dial_timeout = "500ms"

            [host."http://a.example/mirror"]
              capabilities = ["pull"]
              some_key_of_a_later_version = 1
            "#,
        )
        .unwrap();
        let [first, second] = &hosts.mirrors[..] else { panic!("{hosts:?}") };
        assert_eq!(first.address, "z.example:5000", "in the file's order, not the alphabet's");
        assert_eq!(first.connection.ca, [Path::new("/certs.d/host/a.crt"), Path::new("/etc/b.crt")]);
        assert_eq!((first.plain, first.connection.skip_verify), (Some(false), true));
        assert_eq!(first.connection.dial_timeout, Some(Duration::from_millis(500)));
        assert_eq!((second.address.as_str(), second.plain), ("a.example/mirror", Some(true)));
        assert_eq!((second.resolve, second.pull), (false, true));
        let server = hosts.server.unwrap();
        assert_eq!(server.address, "registry-1.example");
        assert_eq!(server.connection.ca, [Path::new("/certs.d/host/server.crt")]);
        assert!(server.resolve && server.pull);
        assert_eq!(parse("").unwrap(), Hosts::default());
    }

    #[test]
    fn without_a_server_the_top_speaks_of_the_registry_itself() {
        for server in ["", "server = ''"] {
            let text = format!(
                "{server}\nca = 'ca.crt'\nskip_verify = true\ndial_timeout = '2s'\ncapabilities = ['push']"
            );
            let hosts = parse(&text).unwrap();
            assert_eq!(hosts.server, None);
            let registry = Connection {
                skip_verify: true,
                ca: vec!["/certs.d/host/ca.crt".into()],
                dial_timeout: Some(Duration::from_secs(2)),
            };
            assert_eq!(hosts.registry, registry);
        }
    }

    #[test]
    fn no_capability_means_all_of_them() {
        for capabilities in ["", "capabilities = []"] {
            let text = format!("server = 'https://s'\n{capabilities}\n[host.'https://h']\n{capabilities}");
            let hosts = parse(&text).unwrap();
            for host in hosts.mirrors.iter().chain(&hosts.server) {
                assert!(host.resolve && host.pull, "{capabilities}: {}", host.name);
            }
        }
    }

    #[test]
    fn certificates_alone_are_for_the_registry_itself() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("h:5000");
        std::fs::create_dir(&folder).unwrap();
        std::fs::create_dir(folder.join("folder.crt")).unwrap();
        let put = |name: &str| std::fs::write(folder.join(name), "").unwrap();
        ["b.crt", "a.crt", "README"].into_iter().for_each(put);
        let load = || Hosts::load(root.path(), "h:5000");
        assert_eq!(load().unwrap().registry.ca, [folder.join("a.crt"), folder.join("b.crt")]);
        put("hosts.toml");
        assert_eq!(load().unwrap().registry.ca.len(), 2, "an empty file says nothing");
        put("client.cert");
        let message = load().unwrap_err().to_string();
        assert!(message.contains("client.cert") && message.contains("not supported"), "{message}");
        std::fs::write(folder.join("hosts.toml"), "server = 'https://h:5000'").unwrap();
        assert!(load().is_ok(), "what the file does not name is not used");
    }

    #[test]
    fn a_path_goes_before_v2_or_is_taken_as_it_is() {
        for (url, as_it_is, want) in [
            ("https://h", false, Some(("h", ""))),
            ("https://h/", false, Some(("h", ""))),
            ("https://h/v2", false, Some(("h", ""))),
            ("https://h/a//b/", false, Some(("h/a/b", ""))),
            ("https://h/a/v2/b", false, Some(("h/a/v2/b", ""))),
            ("https://h/v2/project", true, Some(("h", "project"))),
            ("https://h/a/v2/b/c", true, Some(("h/a", "b/c"))),
            ("[::1]:5000", false, Some(("[::1]:5000", ""))),
            ("https://h/project", true, None),
            ("https://user@h", false, None),
            ("https://h/a?b", false, None),
            ("https://h/../a", false, None),
            ("ftp://h", false, None),
            ("https://", false, None),
        ] {
            let got = split(url, as_it_is);
            let got = got.as_ref().map(|(_, address, prefix)| (address.as_str(), prefix.as_str()));
            assert_eq!(got, want, "{url}");
        }
    }

    #[test]
    fn what_cannot_be_done_is_told_with_the_host() {
        for (text, word) in [
            ("[host.\"https://h\"]\nclient = ['a.crt', 'a.key']", "client"),
            ("[host.\"https://h\".header]\nx = 'y'", "header"),
            ("[host.\"https://h\"]\ncapabilities = ['fly']", "fly"),
            ("[host.\"https://h\"]\ndial_timeout = 'soon'", "soon"),
            ("[host.\"https://h\"]\ncapabilities = 'pull'", "capabilities"),
            // These are refused also for the registry itself.
            ("client = 'a.pem'", "client"),
            ("capabilities = ['fly']", "fly"),
            ("dial_timeout = 'soon'", "soon"),
            ("[header]\nx = 'y'", "header"),
        ] {
            let message = parse(text).unwrap_err();
            assert!(message.contains(word), "{message}");
        }
    }

    #[test]
    fn the_most_particular_folder_counts() {
        let root = tempfile::tempdir().unwrap();
        let put = |name: &str| {
            std::fs::create_dir(root.path().join(name)).unwrap();
            std::fs::write(root.path().join(name).join("hosts.toml"), format!("server = '{name}'")).unwrap();
        };
        let server = |host: &str| Hosts::load(root.path(), host).unwrap().server.map(|server| server.name);
        assert_eq!(server("h:5000"), None);
        put("_default");
        assert_eq!(server("h:5000").as_deref(), Some("_default"));
        put("h");
        assert_eq!(server("h:5000").as_deref(), Some("_default"), "another port is another registry");
        put("h:5000");
        assert_eq!(server("h:5000").as_deref(), Some("h:5000"));
        put("h_5000_");
        assert_eq!(server("h:5000").as_deref(), Some("h_5000_"));
        assert_eq!(server(".."), None);
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in "(?s).{0,200}") {
            let _ = parse(&text);
        }

        #[test]
        fn no_value_makes_it_panic(
            url in r#"(https?://)?[a-z0-9:/.\[\]@%é -]{0,40}"#,
            key in "(capabilities|ca|client|header|skip_verify|override_path|dial_timeout)",
            value in r#"(true|-?[0-9]{1,20}|"[0-9.]{0,330}[msh]{0,3}"|\["[a-z/.]{0,20}"\]|\{x="y"\})"#,
        ) {
            if let Ok(hosts) = parse(&format!("server = '{url}'\n{key} = {value}\n[host.'{url}']\n{key} = {value}\n")) {
                for host in hosts.mirrors.iter().chain(&hosts.server) {
                    prop_assert!(!host.address.is_empty() && !host.address.starts_with('/'));
                    prop_assert!(!host.prefix.starts_with('/') && !host.prefix.contains(".."));
                }
            }
        }
    }
}
