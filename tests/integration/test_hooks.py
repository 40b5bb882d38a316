"""OCI hooks that a handler's configuration adds to every container."""

from pods import PodTest, json, subprocess, wait_until

# The state that runc sends names the bundle.
BUNDLE = """read state; bundle=${state#*'"bundle":"'}; bundle=${bundle%%'"'*}"""
SCRIPT = f"""{BUNDLE}; echo "$WORD" > $bundle/rootfs/hooked"""
STEP = f"""{BUNDLE}; echo $WORD >> $bundle/rootfs/steps"""
KEEP = f"""{BUNDLE}; echo "$state" > $bundle/rootfs/state"""
# After the container has gone there is the guest's console alone.
LAST = """read state; echo "hook poststop: $state" > /dev/console"""


def hook(point, script, word=""):
    return (
        f"[[handlers.kata-runtime.hooks.{point}]]\npath = '/usr/bin/busybox'\n"
        f"args = ['sh', '-c', '''{script}''']\nenv = ['WORD={word}']\n"
    )


class Hooks(PodTest):
    handler_settings = (
        hook("create_runtime", SCRIPT, "before the start")
        + hook("start_container", "read state; sleep 3; echo inside > /inside")
        + hook("prestart", STEP, "prestart")
        + hook("create_runtime", STEP, "createRuntime")
        + hook("create_runtime", KEEP)
        + hook("create_container", STEP, "createContainer")
        + hook("start_container", "read state; echo startContainer >> /steps")
        + hook("poststart", STEP, "poststart")
        + hook("poststop", LAST)
    )

    def test_hooks_run_in_the_guest_at_their_points(self):
        _, container = self.running()
        self.assertEqual(self.node.crictl("exec", "-s", container, "cat", "/hooked"), "before the start")
        self.assertEqual(self.node.crictl("exec", "-s", container, "cat", "/inside"), "inside")

    def console(self, pod):
        husk = [self.node.prefix / "bin/husk", "--config", self.node.config, "console", pod]
        return subprocess.run(husk, capture_output=True, text=True, check=True, timeout=60).stdout

    def test_every_hook_runs_in_the_guest_once_and_at_its_point(self):
        pod, sandbox = self.pod("hooked")
        container = self.container(
            pod, sandbox, start=False, annotations={"of.the/client": "kept"},
            command=["sh", "-c", "cat /steps > /part && mv /part /before; sleep 3600"],
        )
        self.node.crictl("start", container)
        read = lambda path: self.node.crictl("exec", "-s", container, "cat", path)  # noqa: E731
        made = ["prestart", "createRuntime", "createContainer"]
        wait_until(lambda: self.node.crictl("exec", "-s", container, "ls", "-A", "/").count("before"), 30, "wait for the program")
        before = read("/before").split()
        self.assertEqual(before[:3], made)
        self.assertIn("startContainer", before)
        # runc does not wait for the one before it runs the other.
        self.assertEqual(sorted(read("/steps").split()), sorted([*made, "startContainer", "poststart"]))
        state = json.loads(read("/state"))
        self.assertEqual((state["id"], state["status"]), (container, "creating"))
        self.assertEqual(state["annotations"]["of.the/client"], "kept")
        self.assertEqual(state["annotations"]["io.kubernetes.cri.sandbox-name"], "hooked")
        self.assertNotIn("hook poststop", self.console(pod))
        self.node.crictl("rm", "-f", container)
        said = self.console(pod)
        self.assertEqual(said.count("hook poststop"), 1, said[-2000:])
        self.assertIn(container, said)
