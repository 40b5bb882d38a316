//! Programs and images that huskd uses.

use std::path::Path;

use husk_runtime::config::{Config, Kind};

use super::report::{Finding, Report};

/// Programs, the Debian package that has each, and what happens without it;
/// nothing is said about those without which no pod runs.
const PROGRAMS: [(&str, &str, &str); 3] = [
    ("mkfs.erofs", "erofs-utils", ""),
    ("mke2fs", "e2fsprogs", ""),
    ("iptables", "iptables", "CNI plugins cannot masquerade or map ports"),
];

/// Looks for them.
pub fn check(report: &mut Report, config: &Config) {
    for (name, package, without) in PROGRAMS {
        report.add(name, program(name, package, without));
    }
    for (name, handler) in &config.handlers {
        if handler.kind() == Kind::Host {
            // Pods in machines do without these.
            let wanted = |found| if *name == config.default_handler { found } else { optional(found) };
            report.add(format!("{name}: agent"), wanted(file(&handler.agent, "make install")));
            report.add(format!("{name}: runc"), wanted(runc(&handler.runc)));
            continue;
        }
        report.add(format!("{name}: vmm"), file(&handler.vmm, "make install"));
        report.add(format!("{name}: file server"), file(&handler.file_server, "make install"));
        report.add(format!("{name}: kernel"), file(&handler.kernel, "make guest-image install"));
        report.add(format!("{name}: rootfs"), file(&handler.rootfs, "make guest-image install"));
    }
}

/// A program on the `PATH`, or where root has them when the path is a user's.
fn program(name: &str, package: &str, without: &str) -> Finding {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut folders: Vec<_> = std::env::split_paths(&path).collect();
    folders.extend(["/usr/sbin".into(), "/sbin".into()]);
    match folders.iter().map(|folder| folder.join(name)).find(|path| path.is_file()) {
        Some(path) => Finding::Ok(path.display().to_string()),
        None if without.is_empty() => Finding::missing("not found", format!("apt install {package}")),
        None => Finding::note(format!("not found: {without}"), format!("apt install {package}")),
    }
}

fn optional(found: Finding) -> Finding {
    match found {
        Finding::Missing(what, mend) => Finding::Note(format!("{what}: no pods of this handler"), mend),
        other => other,
    }
}

/// The OCI runtime of host pods: a path, or a name that is looked up.
fn runc(path: &Path) -> Finding {
    match path.to_str() {
        Some(name) if !name.contains('/') => program(name, "runc", ""),
        _ => file(path, "apt install runc, and name it in the configuration"),
    }
}

fn file(path: &Path, mend: &str) -> Finding {
    match std::fs::metadata(path) {
        Ok(found) if found.is_file() && found.len() > 0 => Finding::Ok(path.display().to_string()),
        Ok(_) => Finding::missing(format!("{} is empty or no file", path.display()), mend),
        Err(error) => Finding::missing(format!("{}: {error}", path.display()), mend),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn programs_are_found_or_their_package_is_named() {
        assert!(matches!(program("sh", "dash", ""), Finding::Ok(_)));
        let Finding::Missing(_, mend) = program("no-such-program", "some-package", "") else { panic!() };
        assert_eq!(mend, "apt install some-package");
        assert!(matches!(program("no-such-program", "p", "no colours"), Finding::Note(..)));
    }

    #[test]
    fn an_empty_kernel_is_as_good_as_none() {
        let empty = tempfile::NamedTempFile::new().unwrap();
        assert!(matches!(file(empty.path(), "make"), Finding::Missing(..)));
        assert!(matches!(file(&std::env::current_exe().unwrap(), "make"), Finding::Ok(_)));
    }
}
