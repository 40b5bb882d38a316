"""AppArmor: profiles of the host by name, and the runtime's default, under both handlers."""

import os
import subprocess

from pods import PodTest
from test_host_handler import HostTest

DEFAULT, UNCONFINED, LOCALHOST = range(3)
# The kernel has one list of profiles, and another node of tests may run beside this one.
NODE = os.environ.get("HUSK_TEST_NODE", "test")
ONE, TWO = f"husk-{NODE}-one", f"husk-{NODE}-two"
OWN_PROCESSES = {"namespace_options": {"pid": 1}}


def profile(name, forbidden):
    return f"profile {name} flags=(attach_disconnected) {{\n  file,\n  signal,\n  deny {forbidden} w,\n}}\n"


def by_name(name):
    return {"apparmor": {"profile_type": LOCALHOST, "localhost_ref": name}}


class Words:
    """Helpers of these tests."""

    def load(self, *profiles):
        """Loads profiles in one policy, as the parser caches them."""
        compile_them = ["apparmor_parser", "--skip-kernel-load", "--skip-cache", "--stdout"]
        done = subprocess.run(compile_them, input="".join(profiles).encode(), capture_output=True)
        self.assertEqual((done.returncode, done.stderr), (0, b""))
        with open("/sys/kernel/security/apparmor/.replace", "wb", buffering=0) as kernel:
            self.assertEqual(kernel.write(done.stdout), len(done.stdout))

    def unload(self, name):
        with open("/sys/kernel/security/apparmor/.remove", "w") as kernel:
            kernel.write(name)

    def secured(self, pod, sandbox, name, **security):
        return self.container(pod, sandbox, name, linux={"security_context": security})

    def does(self, container, *command):
        return self.node.exec(container, *command)

    def label(self, container):
        """Returns the labels of its first process and of an exec."""
        first, joined = self.does(container, "cat", "/proc/1/attr/current", "/proc/self/attr/current").splitlines()
        self.assertEqual(first, joined)
        return first

    def assert_forbidden(self, container, path):
        self.assertIn("Permission denied", self.exec_fails(container, "touch", path))


class Profiles(Words):
    """The behaviour that a client sees under both handlers."""

    def test_a_profile_of_the_host_confines_and_a_new_one_takes_its_place(self):
        self.load(profile(ONE, "/forbidden"), profile(TWO, "/forbidden"))
        pod, sandbox = self.pod(linux={"security_context": OWN_PROCESSES})
        first = self.secured(pod, sandbox, "first", **by_name(ONE), **OWN_PROCESSES)
        self.assertEqual(self.label(first), f"{ONE} (enforce)")
        self.does(first, "touch", "/allowed")
        self.assert_forbidden(first, "/forbidden")

        # The other profile is still that of the first policy: using it must not bring the old one back.
        self.load(profile(ONE, "/other"))
        second = self.secured(pod, sandbox, "second", apparmor_profile=f"localhost/{ONE}", **OWN_PROCESSES)
        third = self.secured(pod, sandbox, "third", apparmor_profile="localhost/none", **by_name(f"localhost/{TWO}"), **OWN_PROCESSES)
        self.assertEqual(self.label(third), f"{TWO} (enforce)")
        self.assert_forbidden(third, "/forbidden")
        for container in (first, second):
            self.does(container, "touch", "/forbidden")
            self.assert_forbidden(container, "/other")

        self.unload(TWO)
        for security in (by_name(TWO), {"apparmor_profile": f"localhost/{TWO}"}, by_name("../" + ONE)):
            config = self.node.container_file("refused", "busybox", command=["true"], linux={"security_context": security})
            said = self.fails("create", pod, config, sandbox)
            self.assertIn("is not loaded on this host", said)
            self.assertIn("apparmor_parser", said)

    def test_the_default_profile_leaves_the_system_as_it_is(self):
        pod, sandbox = self.pod(linux={"security_context": {"privileged": True, **OWN_PROCESSES}})
        powers = {"capabilities": {"add_capabilities": ["ALL"]}, "masked_paths": ["/none"], "readonly_paths": ["/none"], **OWN_PROCESSES}
        mount = ("mount", "-t", "tmpfs", "none", "/mnt")
        change = ("sh", "-c", "cat /proc/sys/vm/swappiness > /proc/sys/vm/swappiness")
        free = self.secured(pod, sandbox, "free", apparmor={"profile_type": UNCONFINED}, **powers)
        default = self.secured(pod, sandbox, "default", apparmor={"profile_type": DEFAULT}, **powers)
        self.assertEqual((self.label(free), self.label(default)), ("unconfined", "husk-default (enforce)"))
        self.does(default, "sh", "-c", "mkdir /mnt && echo 500 > /proc/self/oom_score_adj && kill -0 1")
        self.does(free, "mkdir", "/mnt")
        for command in (mount, change):
            self.does(free, *command)
            self.assertIn("denied", self.exec_fails(default, *command))
        for name, security in (("old", {"apparmor_profile": "runtime/default"}), ("unsaid", {})):
            container = self.secured(pod, sandbox, name, **security, **OWN_PROCESSES)
            self.assertEqual(self.label(container), "husk-default (enforce)", name)
        privileged = self.secured(pod, sandbox, "privileged", privileged=True, **OWN_PROCESSES)
        self.assertEqual(self.label(privileged), "unconfined")
        self.node.crictl("stop", "--timeout", "5", default)


class InMachines(Profiles, PodTest):
    pass


class OnTheHost(Profiles, HostTest):
    pass


class WithoutAppArmor(Words, PodTest):
    """A machine whose kernel has no AppArmor."""

    handler_settings = "template = false\nkernel_cmdline = 'apparmor=0'"

    def test_a_profile_that_the_machine_cannot_have_is_refused(self):
        self.load(profile(ONE, "/forbidden"))
        pod, sandbox = self.pod()
        for security in (by_name(ONE), {"apparmor": {"profile_type": DEFAULT}}):
            config = self.node.container_file("refused", "busybox", command=["true"], linux={"security_context": security})
            self.assertIn("the machine's kernel has no AppArmor", self.fails("create", pod, config, sandbox))
        # A container that asks for no profile runs without one.
        self.secured(pod, sandbox, "plain")
