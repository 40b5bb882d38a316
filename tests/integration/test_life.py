"""The life of pods and containers as a client sees it."""

from pods import PodTest, can_connect, json, leases, machines, os, signal, subprocess, time, wait_until


class Life(PodTest):
    def test_a_container_runs_in_a_kernel_of_its_own_and_leaves_a_true_record(self):
        pod, container = self.running(command=["sh", "-c", "uname -r; echo oops >&2; exit 3"])
        [made] = [line for line in self.node.log_tail("huskd", 50) if container in line and line.endswith("container created")]
        self.assertEqual((made.count("sandbox="), made.count("container=")), (1, 1), made)
        status = self.wait_exited(container)
        self.assertEqual((status["exitCode"], status["reason"]), (3, "Error"))
        log = self.node.crictl("logs", container)
        with open("/proc/sys/kernel/osrelease") as kernel:
            self.assertNotIn(kernel.read().strip(), log)
        with open(status["logPath"]) as lines:
            streams = sorted(line.split()[1:3] for line in lines)
        self.assertEqual(streams, [["stderr", "F"], ["stdout", "F"]])

    def test_all_output_is_in_the_log_when_the_exit_is(self):
        _, container = self.running(command=["sh", "-c", "seq 20000; printf end"])
        self.assertEqual(self.wait_exited(container)["exitCode"], 0)
        lines = self.node.crictl("logs", container).splitlines()
        self.assertEqual((len(lines), lines[-1]), (20001, "end"))

    def test_no_line_is_lost_or_repeated_when_huskd_is_killed(self):
        self.speak_while_huskd_dies()

    def test_exec_answers_with_output_and_exit_code_and_has_a_time_limit(self):
        _, container = self.running()
        said = self.node.crictl("exec", "-s", container, "sh", "-c", "echo out; echo err >&2")
        self.assertEqual(said.split(), ["out", "err"])
        self.assertIn("exited with 7", self.fails("exec", "-s", container, "sh", "-c", "exit 7"))
        started = time.monotonic()
        self.assertIn("timed out", self.fails("exec", "-s", "--timeout", "2", container, "sleep", "600"))
        self.assertLess(time.monotonic() - started, 60)
        self.assertIn("not found", self.fails("exec", "-s", container, "no-such-program"))
        # A command ends when its caller stops waiting.
        runs = lambda: "sleep 601" in self.node.crictl("exec", "-s", container, "ps")
        caller = self.in_background("exec", "-s", container, "sleep", "601")
        wait_until(runs, 60, "wait for the command")
        caller.kill()
        wait_until(lambda: not runs(), 60, "wait for the end of the command")

    def test_stop_asks_first_and_kills_then(self):
        pod, sandbox = self.pod()
        polite = self.container(pod, sandbox, "polite", command=["sh", "-c", "trap 'exit 5' TERM; while :; do sleep 0.1; done"])
        deaf = self.container(pod, sandbox, "deaf", command=["sh", "-c", "trap '' TERM; while :; do sleep 0.1; done"])
        time.sleep(1)
        self.node.crictl("stop", "--timeout", "60", polite)
        self.assertEqual(self.status(polite)["exitCode"], 5)
        # A caller with a short time limit does not wait for one with a longer limit.
        patient = self.in_background("stop", "--timeout", "500", deaf)
        time.sleep(2)
        self.assertIsNone(patient.poll())
        started = time.monotonic()
        self.node.crictl("stop", "--timeout", "1", deaf)
        self.assertLess(time.monotonic() - started, 120)
        self.assertEqual(self.status(deaf)["exitCode"], 137)
        self.assertEqual(patient.wait(60), 0)
        self.node.crictl("stop", deaf)

    def test_a_machines_clock_follows_the_hosts(self):
        security = {"security_context": {"privileged": True}}
        pod, sandbox = self.pod(linux=security)
        container = self.container(pod, sandbox, linux=security)
        right = lambda: abs(int(self.node.exec(container, "date", "+%s")) - time.time()) < 5
        self.assertTrue(right())
        # The machine sees this as if the host's clock had been set.
        self.node.exec(container, "date", "-s", "@1000000000")
        self.assertFalse(right())
        wait_until(right, 120, "wait for the right time")

    def test_names_are_reserved_and_given_back(self):
        pod, sandbox = self.pod("twin")
        self.assertIn("AlreadyExists", self.fails("runp", sandbox))
        self.container(pod, sandbox, "one", start=False)
        config = self.node.container_file("one", "busybox", command=["sleep", "1"])
        self.assertIn("AlreadyExists", self.fails("create", pod, config, sandbox))
        self.node.cri.remove_pod(pod)
        self.pod("twin")

    def test_lists_filter_by_id_state_and_label(self):
        pod, sandbox = self.pod("listed", labels={"tier": "front"})
        first = self.container(pod, sandbox, "first")
        second = self.container(pod, sandbox, "second", start=False)
        crictl = self.node.crictl
        self.assertEqual(crictl("pods", "-q", "--label", "tier=front"), pod)
        self.assertEqual(crictl("pods", "-q", "--label", "tier=back"), "")
        self.assertEqual(crictl("pods", "-q", "--state", "notready"), "")
        self.assertEqual(crictl("ps", "-q"), first)
        self.assertEqual(crictl("ps", "-aq", "--state", "created"), second)
        self.assertEqual(self.status(first[:8])["id"], first)
        self.assertIn(pod, crictl("inspectp", pod[:8]))

    def test_removed_and_unknown_things_can_be_stopped_and_removed_again(self):
        pod, container = self.running()
        for _ in range(2):
            self.node.crictl("stopp", pod)
        self.assertEqual(self.status(container)["exitCode"], 137)
        self.node.crictl("rmp", pod)
        # crictl asks for the pod's status first, and that is not found.
        self.assertIn("NotFound", self.fails("rmp", pod))
        self.node.crictl("stopp", pod)

    def test_containers_of_a_pod_share_network_and_host_name_and_not_files(self):
        pod, sandbox = self.pod("shared", hostname="the-pod")
        one = self.container(pod, sandbox, "one", command=["sh", "-c", "echo mine > /here; nc -l -p 700 -e echo hello"])
        two = self.container(pod, sandbox, "two")
        self.assertEqual(self.node.exec(two, "hostname"), "the-pod")
        self.exec_fails(two, "cat", "/here")
        self.assertEqual(self.node.exec(one, "cat", "/here"), "mine")
        said = self.node.exec(two, "sh", "-c", "for i in 1 2 3 4 5 6 7 8 9; do nc 127.0.0.1 700 && break; sleep 0.3; done")
        self.assertEqual(said, "hello")

    def test_a_memory_limit_ends_in_an_oom_kill_that_is_called_so(self):
        limit = {"resources": {"memory_limit_in_bytes": 24 << 20}}
        _, container = self.running(command=["sh", "-c", "x=a; while :; do x=$x$x; done"], linux=limit)
        status = self.wait_exited(container)
        self.assertEqual((status["exitCode"], status["reason"]), (137, "OOMKilled"))

    def test_stats_count_what_a_container_uses(self):
        _, container = self.running(command=["sh", "-c", "while :; do :; done"])
        time.sleep(2)
        stats = self.node.crictl_json("stats", container)["stats"][0]
        self.assertGreater(int(stats["cpu"]["usageCoreNanoSeconds"]["value"]), 100_000_000)
        self.assertGreater(int(stats["memory"]["usageBytes"]["value"]), 0)

    def test_a_log_goes_on_in_a_new_file_after_rotation(self):
        _, container = self.running(command=["sh", "-c", "while :; do echo tick; sleep 0.2; done"])
        path = self.status(container)["logPath"]
        wait_until(lambda: self.node.crictl("logs", container), 30, "wait for output")
        subprocess.run(["mv", path, path + ".1"], check=True)
        self.node.crictl("logs", "--reopen", "--tail", "1", container)
        wait_until(lambda: open(path).read(), 30, "wait for output in the new file")

    def test_a_host_port_leads_into_the_pod(self):
        ports = [
            {"protocol": 0, "container_port": 7000, "host_port": 17000},
            {"protocol": 0, "container_port": 7000, "host_port": 17001, "host_ip": "127.0.0.1"},
            {"protocol": 0, "container_port": 7001},
        ]
        pod, sandbox = self.pod("port", port_mappings=ports)
        self.container(pod, sandbox, command=["sh", "-c", "while :; do nc -l -p 7000 -e echo hello; done"])
        wait_until(lambda: can_connect(("127.0.0.1", 17000)), 60, "wait for the host port")
        # One port is the host's at every address, the other at this one alone.
        bridge = self.node.crictl_json("inspectp", pod)["status"]["network"]["ip"].rsplit(".", 2)[0] + ".0.1"
        for address in ((bridge, 17000), ("127.0.0.1", 17001)):
            wait_until(lambda to=address: can_connect(to), 60, f"wait for {address}")
        for _ in range(10):
            self.assertFalse(can_connect((bridge, 17001)))
            time.sleep(0.2)


class Daemon(PodTest):
    """The daemon may die at any instruction; pods live on."""

    def test_pods_live_on_when_the_daemon_dies(self):
        pod, sandbox = self.pod()
        # The agent does not know a container whose program is missing; the others are supervised all the same.
        for name in ("a", "b"):
            self.container(pod, sandbox, name, command=["/no/such/program"], start=False)
        container = self.container(pod, sandbox, command=["sh", "-c", "trap 'exit 9' TERM; n=0; while :; do echo $n; n=$((n+1)); sleep 0.2; done"])
        before = machines()
        self.kill_daemon()
        self.assertEqual(machines(), before)
        self.node.start_daemon()
        self.assertEqual(self.node.crictl("pods", "-q", "--state", "ready"), pod)
        self.assertEqual(self.status(container)["state"], "CONTAINER_RUNNING")
        self.assertEqual(self.node.exec(container, "echo", "here"), "here")
        lines = len(self.node.crictl("logs", container).splitlines())
        wait_until(lambda: len(self.node.crictl("logs", container).splitlines()) > lines, 30, "wait for more output")
        self.node.crictl("stop", "--timeout", "60", container)
        self.assertEqual(self.status(container)["exitCode"], 9)

    def test_a_container_that_ends_without_the_daemon_has_all_its_output_in_the_log(self):
        said = "while [ ! -e /go ]; do sleep 0.1; done; sleep 2; seq 3000; printf end; exit 4"
        pod, container = self.running(command=["sh", "-c", said])
        self.node.crictl("exec", "-s", container, "touch", "/go")
        self.kill_daemon()
        # This is longer than an agent waits for a client to take the last output.
        time.sleep(40)
        self.node.start_daemon()
        self.assertEqual(self.wait_exited(container)["exitCode"], 4)
        lines = self.node.crictl("logs", container).splitlines()
        self.assertEqual(lines, [str(number) for number in range(1, 3001)] + ["end"])

    def test_a_machine_that_stood_still_loses_neither_an_exit_nor_output(self):
        pod, container = self.running(command=["sh", "-c", "while [ ! -e /go ]; do sleep 0.1; done; echo last; exit 3"])
        [machine] = machines()
        os.kill(machine, signal.SIGSTOP)
        try:
            asking = [self.in_background("stats", "--id", container) for _ in range(30)]
            time.sleep(10)
            # Output that no client waits for arrives all the same, and at once.
            for process in asking:
                process.kill()
                process.wait()
        finally:
            os.kill(machine, signal.SIGCONT)
        self.node.crictl("exec", "-s", container, "touch", "/go")
        self.assertEqual(self.wait_exited(container)["exitCode"], 3)
        self.assertEqual(self.node.crictl("logs", container), "last")

    def test_a_machine_that_stands_still_when_the_daemon_starts_is_unreached_and_stays(self):
        pod, container = self.running()
        [machine] = machines()
        self.kill_daemon()
        os.kill(machine, signal.SIGSTOP)
        try:
            self.node.start_daemon()
            unreached = lambda: self.node.crictl_json("inspectp", pod)["info"]["unreached"]
            wait_until(unreached, 240, "wait until the pod is given up for now")
            self.assertEqual(self.node.crictl("pods", "-q", "--state", "ready"), pod)
        finally:
            os.kill(machine, signal.SIGCONT)
        wait_until(lambda: not unreached(), 240, "wait until the pod is reached")
        self.assertEqual(machines(), [machine])
        self.assertEqual(self.node.crictl("exec", "-s", container, "echo", "here"), "here")

    def test_a_pod_whose_record_does_not_read_lives_and_comes_back_with_it(self):
        pod, sandbox = self.pod()
        container = self.container(pod, sandbox)
        before = machines()
        self.kill_daemon()
        path = self.node.state / "sandboxes" / pod / "sandbox.json"
        good = path.read_text()
        path.write_text(good[:-20])
        self.node.start_daemon()
        self.assertEqual((machines(), self.node.crictl("pods", "-q")), (before, ""))
        for arguments in (["stopp", pod], ["rmp", pod], ["runp", sandbox]):
            self.assertIn("does not read", self.fails(*arguments))
        self.assertIn(pod, json.dumps(self.node.crictl_json("info")["unread_records"]))
        self.kill_daemon()
        path.write_text(good)
        self.node.start_daemon()
        self.assertEqual(self.node.crictl("exec", "-s", container, "echo", "here"), "here")

    def test_a_daemon_that_has_not_the_pods_state_does_not_start(self):
        pod, container = self.running()
        before = machines()
        program = [self.node.prefix / "bin/huskd", "--config"]
        second = subprocess.run([*program, self.node.config], capture_output=True, text=True, timeout=60)
        self.assertIn("another huskd", second.stdout + second.stderr)
        self.kill_daemon()
        other = self.node.root / "other.toml"
        other.write_text(self.node.config.read_text().replace(str(self.node.state), str(self.node.root / "unmounted")))
        wrong = subprocess.run([*program, other], capture_output=True, text=True, timeout=60)
        self.assertNotEqual(wrong.returncode, 0)
        self.assertIn("mount it and start huskd again", wrong.stdout + wrong.stderr)
        self.node.start_daemon()
        self.assertEqual(machines(), before)
        self.assertEqual(self.node.crictl("exec", "-s", container, "echo", "here"), "here")

    def test_a_machine_that_dies_takes_its_containers_with_it_and_is_told_so(self):
        pod, container = self.running()
        machine = machines()[0]
        subprocess.run(["kill", "-KILL", str(machine)], check=True)
        status = self.wait_exited(container, 30)
        self.assertNotEqual(status["exitCode"], 0)
        self.assertNotEqual(status["reason"], "Completed")
        self.assertEqual(self.node.crictl("pods", "-q", "--state", "notready"), pod)

    def test_a_machine_that_the_node_has_no_memory_for_is_told_so(self):
        pod, container = self.running()
        limit = os.path.join(self.record(pod)["cgroup"], "memory.max")
        if not os.path.exists(limit):
            self.skipTest("the node counts no memory")
        with open(limit, "w") as file:
            file.write("1M")
        status = self.wait_exited(container, 30)
        self.assertEqual((status["exitCode"], status["reason"]), (137, "OOMKilled"))
        self.assertIn("memory on the node ran out", status["message"])

    def record(self, pod):
        """Returns a pod's record on disk."""
        return json.loads((self.node.state / "sandboxes" / pod / "sandbox.json").read_text())

    def test_a_stop_is_finished_although_the_daemon_dies_in_the_middle(self):
        pod, sandbox = self.pod()
        container = self.container(pod, sandbox, start=False)
        [machine] = machines()
        command = [self.node.crictl_program, "--config", str(self.node.root / "crictl.yaml"), "stopp", pod]
        # A VMM that is stopped does not end when it is asked to.
        os.kill(machine, signal.SIGSTOP)
        try:
            with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as stopp:
                try:
                    wait_until(lambda: self.record(pod)["phase"] == "not_ready", 60, "wait for the stop to begin")
                finally:
                    self.kill_daemon()
                stopp.wait()
        finally:
            os.kill(machine, signal.SIGCONT)
        self.node.start_daemon()
        self.assertEqual(self.node.crictl("pods", "-q", "--state", "notready"), pod)
        self.assertEqual(self.status(container)["state"], "CONTAINER_EXITED")
        # Nobody has requested that again.
        wait_until(lambda: not machines(), 20, "wait for the machine to go")
        self.assertEqual(leases(self.node), [])
        self.assertFalse((self.node.state / "sandboxes" / pod / "scratch.ext4").exists())

    def test_what_died_with_the_daemon_is_given_back(self):
        pod, container = self.running()
        machine = machines()[0]
        self.kill_daemon()
        subprocess.run(["kill", "-KILL", str(machine)], check=True)
        self.node.start_daemon()
        self.assertEqual(self.node.crictl("pods", "-q", "--state", "notready"), pod)
        self.assertNotEqual(self.status(container)["exitCode"], 0)

    def test_half_a_pod_is_taken_apart(self):
        config = self.node.sandbox_file("half")
        command = [self.node.crictl_program, "--config", str(self.node.root / "crictl.yaml"), "runp", str(config)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as runp:
            wait_until(lambda: machines(), 60, "wait for the machine")
            self.kill_daemon()
            runp.wait()
        self.node.start_daemon()
        self.assertEqual(self.node.cri.pods(), [])
        self.assert_nothing_left()
