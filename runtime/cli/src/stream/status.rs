//! The end of a stream as Kubernetes' `Status` tells it.

use anyhow::{Context, bail};
use serde::Deserialize;

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Status {
    status: String,
    message: String,
    reason: String,
    details: Details,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Details {
    causes: Vec<Cause>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Cause {
    reason: String,
    message: String,
}

/// The exit code that the end of a stream tells; 0 for a plain end.
///
/// # Errors
/// The end was a failure, with the other side's words.
pub fn code_of(told: &str) -> anyhow::Result<u8> {
    if told.is_empty() {
        return Ok(0);
    }
    let status: Status =
        serde_json::from_str(told).with_context(|| format!("huskd ended the stream: {told}"))?;
    if status.status == "Success" {
        return Ok(0);
    }
    let code = status.details.causes.iter().find(|cause| cause.reason == "ExitCode");
    match code.and_then(|cause| cause.message.parse::<i32>().ok()) {
        Some(code) if status.reason == "NonZeroExitCode" => Ok(u8::try_from(code).unwrap_or(u8::MAX)),
        _ => bail!("huskd: {}", status.message),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_told_from_failures() {
        let ended = r#"{"status":"Failure","reason":"NonZeroExitCode","message":"command terminated","details":{"causes":[{"reason":"ExitCode","message":"3"}]}}"#;
        assert_eq!(code_of(ended).unwrap(), 3);
        assert_eq!(code_of(r#"{"metadata":{},"status":"Success"}"#).unwrap(), 0);
        assert_eq!(code_of("").unwrap(), 0);
        let failed = r#"{"status":"Failure","reason":"InternalError","message":"the agent is gone"}"#;
        assert!(code_of(failed).unwrap_err().to_string().contains("the agent is gone"));
        assert!(code_of("nonsense").is_err());
    }
}
