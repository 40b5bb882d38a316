"""Fields of the configurations that a client sends, which no other file tests."""

import pathlib

from pods import USER_NAMESPACE, PodTest, machines, wait_until
from test_host_handler import HostTest

CGROUPS = pathlib.Path("/sys/fs/cgroup")


class Fields(PodTest):
    def test_a_pod_is_where_and_what_its_client_says(self):
        parent = CGROUPS / "husk-client" / "pod"
        parent.mkdir(parents=True)
        (CGROUPS / "husk-client" / "cgroup.subtree_control").write_text("+memory")
        (parent / "memory.high").write_text(str(900 << 20))
        self.addCleanup(lambda: [group.rmdir() for group in (parent, parent.parent)])
        annotations = {"of.the/client": "kept", "io.husk/unknown": ""}
        overhead = {"memory_limit_in_bytes": 160 << 20, "cpu_shares": 100}
        # Settings of the container by which other runtimes hold a pod's namespaces (pause). They must not apply to the
        # pod's own containers.
        context = {
            "run_as_user": {"value": 1000}, "run_as_group": {"value": 1000}, "supplemental_groups": [7],
            "supplemental_groups_policy": 1, "readonly_rootfs": True, "seccomp": {"profile_type": 2, "localhost_ref": "/no/such"},
        }
        linux = {"cgroup_parent": "/husk-client/pod", "overhead": overhead, "security_context": context}
        pod, sandbox = self.pod(annotations=annotations, linux=linux)
        container = self.container(pod, sandbox)
        self.assertEqual(self.node.exec(container, "sh", "-c", "touch /file && id -u && id -G"), "0\n0")
        [machine] = machines()
        group = pathlib.Path(f"/proc/{machine}/cgroup").read_text().strip()
        self.assertEqual(group, f"0::/husk-client/pod/husk-{pod[:13]}")
        # The machine enforces the limits that the client sets.
        self.assertGreater(int((parent / "memory.current").read_text()), 1 << 20)
        said = self.node.crictl_json("inspectp", pod)
        self.assertEqual(said["status"]["annotations"], annotations)
        kept = said["info"]["config"]["linux"]["overhead"]
        self.assertEqual((kept["memory_limit_in_bytes"], kept["cpu_shares"]), (160 << 20, 100))
        self.node.cri.remove_pod(pod)
        self.assertEqual([path.name for path in parent.iterdir() if path.is_dir()], [])

    def test_a_pod_that_its_machine_does_not_fit_in_is_refused_or_warned_of(self):
        parent = CGROUPS / "husk-small"
        parent.mkdir()
        self.addCleanup(parent.rmdir)
        limit = parent / "memory.max"
        limit.write_text(str(24 << 20))
        linux = {"cgroup_parent": "/husk-small", "resources": {"memory_limit_in_bytes": 24 << 20}}
        said = self.fails("runp", self.node.sandbox_file("small", linux=linux))
        self.assertIn("no machine boots in less than", said)
        self.assertIn("memory: 300Mi", said)
        self.assertEqual(machines(), [])
        limit.write_text(str(250 << 20))
        pod, _ = self.pod(linux=linux)
        self.assertIn("overhead.podFixed", self.node.crictl_json("inspectp", pod)["info"]["memory_warning"])
        limit.write_text("max")
        self.assertIsNone(self.node.crictl_json("inspectp", pod)["info"]["memory_warning"])
        self.node.cri.remove_pod(pod)

    def test_a_process_is_what_its_client_says(self):
        pod, sandbox = self.pod()
        script = "pwd; echo $0 $1 $OF_CLIENT; tty; sleep 3600"
        container = self.container(
            pod, sandbox, command=["sh", "-c"], args=[script, "zero", "one"], working_dir="/var/tmp",
            envs=[{"key": "OF_CLIENT", "value": "two"}], tty=True,
        )
        wait_until(lambda: "/dev/pts" in self.node.crictl("logs", container), 30, "wait for output")
        self.assertEqual(self.node.crictl("logs", container).split()[:5], ["/var/tmp", "zero", "one", "two", "/dev/pts/0"])

    def test_an_image_is_told_as_it_was_named(self):
        pod, sandbox = self.pod()
        [found] = self.node.crictl_json("images", self.node.image("busybox"))["images"]
        # The name is as the kubelet sends it.
        image = {
            "image": found["id"], "user_specified_image": "the-users:name",
            "runtime_handler": "kata-runtime", "annotations": {"of.the/client": "kept"},
        }
        config = self.node.write_json("container-named.json", {
            "metadata": {"name": "named"}, "image": image, "log_path": "named.log", "command": ["true"],
            "linux": {},
        })
        container = self.node.crictl("create", "--no-pull", pod, config, sandbox)
        status = self.status(container)
        self.assertEqual(status["image"]["userSpecifiedImage"], "the-users:name")
        self.assertEqual(status["image"]["annotations"], {"of.the/client": "kept"})
        self.assertEqual(status["image"]["image"], found["repoTags"][0])
        self.assertEqual((status["imageId"], status["imageRef"]), (found["id"], found["repoDigests"][0]))
        self.assertFalse(found.get("pinned"))


class DeclaredVolumes:
    """Directories that an image declares as volumes, under both handlers."""

    def test_directories_that_an_image_declares_are_the_containers_own(self):
        self.node.crictl("pull", self.node.image("volumes"))
        folder = self.node.root / "declared"
        folder.mkdir(exist_ok=True)
        mounts = [{"container_path": "/srv/mounted", "host_path": str(folder)}]
        sealed = {"security_context": {**USER_NAMESPACE["security_context"], "readonly_rootfs": True}}
        pod, sandbox = self.pod(linux=USER_NAMESPACE)
        first = self.container(pod, sandbox, "first", image="volumes", mounts=mounts, linux=sealed)

        def sh(container, script):
            return self.node.exec(container, "sh", "-ec", script)

        self.assertIn("ead-only", self.exec_fails(first, "touch", "/srv/file"))
        seen = sh(first, "cd /srv && stat -c %a:%u:%g data data/deep/file new && cat data/deep/file")
        self.assertEqual(seen.split("\n"), ["1770:0:0", "4640:0:0", "755:0:0", "of the image"])
        sh(first, "cd /srv && echo mine > data/deep/file && touch data/made new/made && chown 33:44 new/made")
        # These are on the disk itself, not in the overlay, as databases need it; `mounted` is the client's.
        kinds = [line.split()[1:3] for line in sh(first, "cat /proc/mounts").split("\n") if " /srv/" in line]
        self.assertEqual(sorted(place for place, _ in kinds), ["/srv/data", "/srv/mounted", "/srv/new"])
        self.assertNotIn("overlay", [kind for _, kind in kinds])
        self.node.cri.remove(first)
        second = self.container(pod, sandbox, "second", image="volumes", mounts=mounts, linux=sealed)
        self.assertEqual(sh(second, "cat /srv/data/deep/file; ls /srv/data /srv/new").split(), ["of", "the", "image", "/srv/data:", "deep", "/srv/new:"])


class DeclaredInMachines(DeclaredVolumes, PodTest):
    pass


class DeclaredOnTheHost(DeclaredVolumes, HostTest):
    pass
