//! One volume: `-v` and `--mount`.

use std::path::Path;

use anyhow::{Context, bail};
use husk_proto::cri::{self, MountPropagation};

/// Options of a mount that are passed on as they are.
const PASSED: [&str; 8] =
    ["noexec", "nosuid", "nodev", "noatime", "nodiratime", "relatime", "strictatime", "nosymfollow"];

/// Reads `HOST_PATH:PATH[:OPTIONS]`.
pub fn volume(given: &str) -> anyhow::Result<cri::Mount> {
    let mut parts = given.splitn(3, ':');
    let (Some(host), Some(inside)) = (parts.next(), parts.next()) else {
        bail!(
            "-v {given}: write HOST_PATH:PATH. A volume without a name of its own is not made yet; each directory that \
             an image declares as a volume is one anyway"
        );
    };
    if !host.starts_with(['/', '.', '~']) {
        bail!(
            "-v {given}: `{host}` would be a volume with a name, which Husk does not have yet: write /{host} or ./{host}"
        );
    }
    let mut mount = bind(host, inside)?;
    for option in parts.next().unwrap_or_default().split(',').filter(|option| !option.is_empty()) {
        set_option(&mut mount, option).with_context(|| format!("-v {given}"))?;
    }
    Ok(mount)
}

/// Reads `type=bind,src=HOST_PATH,dst=PATH[,readonly]`, or `type=image,src=IMAGE,dst=PATH`.
pub fn mount(given: &str) -> anyhow::Result<cri::Mount> {
    let (mut kind, mut source, mut target, mut subpath) = ("volume", "", "", "");
    let mut options = Vec::new();
    for part in given.split(',') {
        let (key, value) = part.split_once('=').unwrap_or((part, "true"));
        match key {
            "type" => kind = value,
            "src" | "source" => source = value,
            "dst" | "target" | "destination" => target = value,
            "image-subpath" => subpath = value,
            "readonly" | "ro" if value == "true" || value == "1" => options.push("ro"),
            "readonly" | "ro" => {}
            "bind-propagation" => options.push(value),
            _ => bail!("--mount {given}: `{key}` is not known"),
        }
    }
    let mut mount = match kind {
        "bind" => bind(source, target)?,
        "image" => cri::Mount {
            container_path: absolute(target)?,
            readonly: true,
            image: Some(cri::ImageSpec { image: source.to_owned(), ..Default::default() }),
            image_sub_path: subpath.to_owned(),
            ..Default::default()
        },
        "tmpfs" => bail!("--mount {given}: CRI has no tmpfs in a container, and Husk does not add one yet"),
        "volume" => {
            bail!("--mount {given}: Husk has no volumes with names yet: write type=bind,src=HOST_PATH")
        }
        other => bail!("--mount {given}: `{other}` is no type: there are bind and image"),
    };
    for option in options {
        set_option(&mut mount, option).with_context(|| format!("--mount {given}"))?;
    }
    Ok(mount)
}

fn bind(host: &str, inside: &str) -> anyhow::Result<cri::Mount> {
    if host.is_empty() {
        bail!("a volume needs a path of the host");
    }
    let host = std::path::absolute(host).with_context(|| format!("`{host}` is no path of the host"))?;
    Ok(cri::Mount { container_path: absolute(inside)?, host_path: text(&host)?, ..Default::default() })
}

fn text(path: &Path) -> anyhow::Result<String> {
    Ok(path.to_str().with_context(|| format!("{} is not UTF-8, which CRI needs", path.display()))?.to_owned())
}

fn absolute(inside: &str) -> anyhow::Result<String> {
    if !Path::new(inside).is_absolute() {
        bail!("`{inside}`: a path in a container begins with /");
    }
    Ok(inside.to_owned())
}

fn set_option(mount: &mut cri::Mount, option: &str) -> anyhow::Result<()> {
    match option {
        "rw" => mount.readonly = false,
        "ro" => mount.readonly = true,
        // These are for SELinux, which guests do not have: nothing keeps them from the files.
        "z" | "Z" => mount.selinux_relabel = true,
        "private" | "rprivate" => mount.set_propagation(MountPropagation::PropagationPrivate),
        "slave" | "rslave" => mount.set_propagation(MountPropagation::PropagationHostToContainer),
        "shared" | "rshared" => mount.set_propagation(MountPropagation::PropagationBidirectional),
        option if PASSED.contains(&option) => mount.mount_options.push(option.to_owned()),
        other => bail!("`{other}` is no option of a volume: there are ro, rw, rslave, {}", PASSED.join(", ")),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volumes_are_written_as_for_docker() {
        let one = volume("/data:/mnt:ro,noexec,rslave").unwrap();
        assert_eq!(
            (one.host_path.as_str(), one.container_path.as_str(), one.readonly),
            ("/data", "/mnt", true)
        );
        assert_eq!(one.mount_options, ["noexec"]);
        assert_eq!(one.propagation(), MountPropagation::PropagationHostToContainer);
        assert!(volume("./here:/mnt").unwrap().host_path.starts_with('/'));
        for (given, error) in [
            ("/data", "without a name"),
            ("data:/mnt", "with a name"),
            ("/data:mnt", "begins with /"),
            ("/data:/mnt:fast", "no option"),
        ] {
            assert!(format!("{:#}", volume(given).unwrap_err()).contains(error), "{given}");
        }
    }

    #[test]
    fn mounts_have_types() {
        let one = mount("type=bind,source=/data,target=/mnt,readonly").unwrap();
        assert_eq!(
            (one.host_path.as_str(), one.container_path.as_str(), one.readonly),
            ("/data", "/mnt", true)
        );
        let one = mount("type=image,src=busybox,dst=/mnt,image-subpath=bin").unwrap();
        assert_eq!((one.image.unwrap().image.as_str(), one.image_sub_path.as_str()), ("busybox", "bin"));
        for (given, error) in [
            ("src=/data,dst=/mnt", "no volumes with names"),
            ("type=tmpfs,dst=/mnt", "no tmpfs"),
            ("type=bind,dst=/mnt", "a path of the host"),
            ("type=bind,src=/a,dst=/b,size=3", "`size` is not known"),
        ] {
            assert!(format!("{:#}", mount(given).unwrap_err()).contains(error), "{given}");
        }
    }
}
