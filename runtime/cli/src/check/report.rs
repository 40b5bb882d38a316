//! The report of `husk check`.

use std::fmt;

/// The state of one requirement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finding {
    /// The requirement is met.
    Ok(String),
    /// The requirement is not met, and pods can run without it.
    Note(String, Fix),
    /// The requirement is not met, and no pod can run.
    Missing(String, Fix),
}

/// The command, or the step, that fixes it.
pub type Fix = String;

impl Finding {
    /// A requirement without which no pod can run is not met.
    pub fn missing(what: impl Into<String>, fix: impl Into<String>) -> Self {
        Self::Missing(what.into(), fix.into())
    }

    /// A requirement that pods can do without is not met.
    pub fn note(what: impl Into<String>, fix: impl Into<String>) -> Self {
        Self::Note(what.into(), fix.into())
    }
}

/// All findings, in the order in which they are printed.
#[derive(Clone, Debug, Default)]
pub struct Report {
    lines: Vec<(String, Finding)>,
}

impl Report {
    /// Adds a line.
    pub fn add(&mut self, name: impl Into<String>, finding: Finding) {
        self.lines.push((name.into(), finding));
    }

    /// Whether pods can run here.
    #[must_use]
    pub fn can_run(&self) -> bool {
        !self.lines.iter().any(|(_, finding)| matches!(finding, Finding::Missing(..)))
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.lines.iter().map(|(name, _)| name.len()).max().unwrap_or_default();
        for (name, finding) in &self.lines {
            let (state, text, fix) = match finding {
                Finding::Ok(text) => ("ok", text, None),
                Finding::Note(text, fix) => ("note", text, Some(fix)),
                Finding::Missing(text, fix) => ("missing", text, Some(fix)),
            };
            writeln!(f, "{state:<7}  {name:<width$}  {text}")?;
            if let Some(fix) = fix {
                writeln!(f, "{:<7}  {:<width$}  -> {fix}", "", "")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_missing_keeps_pods_from_running() {
        let mut report = Report::default();
        report.add("kvm", Finding::Ok("/dev/kvm".into()));
        report.add("huskd", Finding::note("does not answer", "systemctl start husk"));
        assert!(report.can_run());
        report.add("mkfs.erofs", Finding::missing("not found", "apt install erofs-utils"));
        assert!(!report.can_run());
        let text = report.to_string();
        assert!(text.contains("ok       kvm         /dev/kvm\n"), "{text}");
        assert!(text.contains("missing  mkfs.erofs  not found\n"), "{text}");
        assert!(text.contains("-> apt install erofs-utils\n"), "{text}");
    }
}
