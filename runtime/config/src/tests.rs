use husk_vmm_api::RateLimit;

use super::*;

fn load(text: &str) -> Result<Config, Error> {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), text).unwrap();
    Config::load(file.path())
}

/// The error that a file with this text is, with its causes.
fn refusal(text: &str) -> String {
    let error = load(text).unwrap_err();
    let causes = std::iter::successors(Some(&error as &dyn std::error::Error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

fn kind(config: &Config, name: &str) -> Option<Kind> {
    config.handler(name).map(|(_, handler)| handler.kind())
}

#[test]
fn the_empty_handler_is_the_default_and_unknown_ones_are_none() {
    let config = Config::default();
    assert_eq!(config.handler("").unwrap().0, "kata-runtime");
    assert!(config.handler("kata").is_none());
}

#[test]
fn a_file_changes_what_it_names_and_nothing_else() {
    let config =
        load("socket = '/tmp/x.sock'\n[handlers.small]\nmemory_mib = 128\n[handlers.kata-runtime]\n")
            .unwrap();
    assert_eq!(config.socket, Path::new("/tmp/x.sock"));
    let small = config.handler("small").unwrap().1.vm().unwrap();
    assert_eq!((small.memory_mib, small.vcpus), (128, VmHandler::default().vcpus));
    assert_eq!(config.state_dir, Path::new("/var/lib/husk"));
}

#[test]
fn host_pods_have_a_handler_unless_it_is_taken_away() {
    for text in ["", "[handlers.kata-runtime]\nvcpus = 2", "[handlers.runc]\nrunc = '/opt/runc'"] {
        let config = load(text).unwrap();
        assert_eq!(kind(&config, "runc"), Some(Kind::Host), "{text}");
        assert_eq!(kind(&config, ""), Some(Kind::Vm), "{text}");
    }
    assert_eq!(kind(&load("[handlers.runc]\nenabled = false").unwrap(), "runc"), None);
    assert!(refusal("[handlers.kata-runtime]\nenabled = false").contains("default_handler"));
}

#[test]
fn a_handler_is_of_the_kind_that_its_table_or_else_its_name_says() {
    for (text, name, expected) in [
        ("[handlers.plain]\nkind = 'host'\nrunc = '/opt/runc'", "plain", Kind::Host),
        // The key that decides may come last, in any form that TOML has.
        ("[handlers.plain]\nrunc = '/opt/runc'\nkind = 'host'", "plain", Kind::Host),
        ("handlers.plain.runc = '/opt/runc'\nhandlers.plain.kind = 'host'", "plain", Kind::Host),
        ("handlers = { plain = { runc = '/opt/runc', kind = 'host' } }", "plain", Kind::Host),
        ("[handlers.runc]\nvcpus = 2\nkind = 'vm'", "runc", Kind::Vm),
        ("[handlers.kata-runtime]\nkind = 'host'\nrunc = 'crun'", "kata-runtime", Kind::Host),
        ("[handlers.other]\nvcpus = 2", "other", Kind::Vm),
    ] {
        assert_eq!(kind(&load(text).unwrap(), name), Some(expected), "{text}");
    }
    let config = load("[handlers.plain]\nrunc = '/opt/runc'\nkind = 'host'").unwrap();
    assert_eq!(config.handler("plain").unwrap().1.host().unwrap().runc, Path::new("/opt/runc"));
}

#[test]
fn both_kinds_have_hooks_and_a_time_limit_for_the_agent() {
    for name in ["kata-runtime", "runc"] {
        let text = format!(
            "[handlers.{name}]\nagent_timeout_seconds = 7\n[[handlers.{name}.hooks.poststart]]\npath = '/hook'"
        );
        let config = load(&text).unwrap();
        let (_, handler) = config.handler(name).unwrap();
        assert_eq!(handler.agent_timeout().as_secs(), 7);
        assert_eq!(handler.hooks().poststart[0].path, Path::new("/hook"));
    }
}

#[test]
fn a_key_of_the_other_kind_is_refused_with_what_to_do() {
    for (text, name, key, own, other) in [
        ("[handlers.runc]\nkernel = '/vmlinux'", "runc", "`kernel`", "host", "vm"),
        ("[handlers.runc]\nvcpus = 2\ndisk_mib = 99", "runc", "`disk_mib`, `vcpus`", "host", "vm"),
        ("[handlers.runc]\nnetwork_filter = false", "runc", "`network_filter`", "host", "vm"),
        ("[handlers.runc.limits.disk]\nbytes_per_second = 1", "runc", "`limits`", "host", "vm"),
        ("[handlers.plain]\nkind = 'host'\ntemplate = true", "plain", "`template`", "host", "vm"),
        ("[handlers.kata-runtime]\nrunc = 'runc'", "kata-runtime", "`runc`", "vm", "host"),
        (
            "[handlers.small]\napparmor_policy = '/p'\nagent = '/a'",
            "small",
            "`agent`, `apparmor_policy`",
            "vm",
            "host",
        ),
        ("[handlers.runc]\nkind = 'vm'\nrunc = 'runc'", "runc", "`runc`", "vm", "host"),
        // One that is not enabled would be refused as soon as it is.
        ("[handlers.runc]\nenabled = false\nrootfs = '/r'", "runc", "`rootfs`", "host", "vm"),
    ] {
        let told = refusal(text);
        let expected = format!(
            "handlers.{name}: only handlers of kind \"{other}\" have {key}, and this one is of kind \"{own}\": remove \
             what it does not have, or set kind = \"{other}\""
        );
        assert!(told.ends_with(&expected), "{told}");
    }
}

#[test]
fn limits_are_set_by_device_and_off_by_default() {
    let config = load(
        "[handlers.kata-runtime.limits]\nnetwork_out = { bytes_per_second = 1000, bytes_burst = 5 }\n[handlers.other]",
    )
    .unwrap();
    let limits = |name| config.handler(name).unwrap().1.vm().unwrap().limits.clone();
    let network_out = RateLimit { bytes_per_second: 1000, bytes_burst: 5, ..RateLimit::default() };
    assert_eq!(limits(""), Limits { network_out: Some(network_out), ..Limits::default() });
    assert_eq!(limits("other"), Limits::default());
}

#[test]
fn values_that_cannot_work_are_refused_by_name() {
    for (text, name) in [
        ("[handlers.kata-runtime]\nvcpus = 0", "handlers.kata-runtime.vcpus must be 1 to 64"),
        ("[handlers.kata-runtime]\nvcpus = 65", "handlers.kata-runtime.vcpus must be 1 to 64"),
        ("[handlers.kata-runtime]\nmemory_mib = 1", "handlers.kata-runtime.memory_mib must be 96 or more"),
        ("[handlers.kata-runtime]\ndisk_mib = 15", "handlers.kata-runtime.disk_mib must be 16 or more"),
        ("[handlers.kata-runtime]\nimage_slots = 13", "handlers.kata-runtime.image_slots must be 1 to 12"),
        ("[handlers.kata-runtime]\ntrusted_volumes = ['srv']", "trusted_volumes: path `srv` is not absolute"),
        ("[handlers.kata-runtime.limits.flush]\nbytes_per_second = 1", "kata-runtime.limits.flush: bytes_"),
        ("[handlers.kata-runtime.limits.console]\noperations_burst = 1", "limits.console: operations_"),
        (
            "[[handlers.kata-runtime.hooks.poststop]]\npath = 'x'",
            "kata-runtime.hooks: path `x` is not absolute",
        ),
        ("[[handlers.runc.hooks.poststop]]\npath = 'x'", "handlers.runc.hooks: path `x` is not absolute"),
        ("default_handler = 'none'", "default_handler `none`"),
        ("[streaming]\naddress = '0.0.0.0:1'", "streaming.address"),
        ("handlers = 3", "handlers is a table, not integer"),
        ("[[handlers]]\nkind = 'vm'", "handlers is a table, not array"),
        ("[handlers]\nrunc = 'x'", "handlers.runc is a table, not string"),
    ] {
        let told = refusal(text);
        assert!(told.contains(name), "{told}");
    }
}

#[test]
fn a_wrong_key_or_type_is_shown_with_its_line() {
    for (text, line, name) in [
        ("sokcet = 'x'", 1, "unknown field `sokcet`"),
        ("state_dir = 1", 1, "string"),
        ("\n[handlers.kata-runtime]\nvcpus = 1\nkernl = 'x'", 4, "unknown field `kernl`"),
        ("[handlers.runc]\nrunk = 'x'", 2, "unknown field `runk`"),
        ("[handlers.runc]\n\nkind = 'jail'", 3, "unknown variant `jail`"),
        ("[handlers.runc]\nenabled = 'no'", 2, "expected a boolean"),
        ("[handlers.kata-runtime]\nvcpus = 'two'", 2, "expected u8"),
        ("[handlers.kata-runtime]\nmemory_mib = -1", 2, "-1"),
        ("[handlers.kata-runtime.limits.disk]\nbytes = 1", 2, "unknown field `bytes`"),
        ("[[handlers.kata-runtime.hooks.sometime]]\npath = '/x'", 1, "unknown field `sometime`"),
        ("[[handlers.runc.hooks.poststop]]\nargs = []", 1, "missing field `path`"),
        ("[handlers.runc\n", 1, ""),
    ] {
        let told = refusal(text);
        assert!(told.contains(&format!("line {line},")) && told.contains(name), "{text}: {told}");
    }
}

#[test]
fn the_configuration_is_shown_as_clients_of_other_runtimes_expect_it() {
    let config = load(
        "state_dir = '/srv/husk'\n[network]\nconf_dir = '/srv/net.d'\n[handlers.kata-runtime]\nimage_slots = 3\n\
         [handlers.other]\nkind = 'host'",
    )
    .unwrap();
    let shown = serde_json::to_value(&config).unwrap();
    assert_eq!(shown["stateDir"], "/srv/husk");
    assert_eq!(shown["network"]["confDir"], "/srv/net.d");
    let handlers = &shown["handlers"];
    assert_eq!((&handlers["runc"]["kind"], &handlers["other"]["kind"]), (&"host".into(), &"host".into()));
    assert_eq!((&handlers["runc"]["runc"], &handlers["runc"]["kernel"]), (&"runc".into(), &().into()));
    let vm = &handlers["kata-runtime"];
    assert_eq!((&vm["kind"], &vm["imageSlots"], &vm["memoryMib"]), (&"vm".into(), &3.into(), &256.into()));
    assert_eq!(vm["runc"], serde_json::Value::Null);
}

#[test]
fn no_file_is_no_error() {
    assert!(Config::load(Path::new("/nonexistent/husk.toml")).is_ok());
}
