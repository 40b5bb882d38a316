"""Machines that are clones: what is unique to each, and the effect of a missing or damaged template."""

from pods import PodTest, named, time, wait_until


class Templates(PodTest):
    def setUp(self):
        super().setUp()
        self.wait_for_templates(1)

    def wait_for_templates(self, count):
        """Waits for templates: until there is one, machines boot."""
        wait_until(lambda: len(self.states()) >= count, 120, "wait for a template")

    def pods_said(self):
        """Returns whether each pod was a clone, in the order of their starts."""
        return ["cloned=true" in line for line in self.node.log_tail("huskd", 10_000) if "pod ready" in line]

    def states(self):
        return [path for path in (self.node.state / "templates").glob("*/state") if path.parent.suffix != ".new"]

    def test_clones_have_a_clock_and_random_numbers_of_their_own(self):
        seen = []
        for _ in range(2):
            pod, container = self.running()
            run = lambda *words, of=container: self.node.exec(of, *words)  # noqa: E731
            before = time.time()
            now = int(run("date", "+%s"))
            self.assertTrue(before - 3 <= now <= time.time() + 3, f"{now} at {before}")
            # An id that the kernel has made since, and the first numbers of its generator.
            seen += [run("cat", "/proc/sys/kernel/random/boot_id"), run("sh", "-c", "head -c 16 /dev/urandom | md5sum")]
        self.assertEqual(len(set(seen)), 4, seen)
        self.assertEqual(self.pods_said()[-2:], [True, True])

    def test_a_size_that_is_asked_for_again_gets_a_template_and_no_pod_waits_for_it(self):
        before = len(self.states())
        # No other test asks for this size.
        linux = {"resources": {"memory_limit_in_bytes": 68 << 20}}
        self.pod(linux=linux)
        self.pod(linux=linux)
        self.assertEqual(self.pods_said()[-2:], [False, False])
        self.wait_for_templates(before + 1)
        pod, sandbox = self.pod(linux=linux)
        self.assertTrue(self.pods_said()[-1])
        # The limit is on top of the handler's own 256 MiB.
        memory = self.node.exec(self.container(pod, sandbox), "grep", "MemTotal", "/proc/meminfo")
        self.assertGreater(int(memory.split()[1]), 260 << 10)

    def test_a_damaged_template_costs_no_pod(self):
        saved = lambda: sum("template saved" in line for line in self.node.log_tail("huskd", 10_000))  # noqa: E731
        before = saved()
        for state in self.states():
            state.write_bytes(b"HUSKSNAP, and then nonsense")
        self.running()
        self.assertFalse(self.pods_said()[-1])
        self.assertIn("failed to clone a VM; booting one instead", "\n".join(self.node.log_tail("huskd", 50)))
        # The template is made again when it is needed.
        self.pod()
        wait_until(lambda: saved() > before, 120, "wait for the template")
        self.pod()
        self.assertTrue(self.pods_said()[-1])

    def test_a_daemon_that_dies_while_it_makes_one_leaves_nothing(self):
        self.pod()
        for pod in self.node.cri.pods():
            self.node.cri.remove_pod(pod)
        self.kill_daemon()
        for state in self.states():
            state.unlink()
        self.node.start_daemon()
        wait_until(lambda: named("husk-vmm"), 60, "wait for the machine of a template")
        self.kill_daemon()
        self.assertTrue(named("husk-vmm"), "it ended with its daemon: this test shows nothing")
        self.node.start_daemon()
        wait_until(self.states, 120, "wait for the template")
        wait_until(lambda: not named("husk-vmm"), 20, "wait for the end of the template's machine")
        self.assertEqual(list((self.node.root / "run/templates").iterdir()), [])
        self.pod()
        self.assertTrue(self.pods_said()[-1])
