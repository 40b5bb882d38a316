//! Programs that keep credentials elsewhere: `docker-credential-NAME`, which docker's credential helpers are.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, bail};
use husk_proto::cri;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

/// The time in which a helper has to answer: it may ask a person for a passphrase.
const ANSWER: Duration = Duration::from_secs(120);
/// The user that a helper gives for an identity token.
const TOKEN_USER: &str = "<token>";
/// The answer of a helper that has no credentials of a registry.
const NOT_FOUND: &str = "credentials not found";

/// The credentials that a helper has for a registry.
pub async fn get(name: &str, key: &str) -> anyhow::Result<Option<cri::AuthConfig>> {
    let said = match call(name, "get", key).await? {
        Ok(said) => said,
        Err(said) if said.contains(NOT_FOUND) => return Ok(None),
        Err(said) => bail!("get credentials of {key}: docker-credential-{name}: {said}"),
    };
    let wrong =
        || format!("get credentials of {key}: docker-credential-{name} did not answer as a helper does");
    let answer: serde_json::Value = serde_json::from_str(&said).with_context(wrong)?;
    let field = |name: &str| answer.get(name).and_then(|value| value.as_str()).map(str::to_owned);
    let (user, secret) = field("Username").zip(field("Secret")).with_context(wrong)?;
    Ok(Some(match user == TOKEN_USER {
        true => cri::AuthConfig { identity_token: secret, ..Default::default() },
        false => cri::AuthConfig { username: user, password: secret, ..Default::default() },
    }))
}

/// Has a helper keep credentials.
pub async fn store(name: &str, key: &str, user: &str, password: &str) -> anyhow::Result<()> {
    let request = serde_json::json!({ "ServerURL": key, "Username": user, "Secret": password });
    match call(name, "store", &request.to_string()).await? {
        Ok(_) => Ok(()),
        Err(said) => bail!("save credentials of {key}: docker-credential-{name}: {said}"),
    }
}

/// Has a helper forget credentials.
pub async fn erase(name: &str, key: &str) -> anyhow::Result<()> {
    match call(name, "erase", key).await? {
        Err(said) if !said.contains(NOT_FOUND) => {
            bail!("remove credentials of {key}: docker-credential-{name}: {said}")
        }
        _ => Ok(()),
    }
}

/// The output of a helper: `Ok` when it succeeded, `Err` with its reason when it did not.
async fn call(name: &str, verb: &str, input: &str) -> anyhow::Result<Result<String, String>> {
    if name.contains('/') {
        bail!("the credential helper `{name}` is not a name: docker-credential-NAME is looked up in PATH");
    }
    let program = format!("docker-credential-{name}");
    let exchange = async {
        let mut child = Command::new(&program)
            .arg(verb)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        // A helper that has seen enough may have closed its input.
        if let Some(mut stdin) = child.stdin.take() {
            let _ = stdin.write_all(input.as_bytes()).await;
        }
        child.wait_with_output().await
    };
    let stage = || format!("run {program}, which ~/.docker/config.json names");
    let output =
        tokio::time::timeout(ANSWER, exchange).await.with_context(|| format!("{program} does not answer"))?;
    let output = output.with_context(stage)?;
    let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    Ok(if output.status.success() { Ok(said) } else { Err(said) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_helper_that_is_missing_or_a_path_is_named() {
        let error = get("no-such-helper", "r.example").await.unwrap_err();
        assert!(format!("{error:#}").contains("docker-credential-no-such-helper"), "{error:#}");
        let error = get("../evil", "r.example").await.unwrap_err();
        assert!(error.to_string().contains("is not a name"), "{error:#}");
    }
}
