"""The command `husk`: containers, listed and ended."""

from command import Command
from pods import SharedPodTest, json, wait_until


class Containers(Command, SharedPodTest):
    def test_containers_are_listed_followed_and_ended(self):
        # The two outputs are logged apart: only time puts them in an order.
        script = "echo two >&2; sleep 1; echo one; echo three; trap 'exit 3' TERM; while :; do sleep 0.2; done"
        _, container = self.running(name="job", command=["sh", "-c", script], labels={"app": "shop"})
        events = self.start("events", "--filter", "event=stopped", "--format", "{{.Event}} {{.Name}} {{.ExitCode}}")
        rows = json.loads(self.husk("ps", "-o", "json"))
        self.assertEqual([(row["ID"], row["Name"], row["State"], row["Pod"]) for row in rows],
                         [(container, "job", "running", "default/shared")])
        self.assertEqual(self.husk("ps", "-q", "--filter", "label=app=shop"), container)
        self.assertEqual(self.husk("ps", "-q", "--filter", "label=app=other"), "")
        self.assertIn("is not known", self.husk("ps", "--filter", "colour=red", code=1))

        wait_until(lambda: "three" in self.husk("logs", "job"), 60, "wait for the output")
        self.assertEqual(self.husk("logs", container[:6]).split(), ["one", "three"])
        self.assertEqual(self.husk("logs", "--tail", "1", "job"), "three")
        self.assertRegex(self.husk("logs", "-t", "--since", "1h", "job").splitlines()[0], r"^\d{4}-\d\d-\d\dT.* one$")
        self.assertIn("CPU %", self.husk("stats", "--no-stream", "job"))
        self.assertIn("stop it first", self.husk("rm", "job", code=1))

        waiting, following = self.start("wait", "job"), self.start("logs", "-f", "job")
        self.assertEqual(self.husk("stop", "-t", "60", "job"), "job")
        self.assertEqual((waiting.communicate(timeout=60)[0], waiting.returncode), ("3\n", 0))
        self.assertEqual(following.communicate(timeout=60)[0], "one\nthree\n")
        self.assertEqual(events.stdout.readline(), "stopped job 3\n")
        self.assertEqual(self.husk("ps", "-q"), "")
        self.assertRegex(self.husk("ps", "-a", "--format", "{{.Name}}: {{.Status}}"), r"^job: Exited \(3\) \d+[sm] ago$")
        self.assertEqual(self.husk("inspect", "--format", "{{.State.ExitCode}} {{.Pod.Name}}", "job"), "3 shared")
        self.assertEqual(self.husk("rm", "job"), "job")
        self.assertIn("there is no container job", self.husk("rm", "job", code=1))
        # The pod stays: it was not made for this container alone.
        self.assertEqual(self.husk("pod", "ls", "--format", "{{.Namespace}}/{{.Name}} {{.State}}"), "default/shared ready")

    def test_a_pod_is_shown_stopped_and_removed(self):
        pod, _ = self.pod("web")
        self.assertEqual(self.husk("pod", "inspect", "--format", "{{.ID}} {{.Info.config.hostname}}", "default/web"), f"{pod} web")
        self.assertRegex(self.husk("pod", "stats", "web", "--format", "{{.Name}} {{.CPUTime}}"), r"^web \d+\.\d\ds$")
        self.assertIn("stop it first", self.husk("pod", "rm", "web", code=1))
        self.assertEqual(self.husk("pod", "stop", "web"), "web")
        self.assertEqual(self.husk("pods", "-q", "--filter", "state=not ready"), pod)
        self.assertEqual(self.husk("pod", "rm", "web"), "web")
        self.assertEqual(self.husk("pods", "-q"), "")
