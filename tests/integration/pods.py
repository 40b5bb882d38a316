"""What the tests share: a node, and words for pods and containers."""

import atexit
import functools
import json
import os
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
    """One for all tests, as long as each leaves it empty: it takes half a minute to make one under emulation."""
    node = Node("test")
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
        """Whatever a test did, its pods go, and with them everything they had."""
        node = self.node
        if not self._outcome.success:
            print("\n".join(f"    huskd: {line}" for line in node.log_tail("huskd", 25)))
        for pod in node.crictl("pods", "-q").split():
            node.crictl("rmp", "-f", pod)
        self.assertEqual(node.crictl("ps", "-aq"), "")
        self.assert_nothing_left()

    def assert_nothing_left(self):
        """No machine, network namespace, record or control group of a pod."""
        node = self.node

        def remains():
            left = [str(path) for folder in ("run/sandboxes",) for path in (node.root / folder).iterdir()]
            left += [str(path) for path in (node.state / "sandboxes").iterdir()]
            left += [name for name in os.listdir("/run/netns") if name.startswith("husk")] if os.path.isdir("/run/netns") else []
            left += [str(path) for path in leases(node)]
            left += [f"machine {process}" for process in machines()]
            left += [f"husk-agent {process}" for process in named("husk-agent")]
            left += sorted(leftovers.block_devices())
            return left

        deadline = time.monotonic() + 10
        while (left := remains()) and time.monotonic() < deadline:
            time.sleep(0.2)
        self.assertEqual(left, [])

    # --- Words ---------------------------------------------------------------------------------------

    def pod(self, name=None, **settings):
        if name is None:
            type(self).count += 1
            name = f"pod{self.count}"
        config = self.node.sandbox_file(name, **settings)
        return self.node.crictl("runp", "--runtime", self.handler, config), config

    def container(self, pod, sandbox, name="main", image="busybox", start=True, **settings):
        settings.setdefault("command", ["sleep", "3600"])
        config = self.node.container_file(name, image, **settings)
        container = self.node.crictl("create", pod, config, sandbox)
        if start:
            self.node.crictl("start", container)
        return container

    def running(self, **settings):
        pod, sandbox = self.pod()
        return pod, self.container(pod, sandbox, **settings)

    def status(self, container):
        return self.node.crictl_json("inspect", container)["status"]

    def wait_exited(self, container, seconds=60):
        def exited():
            status = self.status(container)
            return status if status["state"] == "CONTAINER_EXITED" else None

        return wait_until(exited, seconds, f"wait for {container[:13]} to exit")

    def kill_daemon(self):
        self.node.daemon.send_signal(signal.SIGKILL)
        self.node.daemon.wait()

    def fails(self, *arguments):
        """What crictl says when it fails, as it must."""
        done = self.node.crictl(*arguments, check=False)
        self.assertNotEqual(done.returncode, 0, done.stdout)
        return done.stdout + done.stderr


def leases(node):
    """Addresses that CNI's IPAM has given out."""
    folder = node.root / "leases" / "husk"
    return [path for path in folder.glob("10.*")] if folder.exists() else []


__all__ = [
    "Failed", "PodTest", "can_connect", "json", "leases", "leftovers", "machines", "named", "os", "signal", "subprocess",
    "time", "wait_until",
]
