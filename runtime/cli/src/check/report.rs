//! What was found, and how it is told.

use std::fmt;

/// What was found about one thing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finding {
    /// It is there.
    Ok(String),
    /// It is not, and pods can do without it.
    Note(String, Mend),
    /// It is not, and no pod can run.
    Missing(String, Mend),
}

/// The command, or the deed, that mends it.
pub type Mend = String;

impl Finding {
    /// Pods need it.
    pub fn missing(what: impl Into<String>, mend: impl Into<String>) -> Self {
        Self::Missing(what.into(), mend.into())
    }

    /// Pods do not need it.
    pub fn note(what: impl Into<String>, mend: impl Into<String>) -> Self {
        Self::Note(what.into(), mend.into())
    }
}

/// Everything that was found, in the order in which it is told.
#[derive(Clone, Debug, Default)]
pub struct Report {
    lines: Vec<(String, Finding)>,
}

impl Report {
    /// Adds a line.
    pub fn add(&mut self, name: impl Into<String>, finding: Finding) {
        self.lines.push((name.into(), finding));
    }

    /// True when nothing is missing.
    #[must_use]
    pub fn can_run(&self) -> bool {
        !self.lines.iter().any(|(_, finding)| matches!(finding, Finding::Missing(..)))
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.lines.iter().map(|(name, _)| name.len()).max().unwrap_or_default();
        for (name, finding) in &self.lines {
            let (state, text, mend) = match finding {
                Finding::Ok(text) => ("ok", text, None),
                Finding::Note(text, mend) => ("note", text, Some(mend)),
                Finding::Missing(text, mend) => ("missing", text, Some(mend)),
            };
            writeln!(f, "{state:<7}  {name:<width$}  {text}")?;
            if let Some(mend) = mend {
                writeln!(f, "{:<7}  {:<width$}  -> {mend}", "", "")?;
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
