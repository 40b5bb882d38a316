#![allow(clippy::indexing_slicing)]

use std::fs;
use std::os::unix::fs::symlink;

use super::*;

/// The files of a kernel, as Linux 6.1 shows them.
struct Host {
    root: tempfile::TempDir,
}

impl Host {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("enabled"), "Y\n").unwrap();
        for folder in ["policy/profiles", "policy/raw_data"] {
            fs::create_dir_all(root.path().join("apparmor").join(folder)).unwrap();
        }
        fs::write(root.path().join("apparmor/.replace"), "").unwrap();
        Self { root }
    }

    fn place(&self, path: &str) -> PathBuf {
        self.root.path().join("apparmor").join(path)
    }

    fn kernel(&self) -> Kernel {
        Kernel::at(self.root.path())
    }

    /// One load of some profiles.
    fn load(&self, folder: u64, revision: u64, content: &[u8], names: &[&str]) {
        let load = self.place(&format!("policy/raw_data/{folder}"));
        fs::create_dir_all(&load).unwrap();
        fs::write(load.join("revision"), format!("{revision}\n")).unwrap();
        fs::write(load.join("raw_data"), content).unwrap();
        for name in names {
            let profile = self.place(&format!("policy/profiles/{}.7", name.replace('/', ".")));
            fs::create_dir_all(&profile).unwrap();
            fs::write(profile.join("name"), format!("{name}\n")).unwrap();
            let link = profile.join("raw_data");
            let _ = fs::remove_file(&link);
            symlink(format!("../../raw_data/{folder}/raw_data"), link).unwrap();
        }
    }

    fn in_machine(&self, name: &str, others: &[&str]) -> Result<Vec<(u64, Vec<u8>)>, Error> {
        let others: Vec<_> = others.iter().map(|other| localhost(other)).collect();
        let got = in_machine(&self.kernel(), &localhost(name), &others)?;
        assert_eq!(got.profile.as_deref(), Some(name));
        let policies = got.for_machine.unwrap().policies;
        Ok(policies.into_iter().map(|policy| (policy.revision, policy.content)).collect())
    }
}

fn secured(security: cri::LinuxContainerSecurityContext) -> cri::ContainerConfig {
    let linux = cri::LinuxContainerConfig { security_context: Some(security), ..Default::default() };
    cri::ContainerConfig { linux: Some(linux), ..Default::default() }
}

fn field(kind: ProfileType, name: &str) -> Option<cri::SecurityProfile> {
    Some(cri::SecurityProfile { profile_type: kind as i32, localhost_ref: name.into() })
}

fn localhost(name: &str) -> cri::ContainerConfig {
    let apparmor = field(ProfileType::Localhost, name);
    secured(cri::LinuxContainerSecurityContext { apparmor, ..Default::default() })
}

#[allow(deprecated)]
fn old(word: &str) -> cri::LinuxContainerSecurityContext {
    cri::LinuxContainerSecurityContext { apparmor_profile: word.into(), ..Default::default() }
}

#[test]
fn the_new_field_wins_and_both_know_a_name_with_its_prefix() {
    let named = |name: &str| Asked::Localhost(name.to_owned());
    let is = |security| asked(&secured(security)).unwrap();
    assert_eq!(asked(&cri::ContainerConfig::default()).unwrap(), Asked::Unsaid);
    assert_eq!((is(old("")), is(old("unconfined"))), (Asked::Unsaid, Asked::Unconfined));
    assert_eq!((is(old("runtime/default")), is(old("localhost/a"))), (Asked::Default, named("a")));
    for name in ["b", "localhost/b"] {
        let apparmor = field(ProfileType::Localhost, name);
        assert_eq!(is(cri::LinuxContainerSecurityContext { apparmor, ..old("localhost/a") }), named("b"));
    }
    let apparmor = field(ProfileType::Unconfined, "");
    assert_eq!(
        is(cri::LinuxContainerSecurityContext { apparmor, ..old("runtime/default") }),
        Asked::Unconfined
    );
    for word in ["a", "docker/a", "localhost/"] {
        assert!(matches!(asked(&secured(old(word))), Err(Error::Invalid(_))), "{word}");
    }
    let apparmor = Some(cri::SecurityProfile { profile_type: 9, ..Default::default() });
    let unknown = secured(cri::LinuxContainerSecurityContext { apparmor, ..Default::default() });
    assert!(asked(&unknown).unwrap_err().to_string().contains("unknown type 9"));
}

#[test]
fn a_privileged_container_has_the_profile_that_it_names_and_no_default() {
    let privileged = |apparmor| {
        asked(&secured(cri::LinuxContainerSecurityContext {
            privileged: true,
            apparmor,
            ..Default::default()
        }))
    };
    assert_eq!(privileged(None).unwrap(), Asked::Unconfined);
    assert_eq!(privileged(field(ProfileType::RuntimeDefault, "")).unwrap(), Asked::Unconfined);
    assert_eq!(privileged(field(ProfileType::Localhost, "a")).unwrap(), Asked::Localhost("a".into()));
}

#[test]
fn a_machine_gets_the_policy_that_has_the_profile() {
    let host = Host::new();
    host.load(1, 2, b"one", &["one"]);
    host.load(2, 3, b"two", &["a/b c", "two"]);
    assert_eq!(host.in_machine("a/b c", &[]).unwrap(), [(3, b"two".to_vec())]);
    assert_eq!(host.in_machine("one", &[]).unwrap(), [(2, b"one".to_vec())]);
    for name in ["a", "../../raw_data/1", "one\n", "one.7", "..", "Two"] {
        let error = host.in_machine(name, &[]).unwrap_err();
        assert!(matches!(&error, Error::NotLoaded(missing) if missing == name), "{error}");
        assert!(error.to_string().contains("apparmor_parser"));
    }
}

#[test]
fn policy_comes_in_the_order_in_which_the_host_loaded_it() {
    let host = Host::new();
    // Two profiles are loaded together, then one of them is replaced, from a folder with a lower number.
    host.load(7, 8, b"old both", &["a", "b"]);
    host.load(4, 9, b"new a", &["a"]);
    let both = [(8, b"old both".to_vec()), (9, b"new a".to_vec())];
    assert_eq!(host.in_machine("b", &["a"]).unwrap(), both);
    assert_eq!(host.in_machine("a", &["b", "b", "gone"]).unwrap(), both);
    // A policy that is loaded again keeps its folder, and is the latest.
    host.load(7, 10, b"old both", &["a", "b"]);
    assert_eq!(host.in_machine("a", &["b"]).unwrap(), [(10, b"old both".to_vec())]);
}

#[test]
fn what_the_host_does_not_have_or_tell_is_said() {
    let host = Host::new();
    host.load(1, 2, b"policy", &["hidden", "large", "lost"]);
    fs::remove_file(host.place("policy/profiles/hidden.7/raw_data")).unwrap();
    assert!(matches!(host.in_machine("hidden", &[]), Err(Error::NotExported(_))));
    host.load(2, 3, &vec![0; MAX_POLICY as usize], &["large"]);
    assert!(host.in_machine("large", &[]).is_ok());
    assert!(matches!(host.in_machine("large", &["lost"]), Err(Error::TooLarge(_))));
    host.load(2, 3, &vec![0; MAX_POLICY as usize + 1], &["large"]);
    assert!(matches!(host.in_machine("large", &[]), Err(Error::TooLarge(_))));
    fs::remove_file(host.place("policy/raw_data/1/raw_data")).unwrap();
    assert!(matches!(host.in_machine("lost", &[]), Err(Error::Unstable(_))));
    fs::write(host.place("policy/raw_data/2/revision"), "two").unwrap();
    assert!(matches!(host.in_machine("large", &[]), Err(Error::File { .. })));

    fs::remove_dir_all(host.place("policy")).unwrap();
    let error = host.in_machine("large", &[]).unwrap_err();
    assert!(matches!(error, Error::NotMounted { .. }), "{error}");
    for word in ["N\n", ""] {
        fs::write(host.root.path().join("enabled"), word).unwrap();
        assert!(matches!(host.in_machine("large", &[]), Err(Error::Off(_))));
    }
}

#[test]
fn on_the_host_a_profile_is_named_and_must_be_there() {
    let host = Host::new();
    host.load(1, 2, b"policy", &["a"]);
    fs::remove_file(host.place("policy/profiles/a.7/raw_data")).unwrap();
    let got = on_host(&host.kernel(), &localhost("localhost/a"), Path::new("/none")).unwrap();
    assert_eq!((got.profile.as_deref(), got.for_machine), (Some("a"), None));
    let missing = on_host(&host.kernel(), &localhost("b"), Path::new("/none"));
    assert!(matches!(missing, Err(Error::NotLoaded(_))));
}

#[test]
fn the_default_profile_is_loaded_where_it_is_not_yet() {
    let host = Host::new();
    let policy = host.root.path().join("policy");
    fs::write(&policy, "default").unwrap();
    let wanted = secured(old("runtime/default"));
    let profile = || on_host(&host.kernel(), &wanted, &policy).map(|got| got.profile);
    let written = || fs::read(host.place(".replace")).unwrap();

    host.load(3, 4, b"default", &[DEFAULT_PROFILE]);
    assert_eq!(profile().unwrap().as_deref(), Some(DEFAULT_PROFILE));
    assert_eq!(written(), b"", "it is there");
    host.load(3, 5, b"an older one", &[DEFAULT_PROFILE]);
    profile().unwrap();
    assert_eq!(written(), b"default");
    fs::write(host.place(".replace"), "").unwrap();
    fs::remove_dir_all(host.place("policy/profiles/husk-default.7")).unwrap();
    profile().unwrap();
    assert_eq!(written(), b"default");

    fs::remove_file(&policy).unwrap();
    assert!(profile().unwrap_err().to_string().contains(policy.to_str().unwrap()));
    fs::write(host.root.path().join("enabled"), "N").unwrap();
    let error = profile().unwrap_err().to_string();
    assert!(error.contains(DEFAULT_PROFILE) && error.contains("apparmor=1"), "{error}");
}

#[test]
fn who_says_nothing_has_the_default_profile_where_the_host_has_apparmor() {
    let host = Host::new();
    let policy = host.root.path().join("policy");
    fs::write(&policy, "default").unwrap();
    let profile = |config| on_host(&host.kernel(), &config, &policy).map(|got| got.profile);
    let unsaid = cri::ContainerConfig::default;
    assert_eq!(profile(unsaid()).unwrap().as_deref(), Some(DEFAULT_PROFILE));
    assert_eq!(fs::read(host.place(".replace")).unwrap(), b"default");
    assert_eq!(profile(secured(old("unconfined"))).unwrap(), None);

    // huskd does not see the kernel's files: that is an error only for a request with a profile.
    fs::remove_dir_all(host.place("policy")).unwrap();
    assert_eq!(profile(unsaid()).unwrap(), None);
    assert!(matches!(profile(secured(old("runtime/default"))), Err(Error::NotMounted { .. })));
    fs::write(host.root.path().join("enabled"), "N").unwrap();
    assert_eq!(profile(unsaid()).unwrap(), None);
}

#[test]
fn a_machine_has_the_default_profile_of_its_own() {
    let host = Host::new();
    fs::write(host.root.path().join("enabled"), "N").unwrap();
    let got = in_machine(&host.kernel(), &secured(old("runtime/default")), &[]).unwrap();
    assert_eq!(got.profile.as_deref(), Some(DEFAULT_PROFILE));
    assert!(got.for_machine.is_some_and(|it| it.default_profile && !it.unless_off && it.policies.is_empty()));
    let unsaid = in_machine(&host.kernel(), &cri::ContainerConfig::default(), &[]).unwrap();
    assert_eq!(unsaid.profile.as_deref(), Some(DEFAULT_PROFILE));
    assert!(unsaid.for_machine.is_some_and(|it| it.default_profile && it.unless_off));
    let none = in_machine(&host.kernel(), &secured(old("unconfined")), &[]).unwrap();
    assert!(none.profile.is_none() && none.for_machine.is_none());
}
