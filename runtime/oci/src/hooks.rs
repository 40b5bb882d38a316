//! Hooks of the OCI runtime-spec (`config.md`, "POSIX-platform Hooks") that a
//! handler's configuration adds to every container. runc runs them where the
//! container is: on the host, or in a guest, to which huskd copies their programs with the pod.
//!
//! The guest has no libraries and no shell, so a program must be linked statically. A
//! `start_container` hook runs inside the container, whose image has the program.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use husk_config::{Hook, Hooks};
use husk_proto::agent::{GuestFile, paths};
use oci_spec::runtime::{Hook as OciHook, HookBuilder, Hooks as OciHooks, HooksBuilder};

/// The most bytes of all programs together: they are in the guest's memory, and
/// are sent in one message.
const MAX_BYTES: u64 = 6 << 20;

/// The guest cannot have the programs of its hooks.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A program cannot be read.
    #[error("read hook: {path}: {cause}")]
    Read {
        /// The program's file.
        path: PathBuf,
        /// The kernel's reason.
        cause: std::io::Error,
    },
    /// All programs together do not fit into a message.
    #[error("hooks of the runtime handler: their programs have more than {MAX_BYTES} bytes together")]
    TooLarge,
}

/// The programs of hooks, for the guest.
///
/// # Errors
/// A program cannot be read, or all of them together are too large.
pub fn programs(hooks: &Hooks) -> Result<Vec<GuestFile>, Error> {
    let mut left = MAX_BYTES;
    let mut files = Vec::new();
    for path in distinct(hooks) {
        let wrong = |cause| Error::Read { path: path.to_owned(), cause };
        let mut content = Vec::new();
        let length =
            File::open(path).and_then(|file| file.take(left + 1).read_to_end(&mut content)).map_err(wrong)?;
        left = left.checked_sub(length as u64).ok_or(Error::TooLarge)?;
        files.push(GuestFile { name: guest_name(hooks, path), content });
    }
    Ok(files)
}

/// The hooks in the form of the OCI configuration, for a guest or for the host; `None` if there
/// are none.
///
/// # Errors
/// The OCI configuration refuses a value.
pub(super) fn of_container(hooks: &Hooks, on_host: bool) -> Result<Option<OciHooks>, super::Error> {
    if *hooks == Hooks::default() {
        return Ok(None);
    }
    let place = |path: &Path| {
        if on_host { path.to_owned() } else { Path::new(paths::HOOKS).join(guest_name(hooks, path)) }
    };
    let of_runtime = |list: &[Hook]| -> Result<Vec<OciHook>, super::Error> {
        list.iter().map(|hook| build(hook, place(&hook.path))).collect()
    };
    let start_container = hooks.start_container.iter().map(|hook| build(hook, hook.path.clone()));
    #[allow(deprecated)]
    let built = HooksBuilder::default()
        .prestart(of_runtime(&hooks.prestart)?)
        .create_runtime(of_runtime(&hooks.create_runtime)?)
        .create_container(of_runtime(&hooks.create_container)?)
        .start_container(start_container.collect::<Result<Vec<_>, _>>()?)
        .poststart(of_runtime(&hooks.poststart)?)
        .poststop(of_runtime(&hooks.poststop)?)
        .build();
    Ok(Some(built?))
}

fn build(hook: &Hook, path: PathBuf) -> Result<OciHook, super::Error> {
    let mut builder = HookBuilder::default().path(path).env(hook.env.clone());
    if !hook.args.is_empty() {
        builder = builder.args(hook.args.clone());
    }
    if let Some(seconds) = hook.timeout_seconds {
        builder = builder.timeout(i64::from(seconds));
    }
    Ok(builder.build()?)
}

/// The hooks' programs on the host, each once, in the order of the configuration.
fn distinct(hooks: &Hooks) -> Vec<&Path> {
    let all =
        [&hooks.prestart, &hooks.create_runtime, &hooks.create_container, &hooks.poststart, &hooks.poststop];
    let mut paths = Vec::<&Path>::new();
    for hook in all.into_iter().flatten() {
        if !paths.contains(&hook.path.as_path()) {
            paths.push(&hook.path);
        }
    }
    paths
}

/// A program's file name in the guest, with a number, because two programs of the host may have
/// the same name.
fn guest_name(hooks: &Hooks, path: &Path) -> String {
    let number = distinct(hooks).iter().position(|other| *other == path).unwrap_or_default();
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let name: String = name.chars().filter(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_')).collect();
    format!("{number}-{}", name.get(..40).unwrap_or(&name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hook(path: &Path) -> Hook {
        Hook { path: path.into(), args: vec!["hook".into()], env: Vec::new(), timeout_seconds: Some(3) }
    }

    #[test]
    fn a_program_travels_once_and_every_hook_finds_it() {
        let folder = tempfile::tempdir().unwrap();
        let (one, two) = (folder.path().join("a/tool"), folder.path().join("b/tool"));
        for path in [&one, &two] {
            std::fs::create_dir(path.parent().unwrap()).unwrap();
            std::fs::write(path, path.display().to_string()).unwrap();
        }
        let hooks = Hooks {
            create_runtime: vec![hook(&one), hook(&two)],
            poststop: vec![hook(&two)],
            start_container: vec![hook(Path::new("/in/the/image"))],
            ..Hooks::default()
        };
        let files = programs(&hooks).unwrap();
        let names: Vec<_> = files.iter().map(|file| file.name.as_str()).collect();
        assert_eq!(names, ["0-tool", "1-tool"]);
        let oci = of_container(&hooks, false).unwrap().unwrap();
        let path = |hooks: &Option<Vec<OciHook>>| hooks.as_ref().unwrap().last().unwrap().path().clone();
        assert_eq!(path(oci.create_runtime()), Path::new(paths::HOOKS).join("1-tool"));
        assert_eq!(path(oci.poststop()), path(oci.create_runtime()));
        assert_eq!(path(oci.start_container()), Path::new("/in/the/image"));
        let on_host = of_container(&hooks, true).unwrap().unwrap();
        assert_eq!(path(on_host.poststop()), two);
        assert!(of_container(&Hooks::default(), false).unwrap().is_none());
    }

    #[test]
    fn what_cannot_travel_is_named() {
        let missing = Hooks { prestart: vec![hook(Path::new("/no/such/hook"))], ..Hooks::default() };
        assert!(programs(&missing).unwrap_err().to_string().contains("/no/such/hook"));
        let endless = Hooks { prestart: vec![hook(Path::new("/dev/zero"))], ..Hooks::default() };
        assert!(programs(&endless).unwrap_err().to_string().contains("bytes together"));
    }
}
