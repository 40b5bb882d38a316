"""Pods of the handler `runc`: plain host containers as a client sees them, and what they leave behind."""

import pathlib

from pods import (
    MAPPED, USER_NAMESPACE, MappedVolumes, PodTest, can_connect, leftovers, machines, named, os, signal, subprocess, time,
    wait_until,
)

NODE = 2


def namespaces(**modes):
    """The `linux` part of a pod or container that asks for these namespaces."""
    return {"security_context": {"namespace_options": modes}}


def host_kernel():
    with open("/proc/sys/kernel/osrelease") as kernel:
        return kernel.read().strip()


class HostTest(PodTest):
    handler = "runc"
    handler_settings = "template = false"

    def setUp(self):
        super().setUp()
        self.before = self.snapshot()

    def tearDown(self):
        super().tearDown()
        # A mount namespace goes a moment after its last process, and its loop devices with it.
        deadline = time.monotonic() + 20
        while any((left := self.left()).values()) and time.monotonic() < deadline:
            time.sleep(0.2)
        self.assertEqual({kind: names for kind, names in left.items() if names}, {})

    def snapshot(self):
        return leftovers.snapshot([self.node.state / "sandboxes"], disks_below=[self.node.root, self.node.state])

    def left(self):
        left = leftovers.difference(self.before, self.snapshot())
        # Tests may have restarted the daemon, and the kernel remembers connections.
        left["processes"] = [line for line in left["processes"] if "bin/huskd" not in line]
        return left

    def supervisors(self):
        return named("husk-agent")


class Life(HostTest):
    def test_a_container_runs_in_the_hosts_kernel_and_leaves_a_true_record(self):
        pod, container = self.running(command=["sh", "-c", "uname -r; echo oops >&2; exit 3"])
        status = self.wait_exited(container)
        self.assertEqual((status["exitCode"], status["reason"]), (3, "Error"))
        self.assertIn(host_kernel(), self.node.crictl("logs", container))
        with open(status["logPath"]) as lines:
            streams = sorted(line.split()[1:3] for line in lines)
        self.assertEqual(streams, [["stderr", "F"], ["stdout", "F"]])
        self.assertEqual(machines(), [])
        self.assertEqual(self.node.crictl_json("inspectp", pod)["status"]["runtimeHandler"], "runc")

    def test_exec_answers_with_output_and_exit_code(self):
        _, container = self.running()
        said = self.node.crictl("exec", "-s", container, "sh", "-c", "echo out; echo err >&2")
        self.assertEqual(said.split(), ["out", "err"])
        self.assertIn("exited with 7", self.fails("exec", "-s", container, "sh", "-c", "exit 7"))
        self.assertIn("timed out", self.fails("exec", "-s", "--timeout", "2", container, "sleep", "600"))
        self.assertIn("not found", self.fails("exec", "-s", container, "no-such-program"))

    def test_stop_asks_first_and_kills_then(self):
        pod, sandbox = self.pod()
        polite = self.container(pod, sandbox, "polite", command=["sh", "-c", "trap 'exit 5' TERM; while :; do sleep 0.1; done"])
        deaf = self.container(pod, sandbox, "deaf", command=["sh", "-c", "trap '' TERM; while :; do sleep 0.1; done"])
        time.sleep(1)
        self.node.crictl("stop", "--timeout", "60", polite)
        self.assertEqual(self.status(polite)["exitCode"], 5)
        self.node.crictl("stop", "--timeout", "1", deaf)
        self.assertEqual(self.status(deaf)["exitCode"], 137)

    def test_containers_of_a_pod_share_network_and_names_and_not_files(self):
        pod, sandbox = self.pod("shared", hostname="the-pod")
        one = self.container(pod, sandbox, "one", command=["sh", "-c", "echo mine > /here; while :; do nc -l -p 700 -e echo hello; done"])
        two = self.container(pod, sandbox, "two")
        crictl = self.node.crictl
        self.assertEqual(self.node.exec(two, "hostname"), "the-pod")
        self.assertNotEqual(os.uname().nodename, "the-pod")
        address = crictl("inspectp", "-o", "go-template", "--template", "{{.status.network.ip}}", pod)
        self.assertIn(f"{address}\tthe-pod", self.node.exec(two, "cat", "/etc/hosts"))
        self.assertIn(address, self.node.exec(two, "ip", "address"))
        self.exec_fails(two, "cat", "/here")
        self.assertEqual(self.node.exec(one, "cat", "/here"), "mine")
        said = self.node.exec(two, "sh", "-c", "for i in 1 2 3 4 5 6 7 8 9; do nc 127.0.0.1 700 && break; sleep 0.3; done")
        self.assertEqual(said, "hello")
        # One pid namespace for both: each sees the other's processes, and none of the host's.
        seen = self.node.exec(two, "ps")
        self.assertIn("nc -l -p 700", seen)
        self.assertNotIn("huskd", seen)

    def test_a_host_port_leads_into_the_pod(self):
        ports = [{"protocol": 0, "container_port": 7000, "host_port": 17000}]
        pod, sandbox = self.pod("port", port_mappings=ports)
        self.container(pod, sandbox, command=["sh", "-c", "while :; do nc -l -p 7000 -e echo hello; done"])
        wait_until(lambda: can_connect(("127.0.0.1", 17000)), 60, "wait for the host port")

    def test_stats_and_limits_are_the_containers(self):
        limit = {"resources": {"memory_limit_in_bytes": 24 << 20}}
        pod, sandbox = self.pod()
        # A limit of 0 on pages that the kernel cannot count is ignored.
        pages = {"resources": {"hugepage_limits": [{"page_size": "2MB", "limit": 0}, {"page_size": "3MB", "limit": 0}]}}
        busy = self.container(pod, sandbox, "busy", command=["sh", "-c", "while :; do :; done"], linux=pages)
        counted = "hugetlb" in pathlib.Path("/sys/fs/cgroup/cgroup.controllers").read_text()
        if counted and os.path.exists("/sys/kernel/mm/hugepages/hugepages-2048kB"):
            self.assertEqual(self.node.exec(busy, "cat", "/sys/fs/cgroup/hugetlb.2MB.max"), "0")
        greedy = self.container(pod, sandbox, "greedy", command=["sh", "-c", "x=a; while :; do x=$x$x; done"], linux=limit)
        status = self.wait_exited(greedy)
        self.assertEqual((status["exitCode"], status["reason"]), (137, "OOMKilled"))
        stats = self.node.crictl_json("stats", busy)["stats"][0]
        self.assertGreater(int(stats["cpu"]["usageCoreNanoSeconds"]["value"]), 100_000_000)
        self.assertGreater(int(stats["memory"]["usageBytes"]["value"]), 0)

    def test_pods_of_both_handlers_live_side_by_side(self):
        _, here = self.running(command=["sh", "-c", "uname -r; sleep 3600"])
        config = self.node.sandbox_file("machine")
        machine = self.node.crictl("runp", "--runtime", "kata-runtime", config)
        there = self.container(machine, config, command=["sh", "-c", "uname -r; sleep 3600"])
        kernels = [self.node.exec(container, "uname", "-r") for container in (here, there)]
        self.assertEqual(kernels[0], host_kernel())
        self.assertNotEqual(kernels[1], host_kernel())
        handlers = {handler.get("name") for handler in self.node.crictl_json("info")["runtimeHandlers"]}
        self.assertLessEqual({"kata-runtime", "runc"}, handlers)


class TheHostsOwn(HostTest):
    def test_a_pod_in_the_hosts_network_has_its_interfaces_and_name(self):
        lowest = pathlib.Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")
        before = lowest.read_text()
        pod, sandbox = self.pod("hostnet", hostname="", linux=namespaces(network=NODE))
        self.assertEqual(lowest.read_text(), before)
        container = self.container(pod, sandbox, linux=namespaces(network=NODE))
        self.assertEqual(set(self.node.exec(container, "ls", "/sys/class/net").split()), set(os.listdir("/sys/class/net")))
        self.assertEqual(self.node.exec(container, "hostname"), os.uname().nodename)
        self.assertIn(f"HOSTNAME={os.uname().nodename}", self.node.exec(container, "env").split("\n"))
        self.assertFalse(crictl_status(self, pod)["network"].get("ip"))

    def test_a_pod_with_the_hosts_processes_sees_them(self):
        pod, sandbox = self.pod("hostpid", linux=namespaces(pid=NODE))
        container = self.container(pod, sandbox, linux=namespaces(pid=NODE))
        self.assertIn("huskd", self.node.exec(container, "ps"))

    def test_a_pod_with_the_hosts_ipc_shares_its_memory(self):
        mark = f"/dev/shm/husk-test-{os.getpid()}"
        with open(mark, "w") as file:
            file.write("of the host")
        try:
            for modes, seen in (({"ipc": NODE}, True), ({}, False)):
                pod, sandbox = self.pod(linux=namespaces(**modes))
                container = self.container(pod, sandbox, linux=namespaces(**modes))
                done = self.node.crictl("exec", "-s", container, "cat", mark, check=False)
                self.assertEqual("of the host" in done.stdout, seen, modes)
        finally:
            os.unlink(mark)

    def test_directories_of_the_host_are_bound_and_mounts_propagate_as_asked(self):
        shared = self.node.root / "shared"
        shared.mkdir()
        (shared / "file").write_text("of the host")
        subprocess.run(["mount", "-t", "tmpfs", "both", shared], check=True)
        subprocess.run(["mount", "--make-rshared", shared], check=True)
        (shared / "inner").mkdir()
        (shared / "outer").mkdir()
        try:
            self.check_mounts(shared)
        finally:
            subprocess.run(["umount", "-R", shared], check=True)

    def check_mounts(self, shared):
        pod, sandbox = self.pod(linux={"security_context": {"privileged": True}})
        fresh = self.node.root / "not" / "there" / "yet"
        mounts = [
            {"host_path": str(shared), "container_path": "/both", "propagation": 2},
            {"host_path": str(shared), "container_path": "/read", "readonly": True},
            {"host_path": str(fresh), "container_path": "/fresh"},
        ]
        container = self.container(
            pod, sandbox, mounts=mounts, linux={"security_context": {"privileged": True}}
        )
        self.node.exec(container, "touch", "/fresh/made")
        self.assertTrue((fresh / "made").exists())
        self.assertIn("ead-only", self.exec_fails(container, "touch", "/read/x"))
        self.node.exec(container, "mount", "-t", "tmpfs", "inside", "/both/inner")
        self.assertTrue(os.path.ismount(shared / "inner"))
        subprocess.run(["mount", "-t", "tmpfs", "outside", shared / "outer"], check=True)
        self.assertIn("/both/outer", self.node.exec(container, "cat", "/proc/mounts"))

    def test_a_privileged_container_has_the_hosts_devices(self):
        privileged = {"security_context": {"privileged": True}}
        pod, sandbox = self.pod(linux=privileged)
        container = self.container(pod, sandbox, linux=privileged)
        self.assertIn("loop-control", self.node.exec(container, "ls", "/dev"))
        if os.path.exists("/dev/net/tun"):
            self.node.exec(container, "test", "-c", "/dev/net/tun")
        self.assertIn(container, self.node.exec(container, "cat", "/proc/self/cgroup"))
        plain = self.container(pod, sandbox, "plain")
        self.assertNotIn("loop-control", self.node.exec(plain, "ls", "/dev"))

    def test_users_of_a_user_namespace_are_others_on_the_host(self):
        users = {"mode": 0, "uids": [{"host_id": 200000, "container_id": 0, "length": 65536}]}
        users["gids"] = users["uids"]
        security = {"security_context": {"namespace_options": {"userns_options": users}}}
        sysctls = {"kernel.shmmax": "123456", "fs.mqueue.msg_max": "100", "net.ipv4.ip_unprivileged_port_start": "70"}
        pod, sandbox = self.pod(linux={"sysctls": sysctls, **security})
        container = self.container(pod, sandbox, command=["sh", "-c", "exec sleep 876543"], linux=security)
        run = lambda *words: self.node.exec(container, *words)  # noqa: E731
        self.assertEqual(run("cat", "/proc/self/uid_map").split(), ["0", "200000", "65536"])
        files = ["/proc/sys/" + name.replace(".", "/") for name in sysctls]
        self.assertEqual(run("cat", *files).split(), list(sysctls.values()))
        self.assertEqual(run("stat", "-c", "%u:%g", "/etc/passwd"), "0:0")
        run("sh", "-c", "echo mine > /file && chown 33:33 /file")
        self.assertEqual(run("stat", "-c", "%u:%g", "/file"), "33:33")
        # The container has neither users nor the network of the host.
        [process] = [pid for pid, _, _, command in leftovers.running() if command == "sleep 876543"]
        self.assertEqual(os.stat(f"/proc/{process}").st_uid, 200000)
        self.assertEqual(sorted(run("ls", "/sys/class/net").split()), ["eth0", "lo"])
        self.assertEqual(run("sh", "-c", "nc -l -p 80 -e echo hi & sleep 1; nc 127.0.0.1 80"), "hi")
        shared = {"network": 2, "userns_options": users}
        config = self.node.sandbox_file("shared", linux={"security_context": {"namespace_options": shared}})
        self.assertIn("userns_options", self.fails("runp", "--runtime", "runc", config))


class Volumes(MappedVolumes, HostTest):
    def setUp(self):
        super().setUp()
        self.place = self.node.root / "ext4"

    def tearDown(self):
        if os.path.ismount(self.place):
            for pod in self.node.cri.pods():
                self.node.cri.remove_pod(pod)
            subprocess.run(["umount", "-R", self.place], check=True)
        super().tearDown()

    def ext4(self):
        """A directory on a file system that can be ID-mapped. With an older kernel the node's tmpfs cannot."""
        disk, place = self.node.root / "disk", self.place
        place.mkdir(exist_ok=True)
        disk.unlink(missing_ok=True)
        disk.touch()
        os.truncate(disk, 64 << 20)
        subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", disk], check=True)
        subprocess.run(["mount", "-o", "loop", disk, place], check=True)
        subprocess.run(["mount", "--make-rshared", place], check=True)
        folder = place / "folder"
        folder.mkdir()
        return folder

    def mounts_of_the_pod(self):
        """Returns the mounts that its supervisor has made for its containers."""
        [supervisor] = self.supervisors()
        with open(f"/proc/{supervisor}/mountinfo") as table:
            places = [line.split()[4] for line in table]
        return [place for place in places if "/mapped/" in place or "/images/" in place or "/bundles/" in place]

    def test_mapped_ids_are_those_of_the_pods_users(self):
        self.check_mapped_volume(self.ext4())

    def test_a_file_system_that_cannot_be_mapped_is_named(self):
        pod, sandbox = self.pod(linux=USER_NAMESPACE)
        mounts = [{"container_path": "/data", "host_path": "/sys/fs", **MAPPED}]
        config = self.node.container_file("bad", "busybox", linux=USER_NAMESPACE, mounts=mounts)
        said = self.fails("create", pod, config, sandbox)
        for words in ("volume at /data", "/sys/fs is on sysfs", "such as ext4"):
            self.assertIn(words, said)
        self.assertEqual(self.mounts_of_the_pod(), [])

    def test_mounts_of_the_host_below_a_mapped_volume_stay_the_hosts(self):
        folder = self.ext4()
        (folder / "early").mkdir()
        (folder / "late").mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "early", folder / "early"], check=True)
        (folder / "early/file").write_text("early")
        pod, sandbox = self.pod(linux=USER_NAMESPACE)
        mounts = [
            {"container_path": path, "host_path": str(folder), "propagation": propagation, **MAPPED}
            for propagation, path in enumerate(("/private", "/follows", "/both"))
        ]
        container = self.container(pod, sandbox, mounts=mounts, linux=USER_NAMESPACE)
        self.node.exec(container, "cat", "/private/early/file", "/follows/early/file", "/both/early/file")
        subprocess.run(["mount", "-t", "tmpfs", "late", folder / "late"], check=True)
        (folder / "late/file").write_text("late")
        seen = self.node.exec(container, "sh", "-c", "ls /private/late; cat /follows/late/file")
        self.assertEqual(seen, "late")
        self.kill_daemon()
        self.node.start_daemon()
        self.node.cri.remove(container)
        self.assertEqual(self.mounts_of_the_pod(), [])
        for name in ("early", "late"):
            self.assertTrue(os.path.ismount(folder / name), name)

    def test_an_image_can_be_a_volume(self):
        self.node.crictl("pull", self.node.image("nginx"))
        image = {"image": {"image": self.node.image("nginx")}, "readonly": True}
        folder = self.node.root / "inside"
        folder.mkdir(exist_ok=True)
        mounts = [
            {"container_path": "/all/tmp", "host_path": str(folder)},
            {"container_path": "/all", **image},
            {"container_path": "/part", "image_sub_path": "etc/nginx", **image},
        ]
        pod, sandbox = self.pod()
        container = self.container(pod, sandbox, mounts=mounts)
        run = lambda *words: self.node.exec(container, *words)  # noqa: E731
        run("cmp", "/all/etc/nginx/nginx.conf", "/part/nginx.conf")
        self.assertIn("ead-only", self.exec_fails(container, "touch", "/part/new"))
        self.assertIn("denied", self.exec_fails(container, "/all/bin/sh", "-c", "true"))
        run("touch", "/all/tmp/in-a-volume")
        self.assertEqual(os.listdir(folder), ["in-a-volume"])
        # The image is in use, whatever the daemon remembers.
        self.kill_daemon()
        self.node.start_daemon()
        run("cmp", "/all/etc/nginx/nginx.conf", "/part/nginx.conf")
        self.node.cri.remove(container)
        self.assertEqual(self.mounts_of_the_pod(), [])
        for mount, words in (
            ({"image_sub_path": "no/such", **image}, "find in the image"),
            ({"image_sub_path": "../etc", **image}, "image_sub_path"),
            ({"host_path": str(folder), **image}, "host_path"),
            ({"image": {"image": "nobody/has:this"}}, "nobody/has:this"),
        ):
            config = self.node.container_file("bad", "busybox", mounts=[{"container_path": "/x", **mount}])
            self.assertIn(words, self.fails("create", pod, config, sandbox), mount)
        self.assertEqual(self.mounts_of_the_pod(), [])

    def test_an_image_that_is_a_volume_belongs_to_the_pods_users(self):
        self.node.crictl("pull", self.node.image("nginx"))
        image = {"image": {"image": self.node.image("nginx")}, "readonly": True, "container_path": "/image", **MAPPED}
        pod, sandbox = self.pod(linux=USER_NAMESPACE)
        container = self.container(pod, sandbox, mounts=[image], linux=USER_NAMESPACE)
        self.assertEqual(self.node.exec(container, "stat", "-c", "%u:%g", "/image/etc/nginx"), "0:0")


class Death(HostTest):
    def test_no_line_is_lost_or_repeated_when_huskd_is_killed(self):
        self.speak_while_huskd_dies()

    def test_pods_live_on_when_the_daemon_dies(self):
        pod, container = self.running(command=["sh", "-c", "trap 'exit 9' TERM; n=0; while :; do echo $n; n=$((n+1)); sleep 0.2; done"])
        before = self.supervisors()
        self.kill_daemon()
        self.assertEqual(self.supervisors(), before)
        self.node.start_daemon()
        self.assertEqual(self.node.crictl("pods", "-q", "--state", "ready"), pod)
        self.assertEqual(self.status(container)["state"], "CONTAINER_RUNNING")
        self.assertEqual(self.node.exec(container, "echo", "here"), "here")
        lines = len(self.node.crictl("logs", container).splitlines())
        wait_until(lambda: len(self.node.crictl("logs", container).splitlines()) > lines, 30, "wait for more output")
        self.node.crictl("stop", "--timeout", "60", container)
        self.assertEqual(self.status(container)["exitCode"], 9)

    def test_a_supervisor_that_is_killed_takes_its_containers_with_it_and_is_told_so(self):
        pod, container = self.running(command=["sh", "-c", "exec sleep 987654"])
        [supervisor] = self.supervisors()
        os.kill(supervisor, signal.SIGKILL)
        status = self.wait_exited(container, 30)
        self.assertNotEqual(status["exitCode"], 0)
        self.assertIn("supervisor", status["message"])
        self.assertEqual(self.node.crictl("pods", "-q", "--state", "notready"), pod)
        wait_until(lambda: not running("sleep 987654"), 30, "wait for the container's process to go")

    def test_what_died_with_the_daemon_is_given_back(self):
        pod, container = self.running(command=["sh", "-c", "exec sleep 987655"])
        [supervisor] = self.supervisors()
        self.kill_daemon()
        os.kill(supervisor, signal.SIGKILL)
        self.node.start_daemon()
        self.assertEqual(self.node.crictl("pods", "-q", "--state", "notready"), pod)
        self.assertNotEqual(self.status(container)["exitCode"], 0)
        self.assertFalse(running("sleep 987655"))

    def test_half_a_pod_is_taken_apart(self):
        config = self.node.sandbox_file("half")
        command = [self.node.crictl_program, "--config", str(self.node.root / "crictl.yaml"), "runp", "--runtime", "runc", str(config)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as runp:
            wait_until(self.supervisors, 60, "wait for the supervisor")
            self.kill_daemon()
            runp.wait()
        self.node.start_daemon()
        for pod in self.node.cri.pods():
            # The pod was ready just before the kill.
            self.node.cri.remove_pod(pod)
        wait_until(lambda: not self.supervisors(), 30, "wait for the supervisor to go")


class Refused(HostTest):
    def test_a_machine_cannot_have_the_hosts_namespaces_and_the_error_names_who_can(self):
        for what in ("network", "pid", "ipc"):
            config = self.node.sandbox_file(f"host{what}", linux=namespaces(**{what: NODE}))
            said = self.fails("runp", "--runtime", "kata-runtime", config)
            self.assertIn("InvalidArgument", said)
            self.assertIn(f"{what} namespace", said)
            self.assertIn("`runc`", said)

    def test_what_cannot_be_on_the_host_is_refused_by_name(self):
        sysctl = self.node.sandbox_file("panic", linux={"sysctls": {"kernel.panic": "1"}})
        self.assertIn("kernel.panic", self.fails("runp", "--runtime", "runc", sysctl))
        pod, sandbox = self.pod()
        for settings, word in (
            ({"mounts": [{"host_path": "relative", "container_path": "/x"}]}, "relative"),
            ({"mounts": [{"host_path": "/proc/no/such", "container_path": "/x"}]}, "/proc/no/such"),
            ({"devices": [{"host_path": "/dev/no-such", "container_path": "/dev/x", "permissions": "rwm"}]}, "/dev/no-such"),
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

    def test_a_namespaced_sysctl_is_set_for_the_pod_alone(self):
        pod, sandbox = self.pod(linux={"sysctls": {"net.ipv4.ip_unprivileged_port_start": "81", "kernel.shmmax": "123456"}})
        container = self.container(pod, sandbox)
        read = lambda name: self.node.exec(container, "cat", f"/proc/sys/{name}")
        self.assertEqual((read("net/ipv4/ip_unprivileged_port_start"), read("kernel/shmmax")), ("81", "123456"))
        self.assertEqual(read("net/ipv4/ping_group_range").split(), ["0", "2147483647"])
        with open("/proc/sys/kernel/shmmax") as value:
            self.assertNotEqual(value.read().strip(), "123456")

    def test_files_as_deep_as_nobody_can_name_are_removed(self):
        deep = "/".join(["d"] * 1000)
        build = f"cd /tmp; mkdir -p x/{deep}; for i in 1 2; do mkdir -p y/{deep} && mv x y/{deep}/x && mv y x || exit 1; done"
        _, container = self.running(command=["sh", "-c", f"{build}; echo done; sleep 3600"])
        wait_until(lambda: "done" in self.node.crictl("logs", container), 60, "wait for the directories")


def running(command):
    """Whether the host has a process of this command line."""
    return any(other == command for _, _, _, other in leftovers.running())


def crictl_status(test, pod):
    return test.node.crictl_json("inspectp", pod)["status"]



