//! The process of a container: its program, user and capabilities.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};

use husk_proto::{agent, cri};
use oci_spec::runtime::{
    Capabilities, Capability, LinuxCapabilitiesBuilder, PosixRlimitBuilder, PosixRlimitType, Process,
    ProcessBuilder, UserBuilder,
};

use super::{Error, Input, host_name};

/// The longest argument or variable with its final zero, bytes (execve(2)).
const MAX_ARG_STRLEN: usize = 128 << 10;
/// The most bytes of all arguments and variables: a quarter of the stack's usual limit, 8 MiB
/// (execve(2)).
const ARG_MAX: usize = 2 << 20;

/// The capabilities of a container whose client asks for none: those that Docker chose, and
/// containers have come to expect.
const DEFAULT_CAPABILITIES: &[Capability] = &[
    Capability::Chown,
    Capability::DacOverride,
    Capability::Fsetid,
    Capability::Fowner,
    Capability::Mknod,
    Capability::NetRaw,
    Capability::Setgid,
    Capability::Setuid,
    Capability::Setfcap,
    Capability::Setpcap,
    Capability::NetBindService,
    Capability::SysChroot,
    Capability::Kill,
    Capability::AuditWrite,
];

/// All capabilities of Linux 6.12, which a privileged container has.
fn all_capabilities() -> impl Iterator<Item = Capability> {
    use Capability as C;
    [
        C::AuditControl,
        C::AuditRead,
        C::AuditWrite,
        C::BlockSuspend,
        C::Bpf,
        C::CheckpointRestore,
        C::Chown,
        C::DacOverride,
        C::DacReadSearch,
        C::Fowner,
        C::Fsetid,
        C::IpcLock,
        C::IpcOwner,
        C::Kill,
        C::Lease,
        C::LinuxImmutable,
        C::MacAdmin,
        C::MacOverride,
        C::Mknod,
        C::NetAdmin,
        C::NetBindService,
        C::NetBroadcast,
        C::NetRaw,
        C::Perfmon,
        C::Setfcap,
        C::Setgid,
        C::Setpcap,
        C::Setuid,
        C::SysAdmin,
        C::SysBoot,
        C::SysChroot,
        C::SysModule,
        C::SysNice,
        C::SysPacct,
        C::SysPtrace,
        C::SysRawio,
        C::SysResource,
        C::SysTime,
        C::SysTtyConfig,
        C::Syslog,
        C::WakeAlarm,
    ]
    .into_iter()
}

pub(super) fn build(
    input: &Input<'_>,
    security: &cri::LinuxContainerSecurityContext,
) -> Result<Process, Error> {
    let (args, env) = (args(input)?, env(input)?);
    fits_exec(&args, &env)?;
    let capabilities = capabilities(security)?;
    let ambient = ambient(security)?;
    let open_files = PosixRlimitBuilder::default()
        .typ(PosixRlimitType::RlimitNofile)
        .soft(1024u64 * 1024)
        .hard(1024u64 * 1024)
        .build()?;
    let mut process = ProcessBuilder::default()
        .terminal(input.config.tty)
        .user(UserBuilder::default().uid(0u32).gid(0u32).build()?)
        .args(args)
        .env(env)
        .cwd(cwd(input))
        .capabilities(
            LinuxCapabilitiesBuilder::default()
                .bounding(capabilities.clone())
                .effective(capabilities.clone())
                .permitted(capabilities)
                .inheritable(ambient.clone())
                .ambient(ambient)
                .build()?,
        )
        .rlimits(vec![open_files])
        .no_new_privileges(security.no_new_privs);
    if let Some(resources) = input.config.linux.as_ref().and_then(|linux| linux.resources.as_ref())
        && let Some(score) = super::oom_score_adj(resources)?
    {
        process = process.oom_score_adj(score);
    }
    if let Some(profile) = input.apparmor {
        process = process.apparmor_profile(profile);
    }
    Ok(process.build()?)
}

/// The arguments of the process. `command` replaces the image's entrypoint and its arguments,
/// `args` the arguments alone.
fn args(input: &Input<'_>) -> Result<Vec<String>, Error> {
    let image = |part: &Option<Vec<String>>| part.clone().unwrap_or_default();
    let (mut args, rest) = if input.config.command.is_empty() {
        let rest =
            if input.config.args.is_empty() { image(input.image.cmd()) } else { input.config.args.clone() };
        // Builders write an entrypoint that was removed as one empty word.
        let entrypoint = image(input.image.entrypoint());
        (if entrypoint == [""] { Vec::new() } else { entrypoint }, rest)
    } else {
        (input.config.command.clone(), input.config.args.clone())
    };
    args.extend(rest);
    match args.first() {
        Some(program) if !program.is_empty() => Ok(args),
        _ => Err(Error::Invalid("no command: neither the request nor the image names one".into())),
    }
}

/// The image's variables, replaced by the client's of the same name. An entry of the image
/// without `=` unsets an earlier variable of that name.
fn env(input: &Input<'_>) -> Result<Vec<String>, Error> {
    let mut env = Variables::default();
    env.set("PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned());
    let hostname = host_name(input.sandbox, input.host.is_some());
    if !hostname.is_empty() {
        env.set(format!("HOSTNAME={hostname}"));
    }
    for variable in input.image.env().iter().flatten() {
        env.set(variable.clone());
    }
    for variable in &input.config.envs {
        let value = std::str::from_utf8(&variable.value)
            .map_err(|_| Error::Invalid(format!("variable `{}` is not UTF-8", variable.key)))?;
        env.set(format!("{}={value}", variable.key));
    }
    Ok(env.entries.into_iter().flatten().collect())
}

/// Variables in the order in which their names were first set.
#[derive(Default)]
struct Variables {
    /// The variables as `NAME=value`; `None` for one that was unset.
    entries: Vec<Option<String>>,
    places: HashMap<String, usize>,
}

impl Variables {
    fn set(&mut self, variable: String) {
        let (name, set) = match variable.split_once('=') {
            Some((name, _)) => (name.to_owned(), true),
            None => (variable.clone(), false),
        };
        let place = match self.places.entry(name) {
            Entry::Occupied(there) => *there.get(),
            Entry::Vacant(_) if !set => return,
            Entry::Vacant(free) => {
                let place = *free.insert(self.entries.len());
                self.entries.push(None);
                place
            }
        };
        if let Some(entry) = self.entries.get_mut(place) {
            *entry = set.then_some(variable);
        }
    }
}

/// Refuses arguments and variables that execve(2) would refuse: the kernel's own error would
/// come from runc, and name neither the limit nor the text that exceeds it.
fn fits_exec(args: &[String], env: &[String]) -> Result<(), Error> {
    for text in args.iter().chain(env) {
        if text.len() >= MAX_ARG_STRLEN {
            let shown: String = text.chars().take(40).collect();
            return Err(Error::Invalid(format!(
                "argument or variable `{shown}…` has {} bytes, and Linux takes at most {} in one \
                 (MAX_ARG_STRLEN): put it into a file",
                text.len(),
                MAX_ARG_STRLEN - 1
            )));
        }
    }
    let pointer = size_of::<usize>();
    let bytes: usize = args.iter().chain(env).map(|text| text.len() + 1 + pointer).sum();
    if bytes > ARG_MAX {
        return Err(Error::Invalid(format!(
            "{} arguments and {} variables take {bytes} bytes, and Linux starts no program with more than \
             {ARG_MAX} (ARG_MAX): pass less, or in files (`enableServiceLinks: false` leaves the variables of \
             services out)",
            args.len(),
            env.len()
        )));
    }
    Ok(())
}

fn cwd(input: &Input<'_>) -> String {
    let image = || input.image.working_dir().clone().filter(|directory| !directory.is_empty());
    match input.config.working_dir.as_str() {
        "" => image().unwrap_or_else(|| "/".into()),
        directory => directory.to_owned(),
    }
}

/// The capabilities that a container has.
pub(super) fn capabilities(security: &cri::LinuxContainerSecurityContext) -> Result<Capabilities, Error> {
    if security.privileged {
        return Ok(all_capabilities().collect());
    }
    let change = security.capabilities.clone().unwrap_or_default();
    let mut set: HashSet<Capability> = DEFAULT_CAPABILITIES.iter().copied().collect();
    // "ALL" comes first, whatever the order, so that one list may say "all but".
    if change.add_capabilities.iter().any(|name| name.eq_ignore_ascii_case("ALL")) {
        set.extend(all_capabilities());
    }
    if change.drop_capabilities.iter().any(|name| name.eq_ignore_ascii_case("ALL")) {
        set.clear();
    }
    for name in named(&change.add_capabilities) {
        set.insert(capability(name)?);
    }
    for name in named(&change.drop_capabilities) {
        set.remove(&capability(name)?);
    }
    // An ambient capability has to be among the permitted ones.
    set.extend(ambient(security)?);
    Ok(set)
}

fn ambient(security: &cri::LinuxContainerSecurityContext) -> Result<Capabilities, Error> {
    let names = security.capabilities.as_ref().map(|change| change.add_ambient_capabilities.as_slice());
    let names = names.unwrap_or_default();
    if names.iter().any(|name| name.eq_ignore_ascii_case("ALL")) {
        return Ok(all_capabilities().collect());
    }
    names.iter().map(|name| capability(name)).collect()
}

fn named(names: &[String]) -> impl Iterator<Item = &str> {
    names.iter().map(String::as_str).filter(|name| !name.eq_ignore_ascii_case("ALL"))
}

/// The capability of this name, with or without `CAP_`.
fn capability(name: &str) -> Result<Capability, Error> {
    let upper = name.to_ascii_uppercase();
    let bare = upper.strip_prefix("CAP_").unwrap_or(&upper);
    bare.parse().map_err(|_| Error::Invalid(format!("unknown capability `{name}`")))
}

/// The user that the process runs as: the client's choice, else the image's.
///
/// # Errors
/// A group without a user, or an id that is out of range.
pub fn user(input: &Input<'_>) -> Result<agent::User, Error> {
    let security = super::security(input.config);
    let id = |id: i64, what: &str| {
        u32::try_from(id).map_err(|_| Error::Invalid(format!("{what} {id} is not 0 to {}", u32::MAX)))
    };
    let asked = match (&security.run_as_user, security.run_as_username.as_str()) {
        (Some(user), _) => id(user.value, "run_as_user")?.to_string(),
        (None, name) => name.to_owned(),
    };
    let group = security.run_as_group.as_ref().map(|group| id(group.value, "run_as_group")).transpose()?;
    let image = || input.image.user().clone().unwrap_or_default();
    let user = match (asked.as_str(), group) {
        ("", None) => image(),
        ("", Some(_)) => {
            return Err(Error::Invalid("run_as_group needs run_as_user or run_as_username".into()));
        }
        (user, None) => user.to_owned(),
        (user, Some(group)) => format!("{user}:{group}"),
    };
    let additional_gids = security
        .supplemental_groups
        .iter()
        .map(|group| id(*group, "supplemental group"))
        .collect::<Result<Vec<_>, _>>()?;
    let strict_groups = security.supplemental_groups_policy == cri::SupplementalGroupsPolicy::Strict as i32;
    Ok(agent::User { user, additional_gids, strict_groups })
}
