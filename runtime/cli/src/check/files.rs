//! Programs and images that huskd uses.

use std::path::{Path, PathBuf};
use std::process::Command;

use husk_config::{Config, Handler};

use super::report::{Finding, Report};

/// Programs, the Debian package of each, and the consequence of its absence;
/// empty for programs without which no pod runs.
const PROGRAMS: [(&str, &str, &str); 3] = [
    ("mkfs.erofs", "erofs-utils", ""),
    ("mke2fs", "e2fsprogs", ""),
    ("iptables", "iptables", "CNI plugins cannot masquerade or map ports"),
];

/// Looks for programs and images.
pub fn check(report: &mut Report, config: &Config) {
    for (name, package, without) in PROGRAMS {
        report.add(name, program(name, package, without));
    }
    for (name, handler) in &config.handlers {
        match handler {
            Handler::Vm(vm) => {
                report.add(format!("{name}: vmm"), file(&vm.vmm, "make install"));
                report.add(format!("{name}: file server"), file(&vm.file_server, "make install"));
                report.add(format!("{name}: kernel"), file(&vm.kernel, "make guest-image install"));
                report.add(format!("{name}: rootfs"), file(&vm.rootfs, "make guest-image install"));
            }
            Handler::Host(host) => {
                // Pods in VMs do without these.
                let wanted = |found| if *name == config.default_handler { found } else { optional(found) };
                report.add(format!("{name}: agent"), wanted(file(&host.agent, "make install")));
                report.add(format!("{name}: runc"), wanted(runc(&host.runc)));
            }
        }
    }
}

/// A program on the `PATH`, or in root's directories when the path is a user's.
fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut folders: Vec<_> = std::env::split_paths(&path).collect();
    folders.extend(["/usr/sbin".into(), "/sbin".into()]);
    folders.iter().map(|folder| folder.join(name)).find(|path| path.is_file())
}

fn program(name: &str, package: &str, without: &str) -> Finding {
    match find(name) {
        Some(path) => Finding::Ok(path.display().to_string()),
        None if without.is_empty() => Finding::missing("not found", format!("apt install {package}")),
        None => Finding::note(format!("not found: {without}"), format!("apt install {package}")),
    }
}

fn optional(found: Finding) -> Finding {
    match found {
        Finding::Missing(what, fix) => Finding::Note(format!("{what}: no pods of this handler"), fix),
        other => other,
    }
}

/// The OCI runtime of host pods: a path, or a name that is looked up.
fn runc(path: &Path) -> Finding {
    let found = match path.to_str() {
        Some(name) if !name.contains('/') => match find(name) {
            Some(found) => found,
            None => return Finding::missing("not found", "apt install runc"),
        },
        _ => match file(path, "apt install runc, and name it in the configuration") {
            Finding::Ok(_) => path.to_owned(),
            missing => return missing,
        },
    };
    match Command::new(&found).arg("--version").output() {
        Ok(said) => runc_version(&found, &String::from_utf8_lossy(&said.stdout)),
        Err(error) => Finding::missing(format!("{}: {error}", found.display()), "apt install runc"),
    }
}

/// The first release of each line from which a container does not get out by
/// its mounts (CVE-2025-31133, CVE-2025-52565, CVE-2025-52881).
const FIXED_RUNC: [[u32; 3]; 3] = [[1, 2, 8], [1, 3, 3], [1, 4, 0]];

/// Judges the output of `runc --version`.
fn runc_version(path: &Path, said: &str) -> Finding {
    const FIX: &str = "install runc 1.2.8, 1.3.3, 1.4.0 or a later one of these lines";
    let path = path.display();
    let Some(version) = said.lines().find_map(|line| line.strip_prefix("runc version ")).map(str::trim)
    else {
        return Finding::missing(format!("{path} does not say which version of runc it is"), FIX);
    };
    let end = version.find(|byte: char| byte != '.' && !byte.is_ascii_digit()).unwrap_or(version.len());
    let (numbers, rest) = version.split_at(end);
    let numbers: Vec<u32> = numbers.split('.').filter_map(|number| number.parse().ok()).collect();
    let is_fixed =
        FIXED_RUNC.iter().any(|fixed| numbers.starts_with(&fixed[..2]) && numbers >= fixed.to_vec())
            || numbers.as_slice() > FIXED_RUNC[2].as_slice();
    // A release candidate comes before its release.
    if is_fixed && !rest.starts_with("-rc") {
        return Finding::Ok(format!("{path}, version {version}"));
    }
    let what = format!("{path} is version {version}, from which containers can get out (CVE-2025-31133)");
    if rest.starts_with('+') || rest.starts_with('~') {
        return Finding::note(format!("{what} unless the distribution has patched it"), FIX);
    }
    Finding::missing(what, FIX)
}

fn file(path: &Path, fix: &str) -> Finding {
    match std::fs::metadata(path) {
        Ok(found) if found.is_file() && found.len() > 0 => Finding::Ok(path.display().to_string()),
        Ok(_) => Finding::missing(format!("{} is empty or no file", path.display()), fix),
        Err(error) => Finding::missing(format!("{}: {error}", path.display()), fix),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_found_or_their_package_is_named() {
        assert!(matches!(program("sh", "dash", ""), Finding::Ok(_)));
        let Finding::Missing(_, fix) = program("no-such-program", "some-package", "") else { panic!() };
        assert_eq!(fix, "apt install some-package");
        assert!(matches!(program("no-such-program", "p", "no colours"), Finding::Note(..)));
    }

    #[test]
    fn a_runc_that_lets_containers_out_is_not_good_enough() {
        let judge = |version: &str| {
            let said = format!("runc version {version}\ncommit: v1-0-g0\nspec: 1.2.0\n");
            runc_version(Path::new("/usr/bin/runc"), &said)
        };
        for version in ["1.2.8", "1.3.3", "1.3.5", "1.4.0", "1.4.1", "1.10.0", "2.0.0"] {
            assert!(matches!(judge(version), Finding::Ok(_)), "{version}");
        }
        for version in ["1.0.0", "1.1.12", "1.2.7", "1.3.2", "1.4.0-rc.2", "x", ""] {
            assert!(matches!(judge(version), Finding::Missing(..)), "{version}");
        }
        assert!(matches!(judge("1.1.5+ds1"), Finding::Note(..)));
        assert!(matches!(runc_version(Path::new("/r"), "crun version 1.20"), Finding::Missing(..)));
    }

    #[test]
    fn an_empty_kernel_is_as_good_as_none() {
        let empty = tempfile::NamedTempFile::new().unwrap();
        assert!(matches!(file(empty.path(), "make"), Finding::Missing(..)));
        assert!(matches!(file(&std::env::current_exe().unwrap(), "make"), Finding::Ok(_)));
    }
}
