"""Runs the command `husk` in tests."""

import subprocess


class Command:
    """For tests of pods that drive them with `husk`."""

    def command(self, *arguments):
        return list(map(str, [self.node.prefix / "bin/husk", "--config", self.node.config, *arguments]))

    def husk(self, *arguments, code=0, stdin="", env=None):
        """Runs husk, which must end with this exit code; returns what it printed, without the last newline."""
        done = subprocess.run(self.command(*arguments), input=stdin, capture_output=True, text=True, timeout=300, env=env)
        self.assertEqual(done.returncode, code, f"{arguments}: {done.stdout}{done.stderr}")
        return (done.stdout if code == 0 else done.stderr).rstrip("\n")

    def start(self, *arguments, **settings):
        """Starts husk, which is killed at the end of the test if it still runs."""
        settings.setdefault("stdin", subprocess.DEVNULL)
        settings.setdefault("stdout", subprocess.PIPE)
        process = subprocess.Popen(self.command(*arguments), text=True, **settings)
        for stream in (process.stdout, process.stderr):
            if stream:
                self.addCleanup(stream.close)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        return process
