"""The base of the tests: a node, and helpers for pods and containers."""

import atexit
import functools
import json
import os
import select
import shutil
import signal
import subprocess
import time
import unittest

import leftovers
from leftovers import machines, named
from node import Failed, Node, can_connect, wait_until


@functools.cache
def the_node():
    """The node of all tests of this process, as long as each leaves it empty: under emulation it takes half a minute
    to set up."""
    node = Node(os.environ.get("HUSK_TEST_NODE", "test"))
    node.masquerade = False
    atexit.register(node.stop)
    node.start()
    node.crictl("pull", node.image("busybox"))
    return node


class PodTest(unittest.TestCase):
    """Tests on a node with settings of their own, which is empty again after each of them."""

    settings = ""
    handler_settings = ""
    handler = "kata-runtime"

    @classmethod
    def setUpClass(cls):
        cls.node = the_node()
        cls.node.configure(cls.settings, cls.handler_settings)
        shutil.rmtree(cls.node.root / "logs", ignore_errors=True)
        cls.count = 0

    def setUp(self):
        self.places = [self.node.root / "run", self.node.state / "sandboxes", self.node.root / "leases"]

    def tearDown(self):
        """Removes all pods, with everything that belongs to them, whatever the test did."""
        node = self.node
        for pod in node.cri.pods():
            node.cri.remove_pod(pod)
        self.assertEqual(node.cri.containers(), [])
        self.assert_nothing_left()

    def assert_nothing_left(self):
        """Checks that there is no machine, network namespace, record or control group of a pod."""
        node = self.node

        def remains():
            left = [str(path) for folder in ("run/sandboxes",) for path in (node.root / folder).iterdir()]
            left += [str(path) for path in (node.state / "sandboxes").iterdir()]
            left += [name for name in os.listdir("/run/netns") if name.startswith("husk")] if os.path.isdir("/run/netns") else []
            left += [str(path) for path in leases(node)]
            left += [f"machine {process}" for process in machines()]
            left += [f"husk-agent {process}" for process in named("husk-agent")]
            left += sorted(leftovers.block_devices([node.root, node.state]))
            return left

        deadline = time.monotonic() + 10
        while (left := remains()) and time.monotonic() < deadline:
            time.sleep(0.2)
        self.assertEqual(left, [])

    # --- Helpers -------------------------------------------------------------------------------------

    def pod(self, name=None, **settings):
        if name is None:
            type(self).count += 1
            name = f"pod{self.count}"
        config = self.node.sandbox_file(name, **settings)
        return self.node.cri.run_pod(config, self.handler), config

    def container(self, pod, sandbox, name="main", image="busybox", start=True, **settings):
        settings.setdefault("command", ["sleep", "3600"])
        config = self.node.container_file(name, image, **settings)
        container = self.node.cri.create(pod, config, sandbox)
        if start:
            self.node.cri.start(container)
        return container

    def running(self, **settings):
        pod, sandbox = self.pod()
        return pod, self.container(pod, sandbox, **settings)

    def status(self, container):
        return self.node.cri.status(container)

    def wait_exited(self, container, seconds=60):
        def exited():
            status = self.status(container)
            return status if status["state"] == "CONTAINER_EXITED" else None

        return wait_until(exited, seconds, f"wait for {container[:13]} to exit")

    def kill_daemon(self):
        self.node.daemon.send_signal(signal.SIGKILL)
        self.node.daemon.wait()

    def speak_while_huskd_dies(self, lines=60_000, deaths=4):
        """A container prints numbered lines while huskd is killed and its log is rotated: each is there once, in order."""
        count = f"i=0; while [ $i -lt {lines} ]; do echo line $i; i=$((i+1)); done"
        _, container = self.running(command=["sh", "-c", count])
        path = self.status(container)["logPath"]
        logs = []
        for death in range(deaths):
            time.sleep(0.5 + death / 7)
            self.kill_daemon()
            self.node.start_daemon()
            if death == 1:
                logs.append(path + ".20260101-000000")
                os.rename(path, logs[0])
                self.node.crictl("logs", "--reopen", "--tail", "1", container)
        self.assertEqual(self.wait_exited(container, 300)["exitCode"], 0)
        said = [line.rstrip("\n").split(" ", 3)[1:] for log in [*logs, path] for line in open(log)]
        expected = [["stdout", "F", f"line {number}"] for number in range(lines)]
        wrong = next(((is_, want) for is_, want in zip(said, expected) if is_ != want), None)
        self.assertEqual((len(said), wrong), (lines, None))

    def read_until(self, stream, text, seconds=60):
        """Returns the output of a process, up to `text`."""
        seen, deadline = b"", time.monotonic() + seconds
        while text not in seen:
            left = deadline - time.monotonic()
            self.assertGreater(left, 0, f"{text} is not in {seen}")
            if select.select([stream], [], [], left)[0]:
                piece = os.read(stream.fileno() if hasattr(stream, "fileno") else stream, 65536)
                self.assertTrue(piece, f"{text} is not in {seen}, which is all")
                seen += piece
        return seen

    def in_background(self, *arguments):
        """crictl, which is killed at the end of the test if it still runs."""
        command = [self.node.crictl_program, "--config", str(self.node.root / "crictl.yaml"), *arguments]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        return process

    def exec_fails(self, container, *command):
        """Runs a command in a container, which must fail; returns its output."""
        try:
            status, printed = self.node.cri.exec(container, *command)
        except Failed as failure:
            return str(failure)
        self.assertNotEqual(status, 0, printed)
        return printed

    def fails(self, *arguments):
        """Runs crictl, which must fail; returns its error message."""
        done = self.node.crictl(*arguments, check=False)
        self.assertNotEqual(done.returncode, 0, done.stdout)
        return done.stdout + done.stderr


class SharedPodTest(PodTest):
    """Tests that only look at what containers are and do: those that ask for nothing of their pod share one.

    It takes seconds to start under emulation, and lives as long as the class. Containers go after each test, and so do
    other pods.
    """

    shared = None

    def pod(self, name=None, **settings):
        cls = type(self)
        if name or settings:
            return super().pod(name, **settings)
        if not cls.shared:
            cls.shared = super().pod("shared")
        return cls.shared

    def tearDown(self):
        cri, cls = self.node.cri, type(self)
        if cls.shared and cls.shared[0] not in cri.ready_pods():
            # This test has ended it: the next one has a new one.
            cls.shared = None
        kept = cls.shared[0] if cls.shared else None
        for pod in cri.pods():
            if pod != kept:
                cri.remove_pod(pod)
        for container in cri.containers():
            cri.remove(container)
        # Another container of that name writes a log of its own.
        for log in (self.node.root / "logs/shared").glob("*.log"):
            log.unlink()
        self.assertEqual((cri.pods(), cri.containers()), ([kept] if kept else [], []))

    @classmethod
    def tearDownClass(cls):
        if cls.shared:
            cls.node.cri.remove_pod(cls.shared[0])
            cls.shared = None
        cls().assert_nothing_left()


# User ids of a pod that differ from those of its node, and volumes that are mapped to them, as the kubelet requests.
IDS = [{"host_id": 100000, "container_id": 0, "length": 65536}]
USER_NAMESPACE = {"security_context": {"namespace_options": {"userns_options": {"mode": 0, "uids": IDS, "gids": IDS}}}}
MAPPED = {"uidMappings": IDS, "gidMappings": IDS}


class MappedVolumes:
    """Checks of volumes with mapped ids, for tests of any handler."""

    def check_mapped_volume(self, folder):
        """Checks that files of `folder` have their owners in the container, and other ones without mappings."""
        folder.chmod(0o777)
        for name, owner in (("own", 0), ("users", 1234), ("beyond", 70000)):
            (folder / name).write_text(f"of {name}\n")
            (folder / name).chmod(0o600)
            os.chown(folder / name, owner, owner)
        pod, sandbox = self.pod(linux=USER_NAMESPACE)
        plain = {"host_path": str(folder)}
        mounts = [
            {"container_path": "/plain", **plain},
            {"container_path": "/data", **plain, **MAPPED},
            {"container_path": "/read", **plain, **MAPPED, "readonly": True},
            {"container_path": "/file", "host_path": str(folder / "own"), **MAPPED},
        ]
        container = self.container(pod, sandbox, mounts=mounts, linux=USER_NAMESPACE)

        def sh(script):
            return self.node.exec(container, "sh", "-c", script)

        seen = sh("stat -c %u:%g /data/own /data/users /data/beyond /file /plain/own /plain/users").split()
        stranger = "65534:65534"
        self.assertEqual(seen, ["0:0", "1234:1234", stranger, "0:0", stranger, stranger])
        self.assertEqual(sh("cat /data/own /data/users /file /read/own").split("\n"), ["of own", "of users", "of own", "of own"])
        for path in ("/data/beyond", "/plain/own"):
            self.assertIn("ermission denied", self.exec_fails(container, "cat", path), path)
        self.assertIn("ead-only", self.exec_fails(container, "touch", "/read/new"))

        sh("cd /data && echo hi >made && chown 33:44 made && chmod 4750 made && mkdir dir && mv made dir && ln -s x dir/link && mkfifo dir/pipe")
        sh("cd /data && echo more >>users && chown 5:6 users && touch -d @1000 own && echo of a stranger >/plain/strangers")
        owners = {name: (found.st_uid, found.st_gid) for name in ("dir", "dir/made", "dir/link", "dir/pipe", "users", "strangers") for found in [(folder / name).lstat()]}
        self.assertEqual(owners, {
            "dir": (0, 0), "dir/made": (33, 44), "dir/link": (0, 0), "dir/pipe": (0, 0), "users": (5, 6), "strangers": (100000, 100000),
        })
        self.assertEqual((folder / "users").read_text(), "of users\nmore\n")
        self.assertEqual(((folder / "own").stat().st_mtime, (folder / "dir/made").stat().st_mode & 0o7777), (1000, 0o4750))
        user = {"run_as_user": {"value": 1000}, "run_as_group": {"value": 2000}}
        linux = {"security_context": {**USER_NAMESPACE["security_context"], **user}}
        other = self.container(pod, sandbox, "other", mounts=mounts, linux=linux)
        self.node.exec(other, "sh", "-c", "echo hi >/data/users-own && mkdir /data/users-dir")
        for name in ("users-own", "users-dir"):
            found = (folder / name).stat()
            self.assertEqual((found.st_uid, found.st_gid), (1000, 2000), name)
        self.assertIn("ermission denied", self.exec_fails(other, "cat", "/data/own"))

        others = [{**IDS[0], "host_id": 200000}]
        for settings in ({"uidMappings": others, "gidMappings": others}, {"uidMappings": IDS}, {"uidMappings": IDS * 2, "gidMappings": IDS * 2}):
            bad = self.node.container_file("bad", "busybox", linux=USER_NAMESPACE, mounts=[{"container_path": "/data", **plain, **settings}])
            self.assertIn("userns_options", self.fails("create", pod, bad, sandbox))
        pod, sandbox = self.pod()
        bad = self.node.container_file("bad", "busybox", mounts=[{"container_path": "/data", **plain, **MAPPED}])
        self.assertIn("userns_options", self.fails("create", pod, bad, sandbox))


def leases(node):
    """Addresses that CNI's IPAM has given out."""
    folder = node.root / "leases" / "husk"
    addresses = [path for pattern in ("10.*", "fd*") for path in folder.glob(pattern)]
    return addresses if folder.exists() else []


__all__ = [
    "MAPPED", "USER_NAMESPACE", "Failed", "MappedVolumes", "PodTest", "can_connect", "json", "leases", "leftovers", "machines", "named", "os", "signal", "subprocess",
    "time", "wait_until",
]
