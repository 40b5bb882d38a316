"""`husk run` and what goes with it: containers in pods of their own, made, entered and ended by the command alone."""

import os
import pty
import signal
import subprocess

from command import Command
from pods import PodTest, can_connect, wait_until

HANDLERS = ("kata-runtime", "runc")


class Run(Command, PodTest):
    def image(self):
        return self.node.image("busybox")

    def nothing_is_left(self):
        self.assertEqual((self.husk("ps", "-aq"), self.husk("pods", "-q")), ("", ""))
        folder = self.node.state / "command"
        self.assertEqual(list(folder.iterdir()) if folder.exists() else [], [])

    def test_a_program_runs_to_its_end_and_nothing_is_left(self):
        for handler in HANDLERS:
            with self.subTest(handler):
                words = ["run", "-i", "--rm", "--handler", handler, "-e", "A=1", self.image()]
                script = "echo $A; echo wrong >&2; cat; exit 7"
                done = subprocess.run(
                    self.command(*words, "sh", "-c", script), input="typed\n", capture_output=True, text=True, timeout=300
                )
                self.assertEqual((done.returncode, done.stdout), (7, "1\ntyped\n"), done.stderr)
                self.assertIn("wrong\n", done.stderr)
                self.nothing_is_left()

    def test_what_cannot_run_is_told_by_the_exit_code_and_nothing_is_left(self):
        said = self.husk("run", "--handler", "runc", self.image(), "no-such-program", code=127)
        self.assertIn("no-such-program", said)
        self.assertIn("--restart is not possible", self.husk("run", "--restart", "always", self.image(), code=125))
        self.assertIn("none.invalid", self.husk("run", "--pull", "never", "none.invalid/x", code=125))
        self.nothing_is_left()

    def test_a_shell_has_a_terminal(self):
        ours, theirs = pty.openpty()
        self.addCleanup(os.close, ours)
        words = self.command("run", "-it", "--rm", self.image())
        shell = subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=theirs)
        os.close(theirs)
        self.addCleanup(shell.wait)
        self.addCleanup(shell.kill)
        self.read_until(ours, b"#", 120)
        os.write(ours, b"tty; exit 5\n")
        self.read_until(ours, b"/dev/pts/0", 120)
        self.assertEqual(shell.wait(timeout=120), 5)
        self.nothing_is_left()

    def test_ctrl_c_ends_the_container_and_its_pod(self):
        words = ["run", "--rm", "--name", "sleeper", "--stop-timeout", "1", self.image(), "sleep", "1000"]
        sleeper = self.start(*words)
        wait_until(lambda: self.husk("ps", "-q"), 120, "wait for the container")
        sleeper.send_signal(signal.SIGINT)
        self.assertEqual(sleeper.wait(timeout=120), 137)
        self.nothing_is_left()

    def test_a_container_goes_on_and_is_entered_and_ended(self):
        script = "trap 'exit 3' TERM; echo up; while :; do sleep 0.2; done"
        container = self.husk("run", "-d", "--name", "web", "--hostname", "shop", self.image(), "sh", "-c", script)
        self.assertEqual(self.husk("ps", "-q"), container)
        self.assertIn("is container", self.husk("run", "--name", "web", self.image(), code=125))
        self.assertEqual(self.husk("exec", "web", "hostname"), "shop")
        self.assertEqual(self.husk("exec", "-i", "web", "cat", stdin="typed"), "typed")
        self.husk("exec", "web", "sh", "-c", "exit 4", code=4)
        self.assertEqual(self.husk("run", "--rm", "--pod", "web", self.image(), "hostname"), "shop")
        wait_until(lambda: self.husk("logs", "web") == "up", 60, "wait for the output")
        self.assertEqual(self.husk("stop", "web"), "web")
        self.assertEqual(self.husk("inspect", "--format", "{{.State.ExitCode}}", "web"), "3")
        self.assertEqual(self.husk("rm", "web"), "web")
        self.nothing_is_left()

    def test_a_port_is_published_and_goes_with_the_pod(self):
        script = "while :; do nc -l -p 7000 -e echo hello; done"
        self.husk("run", "-d", "--name", "web", "-p", "127.0.0.1:17002:7000", self.image(), "sh", "-c", script)
        self.assertEqual(self.husk("port", "web", "7000"), "127.0.0.1:17002")
        wait_until(lambda: can_connect(("127.0.0.1", 17002)), 60, "wait for the port")
        self.assertEqual(self.husk("pod", "rm", "-f", "husk/web"), "husk/web")
        self.assertFalse(can_connect(("127.0.0.1", 17002)))
        self.nothing_is_left()

    def test_a_container_is_made_now_and_started_later(self):
        made = self.husk("create", "--name", "later", "--handler", "runc", self.image(), "echo", "done")
        self.assertEqual(self.husk("ps", "-a", "--format", "{{.ID}} {{.State}}"), f"{made} created")
        self.assertEqual(self.husk("start", "later"), "later")
        self.assertEqual(self.husk("wait", "later"), "0")
        self.assertEqual(self.husk("logs", "later"), "done")
        self.assertIn("starts a container once", self.husk("start", "later", code=1))
        self.assertEqual(self.husk("rm", "later"), "later")
        self.nothing_is_left()
