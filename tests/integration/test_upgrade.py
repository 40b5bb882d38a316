"""Pods of an earlier release under this huskd, and the way back (docs/adr/0009-what-may-be-mixed.md).

`make upgrade` builds the release and names it in HUSK_UPGRADE_FROM; without that these tests are not collected.
"""

import shutil
from pathlib import Path

import leftovers
from pods import PodTest, machines, named, os, subprocess, wait_until

# Counts aloud, and ends with 9 when it is asked to.
COUNTS = ["sh", "-c", "trap 'exit 9' TERM; n=0; while :; do echo $n; n=$((n+1)); sleep 0.2; done"]


class UpgradeTest(PodTest):
    """Each test begins with a node of the earlier release, which has never seen this one."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        node = cls.node
        cls.new = node.prefix
        built = Path(os.environ["HUSK_UPGRADE_FROM"])
        # As for this one's programs: the root file system of a KVM host VM is slow.
        cls.old = Path(shutil.copytree(built, node.root / "earlier", dirs_exist_ok=True)) if node.in_vm else built

    @classmethod
    def tearDownClass(cls):
        cls.start(cls.new)

    @classmethod
    def start(cls, prefix):
        """Ends the daemon that runs, and starts that of `prefix`."""
        cls.node.end(cls.node.daemon)
        cls.node.prefix = prefix
        cls.node.start_daemon()

    def setUp(self):
        node = self.node
        node.end(node.daemon)
        node.remove_state()
        shutil.rmtree(node.root / "run")
        node.make_state()
        self.start(self.old)
        node.crictl("pull", node.image("busybox"))
        super().setUp()
        self.folder = node.state / "data"
        self.folder.mkdir()
        self.mounts_before = leftovers.mounts()

    def tearDown(self):
        super().tearDown()
        self.assertEqual(named("husk-fs"), [])
        self.assertEqual(leftovers.mounts() - self.mounts_before, set())

    # --- Words ---------------------------------------------------------------------------------------

    def pod_of(self, handler, name, **settings):
        self.handler = handler
        return self.pod(name, **settings)

    def mount(self):
        return [{"container_path": "/data", "host_path": str(self.folder)}]

    def lines(self, container):
        return len(self.node.crictl("logs", container).splitlines())

    def version(self):
        return self.node.cri.call("Version").runtime_version

    def ready(self):
        return set(self.node.crictl("pods", "-q", "--state", "ready").split())

    def check_running(self, pod, container):
        """Checks a pod that is ready: its container runs, has stats and logs, and can be entered."""
        self.assertIn(pod, self.ready())
        self.assertEqual(self.status(container)["state"], "CONTAINER_RUNNING")
        self.assertEqual(self.node.exec(container, "echo", "here"), "here")
        # Without -s it goes through the streaming server.
        self.assertEqual(self.node.crictl("exec", container, "echo", "there"), "there")
        lines = self.lines(container)
        wait_until(lambda: self.lines(container) > lines, 60, "wait for more output")
        stats = self.node.crictl_json("stats", container)["stats"][0]
        self.assertGreater(int(stats["memory"]["usageBytes"]["value"]), 0)
        of_pod = self.node.crictl_json("statsp", "--id", pod)["stats"][0]["linux"]
        self.assertGreater(int(of_pod["memory"]["usageBytes"]["value"]), 0)

    def check_volume(self, container, word):
        """Both sides see what the other writes."""
        (self.folder / word).write_text("of the host")
        self.assertEqual(self.node.exec(container, "cat", f"/data/{word}"), "of the host")
        self.node.exec(container, "sh", "-c", f"echo of the container >/data/{word}")
        self.assertEqual((self.folder / word).read_text(), "of the container\n")

    def end_well(self, container):
        self.node.crictl("stop", "--timeout", "60", container)
        self.assertEqual(self.status(container)["exitCode"], 9)


class Upgrade(UpgradeTest):
    def test_pods_of_the_earlier_release_go_on(self):
        pods = {}
        for handler in ("kata-runtime", "runc"):
            pod, sandbox = self.pod_of(handler, f"old-{handler}")
            main = self.container(pod, sandbox, "main", command=COUNTS, mounts=self.mount())
            done = self.container(pod, sandbox, "done", command=["sh", "-c", "echo said; exit 7"])
            made = self.container(pod, sandbox, "made", command=COUNTS, start=False)
            self.assertEqual(self.wait_exited(done)["exitCode"], 7)
            pods[pod] = sandbox, main, done, made
        before = machines(), named("husk-fs"), named("husk-agent")
        release = self.version()

        self.start(self.new)
        self.assertEqual((machines(), named("husk-fs"), named("husk-agent")), before, "of release " + release)
        self.assertEqual(self.ready(), set(pods))
        for pod, (sandbox, main, done, made) in pods.items():
            self.check_running(pod, main)
            self.check_volume(main, pod)
            status = self.status(done)
            self.assertEqual((status["state"], status["exitCode"]), ("CONTAINER_EXITED", 7))
            self.assertEqual(self.node.crictl("logs", done), "said")
            self.assertEqual(self.status(made)["state"], "CONTAINER_CREATED")
            self.node.cri.start(made)
            self.check_running(pod, made)
            more = self.container(pod, sandbox, "more", command=COUNTS, mounts=self.mount())
            self.check_volume(more, f"more-{pod}")
            self.node.crictl("update", "--memory", str(64 << 20), more)
            self.node.cri.remove(done)
            for container in (main, made, more):
                self.end_well(container)
            self.node.crictl("stopp", pod)
            self.assertNotIn(pod, self.ready())
            self.node.crictl("rmp", pod)
        self.assert_nothing_left()

    def test_containers_that_end_while_the_daemon_is_exchanged_have_an_exit_code_and_all_output(self):
        ended = []
        for handler in ("kata-runtime", "runc"):
            pod, sandbox = self.pod_of(handler, f"ends-{handler}")
            said = "while [ ! -e /data/go ]; do sleep 0.1; done; seq 3000; printf end; exit 4"
            ended.append(self.container(pod, sandbox, command=["sh", "-c", said], mounts=self.mount()))
        self.kill_daemon()
        (self.folder / "go").touch()
        self.start(self.new)
        for container in ended:
            self.assertEqual(self.wait_exited(container)["exitCode"], 4)
            lines = self.node.crictl("logs", container).splitlines()
            self.assertEqual(lines, [str(number) for number in range(1, 3001)] + ["end"])

    def test_pods_of_both_releases_live_side_by_side(self):
        old, old_sandbox = self.pod_of("kata-runtime", "old")
        earlier = self.container(old, old_sandbox, "earlier", command=COUNTS)
        stopped, _ = self.pod_of("kata-runtime", "stopped")
        self.node.crictl("stopp", stopped)
        self.start(self.new)
        for handler in ("kata-runtime", "runc"):
            new, sandbox = self.pod_of(handler, f"new-{handler}")
            container = self.container(new, sandbox, command=COUNTS, mounts=self.mount())
            self.check_running(new, container)
            self.check_volume(container, handler)
        # The pod's first volume: this huskd starts this release's file server for the earlier one's VMM.
        volume = self.container(old, old_sandbox, "volume", command=COUNTS, mounts=self.mount())
        self.check_volume(volume, "first")
        self.check_running(old, earlier)
        self.assertEqual(self.node.crictl("pods", "-q", "--state", "notready"), stopped)
        husk = [self.new / "bin/husk", "--config", self.node.config]
        told = subprocess.run([*husk, "info", old], capture_output=True, text=True, check=True).stdout
        self.assertRegex(told, r"machine +process \d+")

    def test_an_unclean_end_of_the_earlier_release_is_cleaned_up(self):
        old, sandbox = self.pod_of("kata-runtime", "old")
        container = self.container(old, sandbox, command=COUNTS, mounts=self.mount())
        host, sandbox = self.pod_of("runc", "host")
        survivor = self.container(host, sandbox, command=COUNTS)
        config = self.node.sandbox_file("half")
        command = [self.node.crictl_program, "--config", str(self.node.root / "crictl.yaml"), "runp", str(config)]
        [machine] = machines()
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as runp:
            wait_until(lambda: len(machines()) > 1, 60, "wait for the machine")
            self.kill_daemon()
            runp.wait()
        subprocess.run(["kill", "-KILL", str(machine)], check=True)
        self.start(self.new)
        self.assertEqual(self.ready(), {host})
        self.assertEqual(self.node.crictl("pods", "-q", "--state", "notready"), old)
        self.assertNotEqual(self.wait_exited(container)["exitCode"], 0)
        self.check_running(host, survivor)
        self.assertEqual(machines(), [])


class WayBack(UpgradeTest):
    def test_pods_of_this_release_go_on_under_the_earlier_one(self):
        self.start(self.new)
        pods = {}
        for handler in ("kata-runtime", "runc"):
            pod, sandbox = self.pod_of(handler, f"new-{handler}")
            pods[pod] = self.container(pod, sandbox, command=COUNTS, mounts=self.mount())
        before = machines()
        self.start(self.old)
        self.assertEqual(machines(), before)
        for pod, container in pods.items():
            self.check_running(pod, container)
            self.check_volume(container, pod)
            self.end_well(container)
            self.node.crictl("stopp", pod)
            self.node.crictl("rmp", pod)
        self.assert_nothing_left()
        # Nothing of that keeps this release from coming back.
        pod, sandbox = self.pod_of("kata-runtime", "again")
        container = self.container(pod, sandbox, command=COUNTS, mounts=self.mount())
        self.start(self.new)
        self.check_running(pod, container)
