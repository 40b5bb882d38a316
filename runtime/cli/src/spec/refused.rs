//! Flags of docker's that Husk does not have, with the reason for each.

/// Flags, each with the reason for which it is refused.
const REFUSED: [(&str, &str); 24] = [
    ("--blkio-weight", "CRI has no weight of disks"),
    ("--cgroupns", "every container has a cgroup namespace of its own"),
    ("--cpuset-mems", "a VM has one memory node"),
    ("--gpus", "give the device its name of CDI: --device vendor.com/class=name"),
    ("--health-cmd", "huskd does not run health checks yet"),
    ("--health-interval", "huskd does not run health checks yet"),
    ("--init", "CRI cannot ask for an init process in front of the container's own, and Husk has none yet"),
    ("--ip", "CNI's configuration chooses the address"),
    ("--ip6", "CNI's configuration chooses the address"),
    ("--link", "containers of one pod reach each other on localhost: use --pod"),
    ("--log-driver", "every container has a log as CRI has it: `husk logs` reads it"),
    ("--log-opt", "every container has a log as CRI has it: `husk logs` reads it"),
    ("--mac-address", "CNI's plugins choose the address"),
    ("--network-alias", "CNI has no names of containers yet"),
    ("--oom-kill-disable", "the kernel has no such limit in cgroup v2"),
    ("--restart", "huskd does not start containers again by itself yet"),
    ("--rootfs", "containers are made of images alone"),
    ("--shm-size", "CRI cannot say it; /dev/shm may take half of the VM's memory"),
    ("--storage-opt", "the writable layer has no limit of its own"),
    ("--tmpfs", "CRI has no tmpfs in a container, and Husk does not add one yet"),
    ("--ulimit", "CRI cannot say it; a container may open 1,048,576 files"),
    ("--uts", "the host name is the pod's"),
    ("--volume-driver", "Husk has no volumes with names yet"),
    ("--volumes-from", "containers of one pod can mount the same path of the host"),
];

/// The error for words that begin with a flag instead of an image; nothing if they do not.
pub fn no_image(words: &[String]) -> Option<String> {
    let first = words.first().filter(|first| first.starts_with('-'))?;
    let flag = first.split('=').next().unwrap_or(first);
    let known = REFUSED.iter().find(|(refused, _)| *refused == flag);
    Some(match known {
        Some((flag, why)) => format!("{flag} is not possible: {why}"),
        None => format!("unknown flag {flag}: `--help` lists those that there are"),
    })
}
