"""Requests that must fail get an error that names the stage, has the right code, comes in time, and leaves nothing
behind."""

import socket
import stat
import threading

from pods import PodTest, SharedPodTest, json, machines, os, subprocess, time

UNKNOWN = "0123456789abcdef" * 4


class BadRequests(SharedPodTest):
    def test_unknown_ids_are_not_found(self):
        for arguments in (["inspectp", UNKNOWN], ["inspect", UNKNOWN], ["start", UNKNOWN], ["exec", "-s", UNKNOWN, "true"]):
            self.assertIn("NotFound", self.fails(*arguments), arguments)
        for arguments in (["stopp", UNKNOWN], ["stop", UNKNOWN]):
            self.node.crictl(*arguments)

    def test_a_missing_image_is_named(self):
        pod, sandbox = self.pod()
        config = self.node.container_file("absent", "absent", command=["true"])
        said = self.fails("create", "--no-pull", pod, config, sandbox)
        self.assertIn("NotFound", said)
        self.assertIn("husk/absent", said)
        self.assertIn("NotFound", self.fails("pull", self.node.image("absent")))

    def test_requests_that_make_no_sense_are_refused(self):
        self.assertIn("unknown runtime handler `nonsense`", self.fails("runp", "--runtime", "nonsense", self.node.sandbox_file("x")))
        nameless = self.node.sandbox_file("nameless", metadata={"namespace": "default", "uid": "u"})
        self.assertIn("name", self.fails("runp", nameless))
        host = {"security_context": {"namespace_options": {"network": 2}}}
        said = self.fails("runp", self.node.sandbox_file("hostnet", linux=host))
        self.assertIn("InvalidArgument", said)
        self.assertIn("network namespace", said)
        self.assertIn("hostname", self.fails("runp", self.node.sandbox_file("long", hostname="x" * 65)))
        self.assertIn("windows", self.fails("runp", self.node.sandbox_file("foreign", windows={})))
        slice_parent = {"cgroup_parent": "kubepods-burstable-pod1.slice"}
        self.assertIn("cgroup_driver", self.fails("runp", self.node.sandbox_file("slice", linux=slice_parent)))
        limit = {"husk.dev/limits.disk": "fast"}
        self.assertIn("husk.dev/limits.disk", self.fails("runp", self.node.sandbox_file("fast", annotations=limit)))
        sysctl = self.node.sandbox_file("sysctl", linux={"sysctls": {"net.no.such": "1"}})
        self.assertIn("net.no.such", self.fails("runp", sysctl))
        pod, sandbox = self.pod()
        for settings, word in (
            ({"linux": {"security_context": {"capabilities": {"add_capabilities": ["FLY"]}}}}, "FLY"),
            ({"log_path": "../../escape.log"}, "log_path"),
            ({"mounts": [{"host_path": "data", "container_path": "/data"}]}, "host_path"),
            ({"command": ["/no/such/program"]}, "/no/such/program"),
            ({"linux": {"security_context": {"run_as_username": "nobody-here"}}}, "nobody-here"),
        ):
            config = self.node.container_file("bad", "busybox", **{"command": ["true"], **settings})
            done = self.node.crictl("create", pod, config, sandbox, check=False)
            said = done.stdout + done.stderr
            if done.returncode == 0:
                said = self.fails("start", done.stdout.strip())
                self.node.crictl("rm", done.stdout.strip())
            self.assertIn(word, said)
            self.assertEqual(self.node.cri.containers(), [])


class BadSurroundings(PodTest):
    settings = "[images]\nstall_timeout_seconds = 3\n"
    # Only the test writes to the disk.
    handler_settings = "template = false"

    def test_a_cni_plugin_that_fails_is_named_and_undone(self):
        plugin = self.node.plugins / "failing"
        plugin.write_text('#!/bin/sh\n[ "$CNI_COMMAND" = ADD ] || exit 0\necho \'{"cniVersion":"1.0.0","code":100,"msg":"no luck today"}\'\nexit 1\n')
        plugin.chmod(plugin.stat().st_mode | stat.S_IXUSR)
        first = self.node.cni / "00-failing.conflist"
        with open(self.node.cni / "10-husk.conflist") as good:
            plugins = json.load(good)
        plugins["plugins"].append({"type": "failing"})
        first.write_text(json.dumps(plugins))
        try:
            said = self.fails("runp", self.node.sandbox_file("unlucky"))
        finally:
            first.unlink()
            plugin.unlink()
        self.assertIn("no luck today", said)
        self.assertIn("failing", said)
        self.assertEqual(self.node.cri.pods(), [])
        self.assert_nothing_left()

    def test_without_cni_configuration_the_network_is_not_ready_and_why(self):
        good = self.node.cni / "10-husk.conflist"
        good.rename(self.node.root / "aside")
        try:
            conditions = {c["type"]: c for c in json.loads(self.node.crictl("info"))["status"]["conditions"]}
            self.assertFalse(conditions["NetworkReady"]["status"])
            self.assertIn(str(self.node.cni), conditions["NetworkReady"]["message"])
            self.assertIn("network", self.fails("runp", self.node.sandbox_file("offline")))
        finally:
            (self.node.root / "aside").rename(good)
        self.assertTrue(json.loads(self.node.crictl("info"))["status"]["conditions"][1]["status"])

    def test_a_registry_that_hangs_is_given_up_in_time(self):
        with socket.create_server(("127.0.0.1", 0)) as silent:
            held = []
            threading.Thread(target=lambda: held.append(silent.accept()), daemon=True).start()
            started = time.monotonic()
            said = self.fails("pull", f"127.0.0.1:{silent.getsockname()[1]}/x:1")
            self.assertIn("DeadlineExceeded", said)
            self.assertLess(time.monotonic() - started, 60)

    def test_a_full_disk_is_called_so(self):
        # An image that is here already needs no writing.
        self.node.crictl("rmi", self.node.image("nginx"), check=False)
        room = os.statvfs(self.node.state)
        filler = self.node.state / "filler"
        with open(filler, "wb"):
            subprocess.run(["fallocate", "-l", str(room.f_bavail * room.f_frsize), str(filler)], check=True)
        try:
            said = self.fails("pull", self.node.image("nginx"))
            self.assertIn("ResourceExhausted", said)
            self.assertIn("No space left", said)
        finally:
            filler.unlink()
        self.assertEqual(list((self.node.state / "images/pulls").iterdir()), [])
        self.node.crictl("pull", self.node.image("nginx"))


class BadKernel(PodTest):
    settings = "[handlers.panics]\ntemplate = false\nkernel_cmdline = 'init=/no/such/init'\n[handlers.silent]\ntemplate = false\nboot_timeout_seconds = 20\nkernel_cmdline = 'init=/usr/bin/runc'\n"

    def test_a_kernel_that_panics_is_quoted(self):
        started = time.monotonic()
        said = self.fails("runp", "--runtime", "panics", self.node.sandbox_file("panic"))
        self.assertIn("panic", said.lower())
        self.assertIn("guest boot", said)
        self.assertLess(time.monotonic() - started, 120)
        self.assertEqual((self.node.crictl("pods", "-q"), machines()), ("", []))
        self.assert_nothing_left()
