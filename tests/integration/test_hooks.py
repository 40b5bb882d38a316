"""OCI hooks that a handler's configuration adds to every container."""

from pods import PodTest, json, subprocess, wait_until

# The state that runc sends names the bundle.
BUNDLE = """read state; bundle=${state#*'"bundle":"'}; bundle=${bundle%%'"'*}"""
SCRIPT = f"""{BUNDLE}; echo "$WORD" > $bundle/rootfs/hooked"""
STEP = f"""{BUNDLE}; echo $WORD >> $bundle/rootfs/steps"""
KEEP = f"""{BUNDLE}; echo "$state" > $bundle/rootfs/state"""
# After the container has ended, there are the guest's console and the pod's volumes.
LAST = """
read state
echo "hook poststop: $state" > /dev/console
for volume in /run/husk/shared/*; do
    if [ -d $volume ]; then echo "$state" >> $volume/poststop; fi
done
"""
# On the host the bundle is below the node's own directory.
LAST_ON_HOST = f"""{BUNDLE}; echo "$state" >> ${{bundle%/run/sandboxes/*}}/poststop-on-host"""


def hook(point, script, word="", handler="kata-runtime"):
    return (
        f"[[handlers.{handler}.hooks.{point}]]\npath = '/usr/bin/busybox'\n"
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
    settings = hook("poststop", LAST_ON_HOST, handler="runc")

    def check_told(self, path, container):
        """Checks that a `poststop` hook has reported this container, once."""
        told = [json.loads(line) for line in path.read_text().splitlines()]
        self.assertEqual([(state["id"], state["status"]) for state in told], [(container, "stopped")])

    def test_hooks_run_in_the_guest_at_their_points(self):
        folder = self.node.root / "hooked"
        folder.mkdir()
        pod, container = self.running(mounts=[{"host_path": str(folder), "container_path": "/data"}])
        self.assertEqual(self.node.exec(container, "cat", "/hooked"), "before the start")
        self.assertEqual(self.node.exec(container, "cat", "/inside"), "inside")
        # The kubelet stops a pod, and then removes its containers, which have no machine any more.
        self.assertFalse((folder / "poststop").exists())
        self.node.crictl("stopp", pod)
        self.check_told(folder / "poststop", container)
        self.node.crictl("rm", container)
        self.check_told(folder / "poststop", container)

    def test_hooks_after_the_end_run_on_the_host_when_the_pod_is_stopped(self):
        told = self.node.root / "poststop-on-host"
        config = self.node.sandbox_file("on-host")
        pod = self.node.crictl("runp", "--runtime", "runc", config)
        container = self.container(pod, config)
        self.assertFalse(told.exists())
        self.node.crictl("stopp", pod)
        self.check_told(told, container)

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
        read = lambda path: self.node.exec(container, "cat", path)  # noqa: E731
        made = ["prestart", "createRuntime", "createContainer"]
        wait_until(lambda: self.node.exec(container, "ls", "-A", "/").count("before"), 30, "wait for the program")
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
        self.node.cri.remove(container)
        said = self.console(pod)
        self.assertEqual(said.count("hook poststop"), 1, said[-2000:])
        self.assertIn(container, said)
