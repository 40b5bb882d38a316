"""Volumes: directories and files of the host in containers, as a client and as the host see them."""

import concurrent.futures
import ctypes
import hashlib
import shutil
import stat
from pathlib import Path

from pods import (
    MAPPED, USER_NAMESPACE, Failed, MappedVolumes, PodTest, json, leftovers, named, os, signal, subprocess, time, wait_until,
)


class Volumes(MappedVolumes, PodTest):
    def setUp(self):
        super().setUp()
        self.folder = self.node.state / "data"
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        self.mounts_before = leftovers.mounts()

    def tearDown(self):
        super().tearDown()
        self.assertEqual(leftovers.mounts() - self.mounts_before, set())
        self.assertEqual(named("husk-fs"), [])
        self.assertFalse((self.node.root / "run/volumes").exists())

    def mount(self, container_path="/data", host_path=None, **settings):
        return {"container_path": container_path, "host_path": str(host_path or self.folder), **settings}

    def tools(self):
        """A mount of a program for the guest, which so runs from a volume."""
        folder = self.node.state / "tools"
        if not folder.exists():
            folder.mkdir()
            source = Path(__file__).with_name("volume_tool.c")
            subprocess.run(["cc", "-O", "-static", "-o", folder / "volume-tool", source], check=True)
        return self.mount("/tools", folder, readonly=True)

    def write_configmap(self, version, keys, mode=0o644):
        """Writes files as the kubelet does: a folder for each version, and one link that is renamed."""
        (self.folder / f"..{version}").mkdir()
        for key in keys:
            (self.folder / f"..{version}" / key).write_text(f"{version}\n")
            (self.folder / f"..{version}" / key).chmod(mode)
        os.symlink(f"..{version}", self.folder / "..data_tmp")
        os.rename(self.folder / "..data_tmp", self.folder / "..data")
        for key in keys:
            if not os.path.lexists(self.folder / key):
                os.symlink(f"..data/{key}", self.folder / key)

    def mount_on_host(self, where, *what):
        """Mounts a file system on the host, as the kubelet does for a pod; it is unmounted after the pod."""
        subprocess.run(["mount", *map(str, what), str(where)], check=True)
        self.addCleanup(subprocess.run, ["umount", str(where)], check=True)
        self.mounts_before = leftovers.mounts()

    def sh(self, container, script):
        return self.node.exec(container, "sh", "-c", script)

    def with_volume(self, *mounts, **settings):
        pod, sandbox = self.pod()
        return pod, sandbox, self.container(pod, sandbox, mounts=list(mounts) or [self.mount()], **settings)

    # --- Files ---------------------------------------------------------------------------------------

    def test_a_directory_is_the_same_on_both_sides(self):
        (self.folder / "from-host").write_text("of the host\n")
        os.chown(self.folder / "from-host", 1234, 5678)
        pod, sandbox, container = self.with_volume()
        self.assertEqual(self.sh(container, "cat /data/from-host; stat -c %u:%g:%a /data/from-host"), "of the host\n1234:5678:644")

        self.sh(container, "cd /data && umask 027 && echo hi >file && chown 33:44 file && chmod 4750 file && mkdir dir && ln -s /etc/passwd dir/link && mkfifo pipe")
        found = (self.folder / "file").stat()
        self.assertEqual((found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)), (33, 44, 0o4750))
        self.assertEqual(stat.S_IMODE((self.folder / "dir").stat().st_mode), 0o750)
        self.assertEqual(os.readlink(self.folder / "dir/link"), "/etc/passwd")
        self.assertTrue(stat.S_ISFIFO((self.folder / "pipe").lstat().st_mode))

        self.sh(container, "cd /data && ln file twin && mv twin dir/twin && echo more >>dir/twin && rm file pipe")
        self.assertEqual(sorted(os.listdir(self.folder)), ["dir", "from-host"])
        self.assertEqual((self.folder / "dir/twin").read_text(), "hi\nmore\n")
        # A link leads to the container's file, not to the host's.
        self.assertIn("root:", self.sh(container, "head -n 1 /data/dir/link"))
        self.sh(container, "rm -r /data/dir")
        self.assertEqual(os.listdir(self.folder), ["from-host"])
        time.sleep(1)
        (self.folder / "from-host").write_text("changed\n")
        (self.folder / "later").write_text("new\n")
        time.sleep(1.2)
        self.assertEqual(self.sh(container, "cat /data/from-host /data/later"), "changed\nnew")

    def test_files_belong_to_the_user_who_makes_them(self):
        self.folder.chmod(0o777)
        user = {"security_context": {"run_as_user": {"value": 1000}, "run_as_group": {"value": 2000}}}
        _, _, container = self.with_volume(linux=user)
        self.sh(container, "cd /data && touch file && mkdir dir && ln -s x link")
        for name in ("file", "dir", "link"):
            found = (self.folder / name).lstat()
            self.assertEqual((found.st_uid, found.st_gid), (1000, 2000), name)
        (self.folder / "secret").write_text("root's own")
        (self.folder / "secret").chmod(0o600)
        self.assertIn("Permission denied", self.exec_fails(container, "cat", "/data/secret"))

    def test_a_large_file_arrives_whole_both_ways(self):
        data = os.urandom(1 << 20) * 24
        (self.folder / "down").write_bytes(data)
        # The kubelet makes an emptyDir: a directory of its disk, or a tmpfs with the size that is asked for.
        disk, memory = self.folder / "disk", self.folder / "memory"
        for folder in (disk, memory):
            folder.mkdir()
        self.mount_on_host(memory, "-t", "tmpfs", "-o", "size=1m,mode=0777", "none")
        disk.chmod(0o777)
        _, _, container = self.with_volume(self.mount(), self.mount("/disk", disk), self.mount("/memory", memory))
        digest = hashlib.sha256(data).hexdigest()
        self.assertIn(digest, self.sh(container, "sha256sum /data/down"))
        self.sh(container, "cp /data/down /data/up && sync")
        self.assertEqual(hashlib.sha256((self.folder / "up").read_bytes()).hexdigest(), digest)

        host = os.statvfs(disk)
        sizes = self.sh(container, "stat -f -c %b:%s /memory /disk; stat -c %a /memory /disk").split()
        self.assertEqual(sizes, ["256:4096", f"{host.f_blocks}:{host.f_bsize}", "777", "777"])
        said = self.exec_fails(container, "dd", "if=/dev/zero", "of=/memory/large", "bs=64k", "count=20")
        self.assertIn("No space left", said)
        self.assertEqual((memory / "large").stat().st_size, 1 << 20)
        self.sh(container, "rm /memory/large && echo fits >/memory/small && echo fits >/disk/small")
        self.assertEqual([(folder / "small").read_text() for folder in (memory, disk)], ["fits\n"] * 2)

    def test_many_files(self):
        _, _, container = self.with_volume()
        self.sh(container, "cd /data && mkdir many && cd many && for i in $(seq 300); do echo $i >f$i; done")
        self.assertEqual(len(os.listdir(self.folder / "many")), 300)
        self.assertEqual(self.sh(container, "ls /data/many | wc -l; cat /data/many/* | sort -n | tail -n 1; rm -r /data/many").split(), ["300", "300"])
        self.assertEqual(os.listdir(self.folder), [])

    def test_mapped_ids_are_those_of_the_pods_users(self):
        self.check_mapped_volume(self.folder)

    def test_a_configmap_with_mapped_ids_is_the_pods(self):
        self.write_configmap("one", ["key"], 0o600)
        pod, sandbox = self.pod(linux=USER_NAMESPACE)
        mounts = [self.mount(readonly=True, **MAPPED), self.mount("/plain", readonly=True)]
        container = self.container(pod, sandbox, mounts=mounts, linux=USER_NAMESPACE)
        self.assertFalse((self.node.root / "run/volumes").exists(), "both are copied")
        self.assertEqual(self.sh(container, "cat /data/key; stat -L -c %u:%g /data/key /plain/key").split(), ["one", "0:0", "65534:65534"])
        self.assertIn("Permission denied", self.exec_fails(container, "cat", "/plain/key"))
        self.assertIn("Read-only", self.exec_fails(container, "touch", "/data/new"))
        self.write_configmap("two", ["key"], 0o600)
        wait_until(lambda: self.sh(container, "cat /data/key") == "two", 30, "see the second version")

    # --- Mounts --------------------------------------------------------------------------------------

    def test_a_single_file_and_a_directory_below_another(self):
        (self.folder / "hosts").write_text("10.0.0.1 elsewhere\n")
        (self.folder / "sub/part").mkdir(parents=True)
        # The kubelet mounts a subPath in a place of its own, and that is what the container gets.
        part, single = self.folder / "paths/0", self.folder / "paths/1"
        part.mkdir(parents=True)
        single.touch()
        self.mount_on_host(part, "--bind", self.folder / "sub/part")
        self.mount_on_host(single, "--bind", self.folder / "hosts")
        _, _, container = self.with_volume(
            self.mount("/data/below", self.folder / "sub"),
            self.mount("/data"),
            self.mount("/etc/hosts", self.folder / "hosts"),
            self.mount("/part", part),
            self.mount("/single", single, readonly=True),
        )
        self.assertEqual(self.sh(container, "cat /etc/hosts"), "10.0.0.1 elsewhere")
        self.sh(container, "echo 10.0.0.2 added >>/etc/hosts; touch /data/below/file")
        self.assertIn("added", (self.folder / "hosts").read_text())
        self.assertEqual(sorted(os.listdir(self.folder / "sub")), ["file", "part"])
        self.sh(container, "echo of the part >/part/file && grep -q added /single")
        self.assertEqual((self.folder / "sub/part/file").read_text(), "of the part\n")
        self.assertIn("Read-only", self.exec_fails(container, "sh", "-c", "echo x >/single"))

    def test_what_is_read_only_is_so_on_the_host(self):
        (self.folder / "file").write_text("safe")
        (self.folder / "below").mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "none", str(self.folder / "below")], check=True)
        self.addCleanup(subprocess.run, ["umount", str(self.folder / "below")], check=True)
        self.mounts_before = leftovers.mounts()
        _, _, container = self.with_volume(
            self.mount("/plain", readonly=True),
            self.mount("/recursive", readonly=True, recursive_read_only=True),
            self.mount("/writable", selinux_relabel=True),
        )
        for path in ("/plain/file", "/plain/new", "/recursive/file", "/recursive/below/new"):
            self.assertIn("Read-only", self.exec_fails(container, "sh", "-c", f"echo x >{path}"), path)
        # Mounts below are left out unless the client asks for them.
        self.sh(container, "echo x >/plain/below/new && echo y >/writable/file")
        self.assertEqual((self.folder / "below/new").read_text(), "x\n")
        self.assertEqual((self.folder / "file").read_text(), "y\n")

    def test_mounts_of_the_host_appear_where_they_are_asked_for(self):
        _, _, container = self.with_volume(
            self.mount("/follows", propagation=1), self.mount("/private"),
        )
        (self.folder / "later").mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "none", str(self.folder / "later")], check=True)
        self.addCleanup(subprocess.run, ["umount", str(self.folder / "later")], check=True)
        self.mounts_before = leftovers.mounts()
        (self.folder / "later/seen").write_text("")
        time.sleep(1.2)
        self.assertEqual(self.sh(container, "ls /follows/later; ls /private/later"), "seen")

    def test_a_volume_holds_no_mount_of_the_host(self):
        below = self.folder / "below"
        below.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "none", str(below)], check=True)
        _, _, container = self.with_volume()
        self.assertEqual([path for path in leftovers.mounts() if "/run/volumes/" in path], [])
        self.sh(container, "echo x >/data/below/file")
        # Mounts can be removed, as on a host without the pod, and the directory too.
        subprocess.run(["umount", str(below)], check=True)
        below.rmdir()

    def test_an_image_can_be_a_volume(self):
        self.node.crictl("pull", self.node.image("nginx"))
        image = {"image": {"image": self.node.image("nginx")}, "readonly": True}
        pod, sandbox = self.pod()
        container = self.container(pod, sandbox, mounts=[
            {"container_path": "/all", **image},
            {"container_path": "/part", "image_sub_path": "etc/nginx", **image},
            {"container_path": "/all/tmp", "host_path": str(self.folder)},
        ])
        self.sh(container, "test -f /all/etc/nginx/nginx.conf && cmp /all/etc/nginx/nginx.conf /part/nginx.conf")
        self.assertIn("Read-only", self.exec_fails(container, "touch", "/part/new"))
        self.assertIn("denied", self.exec_fails(container, "/all/bin/sh", "-c", "true"))
        self.sh(container, "touch /all/tmp/in-a-volume")
        # The disk is shared with a container of that image, and stays only while one of both needs it.
        other = self.container(pod, sandbox, name="other", image="nginx")
        self.node.cri.remove(container)
        self.sh(other, "test -f /etc/nginx/nginx.conf")

        for mount, words in (
            ({"image_sub_path": "no/such", **image}, "find in the image"),
            ({"image_sub_path": "../etc", **image}, "image_sub_path"),
            ({"host_path": str(self.folder), **image}, "host_path"),
            ({"image": {"image": "nobody/has:this"}}, "nobody/has:this"),
        ):
            config = self.node.container_file("bad", "busybox", mounts=[{"container_path": "/x", **mount}])
            self.assertIn(words, self.fails("create", pod, config, sandbox), mount)

    def test_what_cannot_be_mounted_is_refused(self):
        pod, sandbox = self.pod()
        for mount, word in (
            (self.mount(propagation=2), "HostToContainer"),
            (self.mount(host_path="/dev/null"), "device"),
            (self.mount(host_path=self.node.root / "husk.sock"), "socket"),
            (self.mount(recursive_read_only=True), "readonly"),
            (self.mount(container_path="data"), "absolute"),
        ):
            config = self.node.container_file("bad", "busybox", command=["true"], mounts=[mount])
            self.assertIn(word, self.fails("create", pod, config, sandbox))
        self.assertEqual(named("husk-fs"), [])

    def test_devices_are_the_machines_own(self):
        pod, sandbox = self.pod()
        devices = [{"host_path": "/dev/fuse", "container_path": "/dev/fuse", "permissions": "rwm"}]
        container = self.container(pod, sandbox, devices=devices)
        self.assertEqual(self.sh(container, "stat -c %t:%T /dev/fuse && exec 3<>/dev/fuse"), "a:e5")
        config = self.node.container_file("bad", "busybox", devices=[{"host_path": "/dev/kvm", "container_path": "/dev/kvm", "permissions": "rw"}])
        self.assertIn("/dev/kvm", self.fails("create", pod, config, sandbox))

    def test_a_device_has_a_cdi_name(self):
        def device(name, path, **edits):
            nodes = [{"path": f"/dev/{name}", "hostPath": path, "fileMode": 0o640, "gid": 44}]
            return {"name": name, "containerEdits": {"deviceNodes": nodes, **edits}}

        mounts = [{"hostPath": str(self.folder), "containerPath": "/vendor", "options": ["ro", "nosuid", "noexec", "bind"]}]
        devices = [device("mine", "/dev/fuse", env=["VENDOR=yes"], mounts=mounts), device("kvm", "/dev/kvm")]
        cdi = self.node.root / "cdi"
        cdi.mkdir()
        self.addCleanup(subprocess.run, ["rm", "-r", cdi], check=True)
        (cdi / "husk.json").write_text(json.dumps({"cdiVersion": "0.6.0", "kind": "husk.test/node", "devices": devices}))
        program = self.folder / "program"
        program.write_text("#!/bin/sh\necho of the vendor\n")
        program.chmod(0o755)
        pod, sandbox = self.pod()
        container = self.container(pod, sandbox, CDI_devices=[{"name": "husk.test/node=mine"}])
        self.assertEqual(self.sh(container, "stat -c %t:%T:%a:%g /dev/mine && exec 3<>/dev/mine"), "a:e5:640:44")
        self.assertEqual(self.sh(container, "echo $VENDOR; sh /vendor/program"), "yes\nof the vendor")
        self.assertIn("ermission denied", self.exec_fails(container, "/vendor/program"))
        for name, word in [("kvm", "/dev/kvm"), ("other", "no CDI file has it")]:
            config = self.node.container_file("bad", "busybox", CDI_devices=[{"name": f"husk.test/node={name}"}])
            self.assertIn(word, self.fails("create", pod, config, sandbox))

    def test_a_directory_that_is_not_there_is_made(self):
        _, _, container = self.with_volume(self.mount(host_path=self.folder / "new/and/deep"))
        self.sh(container, "touch /data/file")
        self.assertEqual(os.listdir(self.folder / "new/and/deep"), ["file"])

    def test_a_configmap_that_changes_is_seen_at_once(self):
        write = self.write_configmap
        write("one", ["key"])
        pod, sandbox, container = self.with_volume(self.mount(readonly=True), self.tools())
        self.assertEqual(os.listdir(self.node.root / "run/volumes" / pod[:13]), ["t1"], "the other one is copied")
        self.assertEqual(self.sh(container, "cat /data/key; readlink /data/..data"), "one\n..one")
        self.assertIn("Read-only", self.exec_fails(container, "sh", "-c", "echo x >/data/new"))
        self.sh(container, "(/tools/volume-tool watch /data >/tmp/events 2>&1 &)")
        wait_until(lambda: "watching" in self.sh(container, "cat /tmp/events"), 20, "watch the volume")
        write("two", ["key", "second"])
        shutil.rmtree(self.folder / "..one")
        wait_until(lambda: "..data" in self.sh(container, "cat /tmp/events"), 20, "an event of inotify")
        self.assertEqual(self.sh(container, "cat /data/key /data/second; ls -a /data").split(), ["two", "two", ".", "..", "..data", "..two", "key", "second"])
        # A change that happens while nobody watches is caught up with.
        self.kill_daemon()
        write("three", ["key"])
        self.node.start_daemon()
        wait_until(lambda: self.sh(container, "cat /data/key") == "three", 30, "see the third version")

    # --- Several containers, and time ----------------------------------------------------------------

    def test_containers_share_files_sockets_and_locks(self):
        pod, sandbox, one = self.with_volume(self.mount(), self.tools())
        two = self.container(pod, sandbox, name="two", mounts=[self.mount("/other"), self.tools()])
        self.sh(one, "echo hello >/data/file")
        self.assertEqual(self.sh(two, "cat /other/file"), "hello")
        self.sh(one, "mkfifo /data/pipe; (cat /data/pipe >/data/heard 2>/dev/null &)")
        self.sh(two, "echo through >/other/pipe")
        wait_until(lambda: (self.folder / "heard").read_text() == "through\n", 20, "hear of the pipe")
        self.sh(two, "/tools/volume-tool try /other/lock")
        self.sh(one, "(/tools/volume-tool hold /data/lock >/dev/null 2>&1 &) ; sleep 1")
        self.exec_fails(two, "/tools/volume-tool", "try", "/other/lock")
        self.node.cri.remove(one)
        self.assertEqual(self.sh(two, "cat /other/file"), "hello")

    def test_a_volume_is_let_go_with_its_last_container(self):
        disk = self.folder / "disk"
        place = self.folder / "place"
        place.mkdir()
        disk.touch()
        os.truncate(disk, 16 << 20)
        subprocess.run(["mke2fs", "-q", "-F", str(disk)], check=True)
        subprocess.run(["mount", "-o", "loop", str(disk), str(place)], check=True)
        loop = subprocess.run(["losetup", "-n", "-O", "NAME", "-j", str(disk)], capture_output=True, text=True).stdout.strip()
        self.addCleanup(subprocess.run, ["umount", str(place)], capture_output=True)
        self.mounts_before = leftovers.mounts()
        pod, sandbox = self.pod()
        for _ in range(2):
            container = self.container(pod, sandbox, mounts=[self.mount(host_path=place)])
            self.sh(container, "mkdir -p /data/a/b && echo x >/data/a/b/c && ls -lR /data")
            self.node.cri.remove(container)
        subprocess.run(["umount", str(place)], check=True)
        self.mounts_before.discard(str(place))
        # The device is free only when no process holds one of its files.
        wait_until(lambda: not os.path.exists(f"/sys/block/{os.path.basename(loop)}/loop"), 20, f"release {loop}")

    def test_volumes_survive_the_daemon(self):
        pod, sandbox, container = self.with_volume()
        self.sh(container, "(while sleep 0.2; do date >>/data/log; done >/dev/null 2>&1 &)")
        log = self.folder / "log"
        wait_until(log.exists, 30, "begin to write")
        self.kill_daemon()
        size = log.stat().st_size
        try:
            wait_until(lambda: log.stat().st_size > size, 30, "go on writing")
        finally:
            self.node.start_daemon()
        self.sh(container, "echo after >/data/file")
        self.assertEqual((self.folder / "file").read_text(), "after\n")
        second = self.container(pod, sandbox, name="second", mounts=[self.mount()])
        self.assertEqual(self.sh(second, "cat /data/file"), "after")
        self.assertEqual(len(named("husk-fs")), 1)

    def test_a_file_server_that_dies_fails_its_files_and_nothing_else(self):
        pod, sandbox, container = self.with_volume()
        (server,) = named("husk-fs")
        os.kill(server, signal.SIGKILL)
        said = self.exec_fails(container, "sh", "-c", "echo x >/data/file")
        self.assertIn("Input/output error", said)
        self.assertEqual(self.sh(container, "echo alive"), "alive")
        config = self.node.container_file("late", "busybox", command=["true"], mounts=[self.mount()])
        self.assertIn("restart the pod", self.fails("create", pod, config, sandbox))

    def test_what_faces_the_guest_has_what_it_needs_and_no_more(self):
        self.with_volume()
        for pid in named("husk-vmm") + named("husk-fs"):
            # The first process of a namespace, in which it sees only its own processes.
            with open(f"/proc/{pid}/status") as status:
                self.assertIn(f"NSpid:\t{pid}\t1\n", status.read())
            with open(f"/proc/{pid}/oom_score_adj") as score:
                self.assertEqual(score.read(), "0\n")
            with open(f"/proc/{pid}/limits") as table:
                limits = {line[:26].strip(): line[26:].split()[1] for line in table}
            self.assertEqual((limits["Max core file size"], limits["Max locked memory"]), ("0", "0"))
            if pid in named("husk-vmm"):
                self.assertEqual(limits["Max open files"], "4096")
                self.assertLessEqual(int(limits["Max file size"]), 10 << 30)
                self.assertLess(int(limits["Max processes"]), 128)
            # The other descriptors must not be files in a folder of the host, which could grow.
            names = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
            self.assertEqual([name for name in names if name.endswith((".log", ".json"))], [])
        for pid in named("husk-vmm"):
            self.assertEqual(os.listdir(f"/proc/{pid}/root"), [])
            for task in os.listdir(f"/proc/{pid}/task"):
                with open(f"/proc/{pid}/task/{task}/status") as status:
                    fields = dict(line.rstrip("\n").split(":\t", 1) for line in status)
                self.assertEqual((int(fields["CapPrm"], 16), fields["NoNewPrivs"], fields["Seccomp"]), (0, "1", "2"))
                self.assertGreaterEqual(int(fields["Uid"].split()[0]), 0x70000000)
        (pid,) = named("husk-fs")
        self.assertEqual(os.listdir(f"/proc/{pid}/root"), ["t0"])
        with open(f"/proc/{pid}/status") as status:
            fields = dict(line.rstrip("\n").split(":\t", 1) for line in status)
        chown, dac, fowner, fsetid, setgid, setuid, mknod, setfcap = 0, 1, 3, 4, 6, 7, 27, 31
        may = sum(1 << bit for bit in (chown, dac, fowner, fsetid, setgid, setuid, mknod, setfcap))
        self.assertEqual((int(fields["CapPrm"], 16), int(fields["CapBnd"], 16), fields["NoNewPrivs"]), (may, may, "1"))
        self.assertEqual(fields["Seccomp"], "2")
        with self.assertRaises(OSError):
            with open(f"/proc/{pid}/root/file", "w"):
                pass



class SilentServers(PodTest):
    """Volumes on file systems of the host whose servers never answer."""

    def silent(self, name):
        """Mounts a FUSE file system whose server reads no request; returns its path."""
        if not os.path.exists("/dev/fuse"):
            subprocess.run(["modprobe", "fuse"], check=True)
        where = self.node.state / name
        where.mkdir()
        self.addCleanup(where.rmdir)
        server = os.open("/dev/fuse", os.O_RDWR)
        options = f"fd={server},rootmode=40000,user_id=0,group_id=0".encode()
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mount(b"silent", bytes(where), b"fuse", 0, options):
            self.fail(f"mount a silent file system: {os.strerror(ctypes.get_errno())}")
        self.addCleanup(subprocess.run, ["umount", "--lazy", where], check=True)
        # The kernel aborts all pending requests when their server has gone.
        self.addCleanup(os.close, server)
        return where

    def test_two_silent_volumes_do_not_slow_the_node(self):
        _, neighbour = self.running()
        requests = []
        for name in ("silent1", "silent2"):
            mounts = [{"container_path": "/data", "host_path": str(self.silent(name))}]
            pod, sandbox = self.pod()
            requests.append((pod, self.node.container_file(name, "busybox", mounts=mounts), sandbox))
        with concurrent.futures.ThreadPoolExecutor() as clients:
            silent = [clients.submit(self.node.cri.create, *request) for request in requests]
            for _ in range(5):
                time.sleep(1)
                for call in ("Version", "ListPodSandbox"):
                    began = time.monotonic()
                    self.node.cri.call(call)
                    self.assertLess(time.monotonic() - began, 2, call)
                self.assertEqual(self.node.exec(neighbour, "echo", "alive"), "alive")
            self.assertFalse(any(one.done() for one in silent), "nobody answers these")
            for one in silent:
                with self.assertRaisesRegex(Failed, "did not answer within 30 s"):
                    one.result()
