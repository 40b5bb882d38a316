"""Resource usage, limits and events of pods and containers: stats, metrics, updates."""

from pods import PodTest, SharedPodTest, json, signal, subprocess, time, wait_until

LOOP = ["sh", "-c", "while :; do :; done"]


class Cost(PodTest):
    # All memory of a booted machine counts; of a clone's, only the memory that it has written.
    handler_settings = "template = false"

    def test_a_pod_costs_what_its_machine_costs(self):
        pod, sandbox = self.pod()
        container = self.container(pod, sandbox, command=LOOP)
        time.sleep(2)
        stats = self.node.crictl_json("statsp", "--id", pod)["stats"][0]
        self.assertEqual(stats["attributes"]["id"], pod)
        linux = stats["linux"]
        inside = linux["containers"][0]
        self.assertEqual(inside["attributes"]["id"], container)
        cpu = int(linux["cpu"]["usageCoreNanoSeconds"]["value"])
        self.assertGreater(cpu, int(inside["cpu"]["usageCoreNanoSeconds"]["value"]))
        memory = int(linux["memory"]["usageBytes"]["value"])
        self.assertGreater(memory, int(inside["memory"]["usageBytes"]["value"]))
        self.assertGreater(memory, 20 << 20)
        self.assertGreaterEqual(int(linux["process"]["processCount"]["value"]), 1)
        self.assertEqual(linux["network"]["defaultInterface"]["name"], "eth0")
        # A second reading shows the present usage.
        time.sleep(2)
        linux = self.node.crictl_json("statsp", "--id", pod)["stats"][0]["linux"]
        for cpu in (linux["cpu"], linux["containers"][0]["cpu"]):
            self.assertGreater(int(cpu["usageNanoCores"]["value"]), 20_000_000)


class Figures(PodTest):
    def test_the_network_is_counted(self):
        pod, sandbox = self.pod()
        container = self.container(pod, sandbox)

        def sent():
            network = self.node.crictl_json("statsp", "--id", pod)["stats"][0]["linux"]["network"]
            return int(network["defaultInterface"]["txBytes"]["value"])

        before = sent()
        self.node.exec(container, "ping", "-c", "3", "-s", "1000", "10.88.0.1")
        self.assertGreater(sent() - before, 3000)

    def test_metrics_have_descriptions_and_true_values(self):
        pod, sandbox = self.pod()
        container = self.container(pod, sandbox, command=["sh", "-c", "dd if=/dev/zero of=/file bs=1M count=3; sleep 3600"])
        time.sleep(1)
        described = {d["name"]: d["labelKeys"] for d in self.node.crictl_json("metricdescs")["descriptors"]}
        metrics = self.node.crictl_json("metricsp")["podMetrics"][0]
        self.assertEqual(metrics["podSandboxId"], pod)
        inside = metrics["containerMetrics"][0]
        self.assertEqual(inside["containerId"], container)
        for metric in metrics["metrics"] + inside["metrics"]:
            self.assertEqual(len(described[metric["name"]]), len(metric["labelValues"]), metric["name"])
        values = {m["name"]: int(m["value"]["value"]) for m in metrics["metrics"] + inside["metrics"]}
        self.assertGreaterEqual(values["container_fs_usage_bytes"], 3 << 20)
        self.assertEqual(values["container_processes"], 1)
        self.assertGreater(values["container_start_time_seconds"], time.time() - 600)
        self.assertGreater(values["husk_guest_memory_total_bytes"], 100 << 20)


class Updates(SharedPodTest):
    def limits(self, container):
        return self.status(container)["resources"]["linux"]

    def test_new_limits_hold_in_the_guest_and_are_told(self):
        limit = {"resources": {
            "memory_limit_in_bytes": 64 << 20, "memory_swap_limit_in_bytes": 64 << 20, "cpu_shares": 512,
        }}
        _, container = self.running(linux=limit)
        read = lambda name: self.node.exec(container, "cat", f"/sys/fs/cgroup/{name}")
        self.assertEqual(read("memory.max"), str(64 << 20))
        self.node.crictl("update", "--memory", str(96 << 20), "--cpu-quota", "50000", "--cpu-period", "100000", container)
        self.assertEqual(read("memory.max"), str(96 << 20))
        self.assertEqual(read("cpu.max"), "50000 100000")
        told = self.limits(container)
        self.assertEqual((told["memoryLimitInBytes"], told["cpuQuota"], told["cpuShares"]), (str(96 << 20), "50000", "512"))
        self.assertEqual(told["memorySwapLimitInBytes"], str(96 << 20))
        self.node.daemon.send_signal(signal.SIGKILL)
        self.node.daemon.wait()
        self.node.start_daemon()
        self.assertEqual(self.limits(container), told)
        available = self.node.crictl_json("stats", container)["stats"][0]["memory"]["availableBytes"]["value"]
        self.assertGreater(int(available), 64 << 20)

    def test_a_lower_limit_ends_in_an_oom_kill(self):
        fill = "until [ -e /go ]; do sleep 0.1; done; x=a; while :; do x=$x$x; done"
        _, container = self.running(command=["sh", "-c", fill])
        self.node.crictl("update", "--memory", str(24 << 20), container)
        self.node.exec(container, "touch", "/go")
        status = self.wait_exited(container)
        self.assertEqual((status["exitCode"], status["reason"]), (137, "OOMKilled"))

    def test_limits_of_a_created_container_hold_when_it_starts(self):
        pod, sandbox = self.pod()
        command = ["sh", "-c", "cat /sys/fs/cgroup/memory.max; sleep 3600"]
        container = self.container(pod, sandbox, start=False, command=command)
        self.node.crictl("update", "--memory", str(48 << 20), container)
        self.node.crictl("start", container)
        wait_until(lambda: self.node.crictl("logs", container) == str(48 << 20), 30, "wait for output")

    def test_what_the_kernel_refuses_changes_nothing(self):
        _, container = self.running(linux={"resources": {"memory_limit_in_bytes": 64 << 20}})
        before = self.limits(container)
        self.assertIn("cpu", self.fails("update", "--cpu-quota", "1", "--cpu-period", "100000", container))
        # Nor does what the machine does not have.
        for more in (("--memory", str(8 << 30)), ("--cpu-quota", "6400000", "--cpu-period", "100000")):
            self.assertIn("cannot grow", self.fails("update", *more, container))
        self.assertEqual(self.limits(container), before)


class Events(PodTest):
    def test_every_step_of_a_life_is_told_once_and_in_order(self):
        command = [self.node.crictl_program, "--config", str(self.node.root / "crictl.yaml"), "events"]
        told = self.node.root / "events.json"
        with open(told, "wb") as out, subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT) as listener:
            time.sleep(2)
            pod, sandbox = self.pod()
            container = self.container(pod, sandbox, command=["sh", "-c", "exit 4"])
            self.wait_exited(container)
            self.node.crictl("rm", container)
            self.node.crictl("stopp", pod)
            self.node.crictl("rmp", pod)
            wait_until(lambda: len(events(told)) >= 8, 30, "wait for events")
            self.assertEqual(
                [(event["containerId"], event["containerEventType"]) for event in events(told)],
                [(pod, CREATED), (pod, STARTED), (container, CREATED), (container, STARTED), (container, STOPPED),
                 (container, DELETED), (pod, STOPPED), (pod, DELETED)],
            )
            end = events(told)[4]
            self.assertEqual(end["containersStatuses"][0]["exitCode"], 4)
            self.assertEqual(end["podSandboxStatus"]["state"], "SANDBOX_READY")
            self.assertEqual(events(told)[5]["containersStatuses"], [])
            # A daemon that is asked to end does so, even if clients still listen.
            self.node.daemon.send_signal(signal.SIGTERM)
            self.node.daemon.wait(20)
            listener.wait(20)
        self.node.start_daemon()


CREATED, STARTED, STOPPED, DELETED = (
    f"CONTAINER_{what}_EVENT" for what in ("CREATED", "STARTED", "STOPPED", "DELETED")
)


def events(path):
    """The JSON values in a file, one after the other, as far as they are complete."""
    text, found, decoder = path.read_text(), [], json.JSONDecoder()
    while text := text.lstrip():
        try:
            value, end = decoder.raw_decode(text)
        except json.JSONDecodeError:
            break
        found.append(value)
        text = text[end:]
    return found


