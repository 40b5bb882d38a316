//! Credentials of registries, in the file that docker, podman and others share: `~/.docker/config.json`.

use std::path::PathBuf;

use anyhow::Context;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use husk_proto::cri;
use serde_json::{Map, Value};

mod helper;
pub mod login;

/// The key of Docker Hub's credentials, which is older than its present address.
const HUB_KEY: &str = "https://index.docker.io/v1/";
/// Docker Hub's names.
const HUB: [&str; 3] = ["docker.io", "index.docker.io", "registry-1.docker.io"];

/// The file, where docker looks for it.
fn path() -> anyhow::Result<PathBuf> {
    let folder = match std::env::var_os("DOCKER_CONFIG").filter(|value| !value.is_empty()) {
        Some(folder) => PathBuf::from(folder),
        None => {
            let home = std::env::var_os("HOME")
                .context("find credentials: neither HOME nor DOCKER_CONFIG is set")?;
            PathBuf::from(home).join(".docker")
        }
    };
    Ok(folder.join("config.json"))
}

/// All of the file; nothing, when there is no file.
fn load() -> anyhow::Result<Map<String, Value>> {
    let Ok(path) = path() else { return Ok(Map::new()) };
    match std::fs::read(&path) {
        Ok(text) => serde_json::from_slice(&text)
            .with_context(|| format!("read credentials: {} is not a JSON object", path.display())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Map::new()),
        Err(error) => Err(error).with_context(|| format!("read credentials from {}", path.display())),
    }
}

/// The credentials for the registry of an image: those of the helper that the file names for it, or those in the file.
pub async fn of_image(image: &str) -> anyhow::Result<Option<cri::AuthConfig>> {
    let file = load()?;
    let server = server_of(image);
    let found = match helper_for(&file, server) {
        Some(name) => helper::get(name, key_of(server)).await?,
        None => in_file(&file, server)?,
    };
    Ok(found.map(|auth| cri::AuthConfig { server_address: server.to_owned(), ..auth }))
}

/// The registry in the name of an image, by docker's rule: the first part, if it looks like a host.
fn server_of(image: &str) -> &str {
    match image.split_once('/') {
        Some((first, _)) if first.contains(['.', ':']) || first == "localhost" => first,
        _ => "docker.io",
    }
}

/// The host that an entry of the file, or a person, names: it may be a URL.
fn host_of(server: &str) -> &str {
    let server = server.trim_start_matches("https://").trim_start_matches("http://");
    let host = server.split('/').next().unwrap_or_default();
    if HUB.contains(&host) { "docker.io" } else { host }
}

/// The key under which docker keeps the credentials of a registry.
fn key_of(server: &str) -> &str {
    match host_of(server) {
        "docker.io" => HUB_KEY,
        host => host,
    }
}

/// The helper for a registry: of this registry alone, or of all.
fn helper_for<'a>(file: &'a Map<String, Value>, server: &str) -> Option<&'a str> {
    let of_one = file.get("credHelpers").and_then(Value::as_object).and_then(|helpers| {
        helpers.iter().find(|(key, _)| host_of(key) == host_of(server)).map(|(_, helper)| helper)
    });
    of_one.or_else(|| file.get("credsStore")).and_then(Value::as_str).filter(|name| !name.is_empty())
}

fn in_file(file: &Map<String, Value>, server: &str) -> anyhow::Result<Option<cri::AuthConfig>> {
    let Some(auths) = file.get("auths").and_then(Value::as_object) else { return Ok(None) };
    let Some((key, entry)) = auths.iter().find(|(key, _)| host_of(key) == host_of(server)) else {
        return Ok(None);
    };
    let field = |name: &str| entry.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
    let mut auth = cri::AuthConfig {
        username: field("username"),
        password: field("password"),
        identity_token: field("identitytoken"),
        registry_token: field("registrytoken"),
        ..Default::default()
    };
    if !field("auth").is_empty() {
        let decoded = STANDARD.decode(field("auth")).ok().and_then(|bytes| String::from_utf8(bytes).ok());
        let parts = decoded.as_deref().and_then(|text| text.split_once(':'));
        let (user, password) = parts
            .with_context(|| format!("read credentials: `auth` of {key} is not base64 of user:password"))?;
        auth.username = user.to_owned();
        auth.password = password.trim_end_matches('\0').to_owned();
    }
    let is_empty = auth == cri::AuthConfig::default();
    Ok((!is_empty).then_some(auth))
}

/// Puts credentials into the file's `auths`, in place of those of the same registry.
fn put(file: &mut Map<String, Value>, server: &str, user: &str, password: &str) {
    take(file, server);
    let auths = file.entry("auths").or_insert_with(|| Value::Object(Map::new()));
    if !auths.is_object() {
        *auths = Value::Object(Map::new());
    }
    auths[key_of(server)] = serde_json::json!({ "auth": STANDARD.encode(format!("{user}:{password}")) });
}

/// Takes all credentials of a registry out of the file's `auths`. Returns whether there were any.
fn take(file: &mut Map<String, Value>, server: &str) -> bool {
    let Some(auths) = file.get_mut("auths").and_then(Value::as_object_mut) else { return false };
    let before = auths.len();
    auths.retain(|key, _| host_of(key) != host_of(server));
    auths.len() != before
}

/// Replaces the file as a whole. A link to it stays a link.
fn save(file: &Map<String, Value>) -> anyhow::Result<PathBuf> {
    let path = path()?;
    let path = path.canonicalize().unwrap_or(path);
    let stage = || format!("save credentials in {}", path.display());
    if let Some(folder) = path.parent() {
        // A folder that is there keeps its mode.
        if !folder.exists() {
            husk_base::dirs::make(folder, 0o700).with_context(stage)?;
        }
    }
    husk_base::write_json(&path, file).with_context(stage)?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn file(value: Value) -> Map<String, Value> {
        value.as_object().unwrap().clone()
    }

    #[test]
    fn a_registry_is_told_from_the_first_part_of_a_path() {
        for (image, server) in [
            ("debian", "docker.io"),
            ("team/app:1", "docker.io"),
            ("docker.io/library/debian", "docker.io"),
            ("registry.example/app", "registry.example"),
            ("127.0.0.1:5000/husk/app@sha256:1", "127.0.0.1:5000"),
            ("localhost/app", "localhost"),
        ] {
            assert_eq!(server_of(image), server, "{image}");
        }
    }

    #[test]
    fn credentials_are_found_in_each_form_and_never_those_of_another_registry() {
        let auth = STANDARD.encode("me:a:b");
        let file = file(json!({"auths": {
            "https://index.docker.io/v1/": {"auth": auth},
            "https://registry.example/v2/": {"username": "you", "password": "p"},
            "token.example": {"identitytoken": "t"},
            "empty.example": {},
            "bad.example": {"auth": "%"},
        }}));
        let found = |server: &str| in_file(&file, server).unwrap().map(|auth| (auth.username, auth.password));
        let pair = |user: &str, password: &str| Some((user.to_owned(), password.to_owned()));
        assert_eq!(found("docker.io"), pair("me", "a:b"));
        assert_eq!(found("registry.example"), pair("you", "p"));
        assert_eq!(found("registry.example:5000"), None);
        assert_eq!(found("example"), None);
        assert_eq!(found("empty.example"), None);
        assert_eq!(in_file(&file, "token.example").unwrap().unwrap().identity_token, "t");
        assert!(in_file(&file, "bad.example").unwrap_err().to_string().contains("bad.example"));
    }

    #[test]
    fn the_helper_of_a_registry_comes_before_that_of_all() {
        let file = file(json!({"credsStore": "pass", "credHelpers": {"gcr.io": "gcloud"}}));
        assert_eq!(helper_for(&file, "gcr.io"), Some("gcloud"));
        assert_eq!(helper_for(&file, "docker.io"), Some("pass"));
        assert_eq!(helper_for(&Map::new(), "docker.io"), None);
    }

    #[test]
    fn what_is_put_into_the_file_is_docker_s_and_the_rest_stays() {
        let mut file = file(json!({"detachKeys": "x", "auths": {"https://r.example/v1/": {"auth": "old"}}}));
        put(&mut file, "r.example", "me", "secret");
        put(&mut file, "docker.io", "hub", "p");
        assert_eq!(file["detachKeys"], "x");
        assert_eq!(file["auths"]["r.example"]["auth"], "bWU6c2VjcmV0");
        assert_eq!(file["auths"]["https://index.docker.io/v1/"]["auth"], "aHViOnA=");
        assert_eq!(file["auths"].as_object().unwrap().len(), 2);
        assert!(take(&mut file, "https://index.docker.io/v1/"));
        assert!(!take(&mut file, "docker.io"));
        assert_eq!(in_file(&file, "r.example").unwrap().unwrap().password, "secret");
    }
}
