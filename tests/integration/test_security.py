"""Security contexts, namespaces and limits: the powers of a container, and requests that are refused."""

import pathlib

from pods import SharedPodTest, json

POD, CONTAINER, NODE, TARGET = range(4)
DEFAULT, UNCONFINED, LOCALHOST = range(3)
NO_CHMOD = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["chmod", "fchmodat"], "action": "SCMP_ACT_ERRNO"}]}


class Security(SharedPodTest):
    def secured(self, pod, sandbox, name, command=None, **security):
        settings = {"command": command} if command else {}
        return self.container(pod, sandbox, name, linux={"security_context": security}, **settings)

    def does(self, container, *command):
        return self.node.exec(container, *command)

    def refused(self, pod, sandbox, **settings):
        config = self.node.container_file("refused", "busybox", **{"command": ["true"], **settings})
        return self.fails("create", pod, config, sandbox)

    def test_a_process_has_the_users_and_groups_that_are_asked_for(self):
        pod, sandbox = self.pod()
        wanted = {"run_as_user": {"value": 1001}, "run_as_group": {"value": 1002}, "supplemental_groups": [7, 5000]}
        container = self.secured(pod, sandbox, "numbers", **wanted)
        self.assertEqual(self.does(container, "id", "-u"), "1001")
        self.assertEqual(sorted(self.does(container, "id", "-G").split(), key=int), ["7", "1002", "5000"])
        user = self.status(container)["user"]["linux"]
        self.assertEqual((user["uid"], user["gid"]), ("1001", "1002"))
        self.assertEqual(sorted(map(int, user["supplementalGroups"])), [7, 1002, 5000])
        # Every user may bind low ports and send pings, because the network is the pod's own.
        self.assertEqual(self.does(container, "sh", "-c", "nc -l -p 80 -e echo hi & sleep 1; nc 127.0.0.1 80"), "hi")
        self.assertEqual(self.does(container, "cat", "/proc/sys/net/ipv4/ping_group_range").split(), ["0", "2147483647"])
        named = self.secured(pod, sandbox, "name", run_as_username="nobody")
        self.assertEqual(self.does(named, "id", "-un"), "nobody")
        said = self.refused(pod, sandbox, linux={"security_context": {"run_as_group": {"value": 7}}})
        self.assertIn("run_as_user", said)

    def test_capabilities_and_privileges_are_what_is_asked_for(self):
        pod, sandbox = self.pod()

        def bits(container, which):
            line = self.does(container, "grep", f"^{which}:", "/proc/self/status")
            return int(line.split()[1], 16)

        none = self.secured(pod, sandbox, "none", capabilities={"drop_capabilities": ["ALL"]}, no_new_privs=True)
        self.assertEqual((bits(none, "CapBnd"), bits(none, "NoNewPrivs")), (0, 1))
        chown = {"add_ambient_capabilities": ["CAP_CHOWN"], "drop_capabilities": ["ALL"]}
        ambient = self.secured(pod, sandbox, "ambient", capabilities=chown, run_as_user={"value": 1000})
        self.assertEqual((bits(ambient, "CapAmb"), bits(ambient, "CapEff")), (1, 1))
        plain = self.secured(pod, sandbox, "plain")
        self.exec_fails(plain, "mount", "-t", "tmpfs", "none", "/mnt")
        self.exec_fails(plain, "test", "-e", "/dev/loop-control")
        self.assertEqual(self.does(plain, "cat", "/proc/self/cgroup"), "0::/")
        self.assertIn("privileged", self.refused(pod, sandbox, linux={"security_context": {"privileged": True}}))
        pod, sandbox = self.pod(linux={"security_context": {"privileged": True}})
        seccomp = {"profile_type": LOCALHOST, "localhost_ref": self.profile()}
        free = self.secured(pod, sandbox, "free", privileged=True, seccomp=seccomp)
        self.does(free, "sh", "-c", "mkdir -p /mnt && mount -t tmpfs none /mnt && chmod 700 /mnt")
        self.assertGreater(bits(free, "CapEff"), 1 << 39)
        # A privileged container has the whole machine: its devices and its control groups.
        self.does(free, "sh", "-ec", "for device in fuse loop-control net/tun; do test -c /dev/$device; done")
        self.assertIn(free, self.does(free, "cat", "/proc/self/cgroup"))

    def profile(self):
        path = self.node.root / "no-chmod.json"
        path.write_text(json.dumps(NO_CHMOD))
        return str(path)

    def test_seccomp_profiles_filter_calls(self):
        pod, sandbox = self.pod()
        mode = ["grep", "^Seccomp:", "/proc/self/status"]
        for name, kind, expected in (("default", DEFAULT, "2"), ("unconfined", UNCONFINED, "0")):
            container = self.secured(pod, sandbox, name, seccomp={"profile_type": kind})
            self.assertEqual(self.does(container, *mode).split()[1], expected)
            if name == "default":
                self.assertIn("not permitted", self.exec_fails(container, "unshare", "-U", "true"))
                self.does(container, "linux32", "true")
            else:
                self.does(container, "unshare", "-U", "true")
        own = self.secured(pod, sandbox, "own", seccomp={"profile_type": LOCALHOST, "localhost_ref": self.profile()})
        self.assertIn("Operation not permitted", self.exec_fails(own, "chmod", "400", "/"))
        for path in ("relative.json", "/no/such/profile.json", "/etc/passwd"):
            profile = {"profile_type": LOCALHOST, "localhost_ref": path}
            self.assertIn(path, self.refused(pod, sandbox, linux={"security_context": {"seccomp": profile}}))

    def test_paths_are_masked_and_read_only(self):
        pod, sandbox = self.pod()
        container = self.secured(pod, sandbox, "paths", masked_paths=["/etc/passwd"], readonly_paths=["/tmp"])
        self.assertEqual(self.does(container, "cat", "/etc/passwd"), "")
        self.assertIn("Read-only", self.exec_fails(container, "touch", "/tmp/x"))
        self.does(container, "touch", "/x")
        sealed = self.secured(pod, sandbox, "sealed", readonly_rootfs=True)
        self.assertIn("Read-only", self.exec_fails(sealed, "touch", "/x"))
        # Only paths that the client names are masked.
        self.assertNotIn(" /proc/", self.does(sealed, "cat", "/proc/mounts"))

    def test_kernel_parameters_are_the_pods_own(self):
        sysctls = {"kernel.shm_rmid_forced": "1", "fs.mqueue.msg_max": "100", "net.core.somaxconn": "77"}
        pod, sandbox = self.pod(linux={"sysctls": sysctls})
        container = self.container(pod, sandbox)
        for name, value in sysctls.items():
            self.assertEqual(self.does(container, "cat", "/proc/sys/" + name.replace(".", "/")), value)
        with open("/proc/sys/net/core/somaxconn") as hosts:
            self.assertNotEqual(hosts.read().strip(), "77")

    def test_containers_see_the_processes_that_they_share(self):
        own = {"pid": CONTAINER}
        pod, sandbox = self.pod(linux={"security_context": {"namespace_options": own}})
        first = self.secured(pod, sandbox, "first", command=["sleep", "7777"], namespace_options=own)
        alone = self.secured(pod, sandbox, "alone", namespace_options=own)
        self.assertNotIn("7777", self.does(alone, "ps"))
        target = {"pid": TARGET, "target_id": first}
        debugger = self.secured(pod, sandbox, "debugger", namespace_options=target)
        self.assertIn("7777", self.does(debugger, "ps"))
        self.assertIn("sleep", self.does(debugger, "cat", "/proc/1/cmdline"))
        together = self.secured(pod, sandbox, "together", namespace_options={"pid": POD}, command=["sleep", "8888"])
        other = self.secured(pod, sandbox, "other")
        self.assertIn("8888", self.does(other, "ps"))
        self.assertNotIn("7777", self.does(together, "ps"))
        missing = {"pid": TARGET, "target_id": "nobody"}
        self.assertIn("nobody", self.refused(pod, sandbox, linux={"security_context": {"namespace_options": missing}}))

    def test_ipc_is_the_pods_or_the_containers(self):
        pod, sandbox = self.pod()
        one = self.secured(pod, sandbox, "one", command=["sh", "-c", "echo hello > /dev/shm/word; sleep 3600"])
        two = self.secured(pod, sandbox, "two")
        self.assertEqual(self.does(two, "cat", "/dev/shm/word"), "hello")
        alone = self.secured(pod, sandbox, "alone", namespace_options={"ipc": CONTAINER})
        self.exec_fails(alone, "cat", "/dev/shm/word")
        self.assertNotEqual(self.does(alone, "readlink", "/proc/self/ns/ipc"), self.does(one, "readlink", "/proc/self/ns/ipc"))

    def test_users_of_a_user_namespace_are_others_in_the_machine(self):
        users = {"mode": POD, "uids": [{"host_id": 100000, "container_id": 0, "length": 65536}]}
        users["gids"] = users["uids"]
        # A user namespace brings a new IPC namespace, whose parameters are set too.
        sysctls = {"kernel.shm_rmid_forced": "1", "kernel.shmmax": "123456", "fs.mqueue.msg_max": "100", "net.core.somaxconn": "77"}
        pod, sandbox = self.pod(linux={"sysctls": sysctls, "security_context": {"namespace_options": {"userns_options": users}}})
        container = self.secured(pod, sandbox, "mapped", namespace_options={"userns_options": users})
        files = ["/proc/sys/" + name.replace(".", "/") for name in sysctls]
        self.assertEqual(self.does(container, "cat", *files).split(), list(sysctls.values()))
        self.assertEqual(self.does(container, "cat", "/proc/self/uid_map").split(), ["0", "100000", "65536"])
        self.assertEqual(self.does(container, "id", "-u"), "0")
        self.assertEqual(self.does(container, "stat", "-c", "%u:%g", "/etc/passwd"), "0:0")
        self.does(container, "sh", "-c", "echo mine > /file && chown 33:33 /file && echo more >> /etc/passwd")
        self.assertEqual(self.does(container, "stat", "-c", "%u:%g", "/file"), "33:33")
        self.assertEqual(self.does(container, "sh", "-c", "nc -l -p 80 -e echo hi & sleep 1; nc 127.0.0.1 80"), "hi")
        own = self.secured(pod, sandbox, "own", namespace_options={"userns_options": users, "pid": CONTAINER, "ipc": CONTAINER})
        self.assertIn("sleep", self.does(own, "cat", "/proc/1/cmdline"))
        for name in (container, own):
            self.node.cri.remove(name)
        other = {"mode": NODE}
        said = self.refused(pod, sandbox, linux={"security_context": {"namespace_options": {"userns_options": other}}})
        self.assertIn("userns_options", said)
        handlers = json.loads(self.node.crictl("info"))["runtimeHandlers"]
        able = {handler.get("name", ""): "user_namespaces" in handler["features"] for handler in handlers}
        self.assertEqual(able, {"": True, "kata-runtime": True, "runc": True})
        two = {**users, "uids": users["uids"] * 2}
        bad = self.node.sandbox_file("bad", linux={"security_context": {"namespace_options": {"userns_options": two}}})
        self.assertIn("exactly one", self.fails("runp", bad))

    def test_a_program_that_cannot_start_ends_with_128_and_says_why(self):
        pod, sandbox = self.pod()
        container = self.container(pod, sandbox, start=False, command=["/no/such/program"])
        self.assertIn("/no/such/program", self.fails("start", container))
        status = self.status(container)
        self.assertEqual((status["state"], status["exitCode"], status["reason"]), ("CONTAINER_EXITED", 128, "StartError"))
        self.assertIn("/no/such/program", status["message"])
        self.node.crictl("rm", container)

    def test_limits_reach_the_containers_cgroup(self):
        # The VM of this pod moves between processors, so no other test has it.
        pod, sandbox = self.pod("limited")
        limits = {
            "memory_limit_in_bytes": 64 << 20,
            "memory_swap_limit_in_bytes": 96 << 20,
            "oom_score_adj": 500,
            "cpuset_cpus": "0",
            "hugepage_limits": [{"page_size": "2MB", "limit": 4 << 20}, {"page_size": "64KB", "limit": 0}],
            "unified": {"memory.high": str(48 << 20), "pids.max": "99"},
        }
        container = self.container(pod, sandbox, linux={"resources": limits})
        for name, value in {
            "memory.max": 64 << 20,
            "memory.swap.max": 32 << 20,
            "memory.high": 48 << 20,
            "hugetlb.2MB.max": 4 << 20,
            "pids.max": 99,
        }.items():
            self.assertEqual(self.does(container, "cat", f"/sys/fs/cgroup/{name}"), str(value), name)
        self.assertEqual(self.does(container, "sh", "-c", "cat /proc/$(pidof sleep)/oom_score_adj"), "500")
        group = pathlib.Path(self.node.crictl_json("inspectp", pod)["info"]["cgroup"])
        self.assertEqual((group / "cpuset.cpus").read_text().strip(), "0")
        self.node.cri.remove(container)
        all_cpus = (group.parent / "cpuset.cpus.effective").read_text()
        self.assertEqual((group / "cpuset.cpus.effective").read_text(), all_cpus)
        for resources, word in (
            ({"oom_score_adj": 2000}, "oom_score_adj"),
            ({"hugepage_limits": [{"page_size": "64KB", "limit": 1}]}, "64KB"),
            ({"cpuset_cpus": "5000"}, "cpuset.cpus"),
        ):
            self.assertIn(word, self.refused(pod, sandbox, linux={"resources": resources}))

    def test_what_the_guest_does_not_have_is_refused_by_name(self):
        pod, sandbox = self.pod()
        for security, word in (
            ({"selinux_options": {"type": "container_t"}}, "selinux_options"),
            ({"namespace_options": {"network": NODE}}, "network namespace"),
            ({"namespace_options": {"pid": NODE}}, "pid namespace"),
        ):
            self.assertIn(word, self.refused(pod, sandbox, linux={"security_context": security}))
        self.assertIn("windows", self.refused(pod, sandbox, windows={}))
