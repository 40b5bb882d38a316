"""A node with Husk on it: daemon, CNI, a registry with the test images, and crictl to drive it.

Run inside a KVM host (see kvm-host). Everything is below one directory of the node's own, so that it can be
told afterwards whether anything was left.
"""

import functools
import json
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

SUPPORT = Path(__file__).resolve().parent
REPO = SUPPORT.parent.parent
EXAMPLES = REPO / "docs/examples"
CACHE = Path(os.environ.get("HUSK_CACHE") or Path.home() / ".cache/husk")
CNI_PLUGINS = ("bridge", "host-local", "portmap", "loopback", "firewall", "tuning", "bandwidth")


class Failed(Exception):
    """A step of the node's set-up, or a command on it, failed."""


def wait_until(ready, seconds, what, process=None):
    """Calls `ready` until it returns something true."""
    deadline = time.monotonic() + seconds
    while not (answer := ready()):
        if process and process.poll() is not None:
            raise Failed(f"{what}: the process ended with status {process.returncode}")
        if time.monotonic() > deadline:
            raise Failed(f"{what}: not within {seconds} s")
        time.sleep(0.1)
    return answer


def can_connect(address):
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    with socket.socket(family) as attempt:
        attempt.settimeout(2)
        try:
            attempt.connect(address)
            return True
        except OSError:
            return False


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


class Node:
    """A node; `endpoint` is the socket of another, running CRI runtime to drive in Husk's place."""

    def __init__(self, name, endpoint=None, handler="kata-runtime"):
        self.in_vm = os.environ.get("HUSK_IN_KVM_HOST") == "vm"
        self.root = Path("/run") / f"husk-{name}"
        self.state = Path("/var/lib") / f"husk-{name}"
        self.bridge = f"husk-{name}"[:15]
        self.handler = handler
        self.endpoint = endpoint or f"unix://{self.root}/husk.sock"
        self.own_daemon = endpoint is None
        self.crictl_program = shutil.which("crictl")
        # Text to add to the daemon's configuration file, TOML.
        self.extra_configuration = ""
        self.handler_settings = ""
        # Whether pods can talk to servers beyond the node: iptables takes its time.
        self.masquerade = True
        self.processes = []
        self.daemon = None

    # --- Setting up ---------------------------------------------------------------------------------

    def start(self):
        if self.own_daemon and (self.root.exists() or self.state.exists()):
            raise Failed(f"{self.root} or {self.state} is left of an earlier run: remove it first")
        self.root.mkdir(mode=0o711, exist_ok=not self.own_daemon)
        self.make_state()
        self.prefix = self.stage()
        self.start_registry()
        self.write_cni_configuration()
        if self.own_daemon:
            self.start_daemon()
        self.write_crictl_configuration()

    def make_state(self):
        """Makes the directory of Husk's state."""
        self.state.mkdir(mode=0o711, exist_ok=not self.own_daemon)
        if self.in_vm:
            # The root file system of a KVM host VM is an overlay, and slow to run programs from. Two nodes, one of
            # them full, have to fit into its memory.
            subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=0711,size=3G", "husk-node", self.state], check=True)

    def remove_state(self):
        subprocess.run(["umount", "--quiet", self.state], capture_output=True)
        shutil.rmtree(self.state, ignore_errors=True)

    def stage(self):
        """Puts programs that run often on fast storage; returns the prefix that huskd is installed under."""
        built = Path(os.environ.get("HUSK_PREFIX", REPO / "target" / "dist"))
        if self.own_daemon and not (built / "bin" / "huskd").exists():
            raise Failed(f"{built} has no huskd: run `make build`")
        self.plugins = next((d for d in map(Path, ("/opt/cni/bin", "/usr/lib/cni")) if (d / "bridge").exists()), None)
        if not self.plugins or not self.crictl_program:
            raise Failed("CNI plugins or crictl are missing: run `make deps`")
        if not self.in_vm:
            return built
        fast = self.root / "node"
        if self.own_daemon:
            shutil.copytree(built, fast)
        (fast / "bin").mkdir(parents=True, exist_ok=True)
        self.crictl_program = shutil.copy(self.crictl_program, fast / "bin/crictl")
        (fast / "cni").mkdir()
        for plugin in CNI_PLUGINS:
            shutil.copy(self.plugins / plugin, fast / "cni")
        self.plugins = fast / "cni"
        return fast

    def run_in_background(self, name, command):
        with open(self.root / f"{name}.log", "ab") as log:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.processes.append(process)
        return process

    def start_registry(self):
        images = subprocess.run(["python3", SUPPORT / "images/build"], stdout=subprocess.PIPE, text=True, check=True)
        self.images = Path(images.stdout.strip())
        port = free_port()
        self.registry = f"127.0.0.1:{port}"
        serve = self.run_in_background("registry", [SUPPORT / "images/serve", self.images / "registry", self.registry])
        wait_until(lambda: can_connect(("127.0.0.1", port)), 60, "start the registry", serve)

    def image(self, name):
        return f"{self.registry}/husk/{name}:1"

    def write_cni_configuration(self):
        configuration = {
            "cniVersion": "1.0.0",
            "name": "husk",
            "plugins": [
                {
                    "type": "bridge",
                    "bridge": self.bridge,
                    "isGateway": True,
                    "ipMasq": self.masquerade,
                    "hairpinMode": True,
                    "ipam": {
                        "type": "host-local",
                        "dataDir": f"{self.root}/leases",
                        "ranges": [[{"subnet": "10.88.0.0/16"}]],
                        "routes": [{"dst": "0.0.0.0/0"}],
                    },
                },
                {"type": "portmap", "capabilities": {"portMappings": True}},
            ],
        }
        self.cni = self.root / "net.d"
        self.cni.mkdir(exist_ok=True)
        (self.cni / "10-husk.conflist").write_text(json.dumps(configuration, indent=2))

    def configure(self, extra, handler):
        """Makes the daemon run with these settings; its state stays."""
        if (extra, handler) == (self.extra_configuration, self.handler_settings) and self.daemon.poll() is None:
            return
        self.extra_configuration, self.handler_settings = extra, handler
        self.end(self.daemon)
        self.start_daemon()

    def start_daemon(self):
        self.config = self.root / "config.toml"
        self.config.write_text(
            f"socket = '{self.root}/husk.sock'\n"
            f"state_dir = '{self.state}'\n"
            f"run_dir = '{self.root}/run'\n"
            f"[cdi]\ndirs = ['{self.root}/cdi']\n"
            f"[network]\nconf_dir = '{self.cni}'\nbin_dirs = ['{self.plugins}']\n"
            # Software emulation is 15 to 30 times slower than hardware.
            "[handlers.kata-runtime]\nboot_timeout_seconds = 180\nagent_timeout_seconds = 180\n"
            f"{self.handler_settings}\n"
            "[handlers.runc]\nagent_timeout_seconds = 180\n"
            f"{self.extra_configuration}\n"
        )
        self.daemon = self.run_in_background("huskd", [self.prefix / "bin/huskd", "--config", self.config])
        wait_until(lambda: can_connect(f"{self.root}/husk.sock"), 60, "start huskd", self.daemon)

    def write_crictl_configuration(self):
        """Writes crictl's configuration: the example's, with this node's socket, and more time for an emulated
        machine."""
        text = (EXAMPLES / "crictl.yaml").read_text().replace("unix:///run/husk/husk.sock", self.endpoint)
        (self.root / "crictl.yaml").write_text(text.replace("timeout: 60", "timeout: 240"))

    # --- Driving it ---------------------------------------------------------------------------------

    def crictl(self, *arguments, check=True):
        """Runs crictl; returns its output without the last newline, or with `check=False` the whole result."""
        command = [self.crictl_program, "--config", str(self.root / "crictl.yaml"), *map(str, arguments)]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600)
        if not check:
            return done
        if done.returncode != 0:
            raise Failed(f"crictl {' '.join(map(str, arguments))}: {(done.stderr or done.stdout).strip()}")
        return done.stdout.rstrip("\n")

    @functools.cached_property
    def cri(self):
        """Connects to Husk's CRI socket without crictl, in the Python that tests run in."""
        from cri import Cri

        return Cri(f"{self.root}/husk.sock")

    def exec(self, container, *command):
        """Runs a command in a container; returns its output without the last newline."""
        status, printed = self.cri.exec(container, *command)
        if status != 0:
            raise Failed(f"{' '.join(map(str, command))}: exit code {status}: {printed}")
        return printed

    def crictl_json(self, verb, *arguments):
        return json.loads(self.crictl(verb, "-o", "json", *arguments))

    def sandbox_file(self, name, **settings):
        """Writes a PodSandboxConfig for `crictl runp`; returns its path."""
        logs = self.root / "logs" / name
        logs.mkdir(parents=True, exist_ok=True)
        config = {
            "metadata": {"name": name, "namespace": "default", "uid": f"uid-of-{name}", "attempt": 0},
            "hostname": name,
            "log_directory": str(logs),
            "labels": {"app": name},
            "linux": {},
            **settings,
        }
        return self.write_json(f"sandbox-{name}.json", config)

    def container_file(self, name, image, **settings):
        """Writes a ContainerConfig for `crictl create`; returns its path."""
        config = {
            "metadata": {"name": name, "attempt": 0},
            "image": {"image": self.image(image)},
            "log_path": f"{name}.log",
            "linux": {},
            **settings,
        }
        return self.write_json(f"container-{name}.json", config)

    def write_json(self, name, value):
        (self.root / name).write_text(json.dumps(value, indent=2))
        return self.root / name

    # --- Ending -------------------------------------------------------------------------------------

    def end(self, process):
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def stop(self):
        for process in reversed(self.processes):
            self.end(process)
        subprocess.run(["ip", "link", "delete", self.bridge], capture_output=True)
        self.remove_state()
        shutil.rmtree(self.root, ignore_errors=True)

    def log_tail(self, name, lines=30):
        try:
            return (self.root / f"{name}.log").read_text(errors="replace").splitlines()[-lines:]
        except FileNotFoundError:
            return []
