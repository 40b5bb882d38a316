"""OCI hooks that a handler's configuration adds to every container."""

from pods import PodTest

# The state that runc sends names the bundle.
SCRIPT = """read state; bundle=${state#*'"bundle":"'}; bundle=${bundle%%'"'*}; echo "$WORD" > $bundle/rootfs/hooked"""


class Hooks(PodTest):
    handler_settings = (
        "[[handlers.kata-runtime.hooks.create_runtime]]\n"
        f"path = '/usr/bin/busybox'\nargs = ['sh', '-c', '''{SCRIPT}''']\nenv = ['WORD=before the start']\n"
        "[[handlers.kata-runtime.hooks.start_container]]\n"
        "path = '/usr/bin/busybox'\nargs = ['sh', '-c', 'read state; sleep 3; echo inside > /inside']\n"
    )

    def test_hooks_run_in_the_guest_at_their_points(self):
        _, container = self.running()
        self.assertEqual(self.node.crictl("exec", "-s", container, "cat", "/hooked"), "before the start")
        self.assertEqual(self.node.crictl("exec", "-s", container, "cat", "/inside"), "inside")
