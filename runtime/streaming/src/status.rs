//! The end of an exec or attach, as the error stream reports it.

use serde_json::json;

/// The end of a session's command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExitStatus {
    /// The command returned 0, or the client has detached.
    Success,
    /// The command returned something else.
    Exit(i32),
    /// The command did not come to an end by itself, or never started.
    Failed(String),
}

/// The language of a client's error stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Language {
    /// Text, and nothing for a success: versions 1 to 3.
    Text,
    /// A `metav1.Status` in JSON: version 4 and later.
    Status,
}

impl ExitStatus {
    /// Encodes the status in the client's language.
    #[must_use]
    pub fn encode(&self, language: Language) -> String {
        match language {
            Language::Text => self.text(),
            Language::Status => self.status().to_string(),
        }
    }

    fn text(&self) -> String {
        match self {
            Self::Success => String::new(),
            Self::Exit(code) => format!("command terminated with non-zero exit code: {code}"),
            Self::Failed(message) => message.clone(),
        }
    }

    fn status(&self) -> serde_json::Value {
        match self {
            Self::Success => json!({"metadata": {}, "status": "Success"}),
            Self::Exit(code) => json!({
                "metadata": {},
                "status": "Failure",
                "message": self.text(),
                "reason": "NonZeroExitCode",
                "details": {"causes": [{"reason": "ExitCode", "message": code.to_string()}]},
            }),
            Self::Failed(message) => json!({
                "metadata": {},
                "status": "Failure",
                "message": format!("Internal error occurred: {message}"),
                "reason": "InternalError",
                "details": {"causes": [{"message": message}]},
                "code": 500,
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exit_code_is_a_cause_that_clients_look_for() {
        let status: serde_json::Value =
            serde_json::from_str(&ExitStatus::Exit(7).encode(Language::Status)).unwrap();
        assert_eq!(status["reason"], "NonZeroExitCode");
        assert_eq!(status["details"]["causes"][0], json!({"reason": "ExitCode", "message": "7"}));
        assert_eq!(status["message"], "command terminated with non-zero exit code: 7");
    }

    #[test]
    fn success_is_said_in_json_and_nothing_in_text() {
        assert_eq!(ExitStatus::Success.encode(Language::Text), "");
        assert!(ExitStatus::Success.encode(Language::Status).contains(r#""status":"Success""#));
        assert_eq!(ExitStatus::Failed("no such program".into()).encode(Language::Text), "no such program");
        assert!(
            ExitStatus::Failed("no such program".into()).encode(Language::Status).contains("InternalError")
        );
    }
}
