"""Things that a pod could leave behind on a node: snapshots before and after it must be equal."""

import os
import re
import subprocess
from pathlib import Path

# Things that are set up once for all pods and stay, by the design of their programs: the bridge plugin's bridge,
# host-local's lock and notebook, portmap's three chains and the tables they are in, the directory of named network
# namespaces.
BRIDGE_OF_ALL = re.compile(r"^husk-\w+$")
LEASE_FILES = re.compile(r"/leases/\w+(/lock|/last_reserved_ip\.\d+)?$")
STANDING_RULES = re.compile(r"^:[A-Z]+ ACCEPT|^:CNI-HOSTPORT-\w+ |-j CNI-HOSTPORT-|^-A CNI-HOSTPORT-(MASQ|SETMARK) ")
STANDING_MOUNTS = {"/run/netns"}
# A machine that is to become a template belongs to no pod, and ends by itself. Templates are for later pods.
TEMPLATE = re.compile(r"husk-vmm --id template-")
TEMPLATE_FILES = re.compile(r"/templates(/|$)")


def running():
    """Returns all processes: id, parent's id, name, and command line, which is empty once the process has ended."""
    for place in Path("/proc").iterdir():
        if not place.name.isdigit():
            continue
        try:
            before, _, after = (place / "stat").read_text().rpartition(")")
            command = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:
            continue  # it ended while we looked
        yield int(place.name), int(after.split()[1]), before.partition("(")[2], command


def processes():
    found = set()
    for process, parent, _, command in running():
        # Threads of the kernel come and go at any time.
        if command and parent != 2 and process != os.getpid() and not TEMPLATE.search(command):
            found.add(f"{process} {command[:100]}")
    return found


def named(name):
    """Returns the processes of that name, including zombies."""
    return [process for process, _, own, _ in running() if own == name]


def machines():
    """The processes of pods' machines."""
    return [process for process, _, own, command in running() if own == "husk-vmm" and not TEMPLATE.search(command)]


def network_devices():
    return {name for name in os.listdir("/sys/class/net") if not BRIDGE_OF_ALL.match(name)}


def network_namespaces():
    """Returns the network namespaces that have a process, and those that a mount keeps."""
    found = set()
    for place in Path("/proc").glob("[0-9]*/ns/net"):
        try:
            found.add(os.readlink(place))
        except OSError:
            continue
    for directory in ("/run/netns", "/var/run/netns"):
        if os.path.isdir(directory):
            found.update(f"{os.path.realpath(directory)}/{name}" for name in os.listdir(directory))
    return found


def mounts():
    with open("/proc/self/mountinfo", encoding="utf-8") as lines:
        return {line.split()[4] for line in lines} - STANDING_MOUNTS


def block_devices(below):
    """Returns loop devices with a file in one of these directories behind them, and device-mapper's."""
    found = {str(place.parent) for place in Path("/sys/block").glob("dm-*/dm")}
    for file in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            if file.read_text().startswith(tuple(f"{directory}/" for directory in below)):
                found.add(str(file.parent.parent))
        except OSError:
            continue  # it was let go while we looked
    return found


def cgroups():
    return {directory for directory, _, _ in os.walk("/sys/fs/cgroup")}


def rules():
    """Returns iptables' rules and chains, of both families and backends."""
    found = set()
    for program in ("iptables-save", "ip6tables-save"):
        try:
            printed = subprocess.run([program], capture_output=True, text=True, timeout=60).stdout
        except FileNotFoundError:
            continue
        for line in printed.splitlines():
            line = re.sub(r" *\[\d+:\d+\]$", "", line)
            if line[:1] in (":", "-") and not STANDING_RULES.search(line):
                found.add(line)
    return found


def files(places):
    found = set()
    for place in places:
        for directory, inner, names in os.walk(place):
            found.update(os.path.join(directory, name) for name in inner + names)
    return {path for path in found if not LEASE_FILES.search(path) and not TEMPLATE_FILES.search(path)}


KINDS = {
    "processes": processes,
    "network devices": network_devices,
    "network namespaces": network_namespaces,
    "mounts": mounts,
    "cgroups": cgroups,
    "packet filter rules": rules,
}


def snapshot(places, disks_below=("",)):
    """Returns everything of every kind; `places` are the directories whose files count."""
    taken = {kind: look() for kind, look in KINDS.items()}
    taken["block devices"] = block_devices(disks_below)
    taken["files"] = files(places)
    return taken


def difference(before, after):
    """Returns the things that are there now and were not before: {kind: [names]}, with every kind present."""
    return {kind: sorted(after[kind] - before[kind]) for kind in before}
