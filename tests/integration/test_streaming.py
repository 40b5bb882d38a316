"""Exec, attach and port-forward with the real crictl, over both of its transports."""

import hashlib
import pty
import re
import select
import socket
import threading
import urllib.error
import urllib.request

from pods import SharedPodTest, os, signal, subprocess, time, wait_until

TRANSPORTS = ("spdy", "websocket")


class StreamingTest(SharedPodTest):
    def command(self, *arguments):
        return [self.node.crictl_program, "--config", str(self.node.root / "crictl.yaml"), *map(str, arguments)]

    def run_crictl(self, *arguments, stdin=b"", timeout=300):
        return subprocess.run(self.command(*arguments), input=stdin, capture_output=True, timeout=timeout)

    def exec(self, container, *command, transport="spdy", options=(), stdin=None, timeout=300):
        flags = ["--transport", transport, *options]
        if stdin is not None:
            flags.append("-i")
        return self.run_crictl("exec", *flags, container, *command, stdin=stdin or b"", timeout=timeout)

    def start(self, *arguments, **settings):
        settings.setdefault("stdin", subprocess.PIPE)
        process = subprocess.Popen(
            self.command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, **settings
        )
        self.addCleanup(self.end, process)
        return process

    def end(self, process):
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream:
                stream.close()

    def says(self, container, *command):
        return self.node.exec(container, *command)


class Exec(StreamingTest):
    def test_exec_brings_both_outputs_and_the_exit_code(self):
        _, container = self.running()
        for transport in TRANSPORTS:
            with self.subTest(transport):
                done = self.exec(container, "sh", "-c", "echo out; echo err >&2", transport=transport)
                self.assertEqual((done.returncode, done.stdout, done.stderr), (0, b"out\n", b"err\n"))
                failed = self.exec(container, "sh", "-c", "printf last; exit 7", transport=transport)
                self.assertEqual((failed.returncode != 0, failed.stdout), (True, b"last"))
                self.assertIn(b"exit code 7", failed.stderr)
                missing = self.exec(container, "no-such-program", transport=transport)
                self.assertIn(b"not found", missing.stderr)
        # Output of a child after the command has ended belongs to the command.
        done = self.exec(container, "sh", "-c", "(sleep 4; echo late) & echo now")
        self.assertEqual((done.returncode, done.stdout), (0, b"now\nlate\n"), done.stderr)

    def test_the_end_of_input_reaches_the_command(self):
        _, container = self.running()
        for transport in TRANSPORTS:
            with self.subTest(transport):
                done = self.exec(container, "cat", transport=transport, stdin=b"typed\n")
                self.assertEqual((done.returncode, done.stdout), (0, b"typed\n"))
                # A command that does not read its input is no problem either.
                done = self.exec(container, "true", transport=transport, stdin=b"x" * 500_000)
                self.assertEqual(done.returncode, 0, done.stderr)

    def test_a_great_deal_arrives_whole_in_both_directions(self):
        _, container = self.running()
        size = 20 << 20
        data = os.urandom(1 << 20) * 4
        for transport in TRANSPORTS:
            with self.subTest(transport):
                done = self.exec(container, "sh", "-c", f"dd if=/dev/zero bs=64k count={size >> 16} 2>/dev/null; echo end",
                                 transport=transport)
                self.assertEqual((len(done.stdout), done.stdout[-4:]), (size + 4, b"end\n"))
                done = self.exec(container, "sha256sum", transport=transport, stdin=data)
                self.assertEqual(done.stdout.split()[:1], [hashlib.sha256(data).hexdigest().encode()], done.stderr)

    def test_a_slow_reader_holds_the_command_up_and_loses_nothing(self):
        _, container = self.running()
        before = self.memory_of_daemon()
        script = "seq 400000; echo end; exit 7"
        processes = [self.start("exec", "--transport", transport, container, "sh", "-c", script) for transport in TRANSPORTS]
        time.sleep(10)
        self.assertLess(self.memory_of_daemon() - before, 16 << 20)
        outputs = [self.read_some(process, 2_400_000) for process in processes]
        # A pause near the end, when the command has ended already, costs nothing either.
        time.sleep(12)
        for process, output in zip(processes, outputs):
            rest, errors = process.communicate(timeout=300)
            lines = (output + rest).split()
            self.assertEqual((len(lines), lines[-2:]), (400001, [b"400000", b"end"]))
            self.assertIn(b"exit code 7", errors)
            self.assertNotEqual(process.returncode, 0)

    def read_some(self, process, size):
        """Reads at least so many bytes, without Python's buffer, which `communicate` does not know."""
        output, deadline = b"", time.monotonic() + 300
        while len(output) < size:
            left = deadline - time.monotonic()
            self.assertGreater(left, 0, f"only {len(output)} bytes came")
            if select.select([process.stdout], [], [], left)[0]:
                piece = os.read(process.stdout.fileno(), 65536)
                self.assertTrue(piece, f"{len(output)} bytes are all")
                output += piece
        return output

    def memory_of_daemon(self):
        with open(f"/proc/{self.node.daemon.pid}/status") as status:
            return int(re.search(r"VmRSS:\s+(\d+)", status.read())[1]) << 10

    def test_many_at_once(self):
        _, container = self.running()
        results = {}

        def one(number):
            done = self.exec(container, "sh", "-c", f"cat; echo {number}", transport=TRANSPORTS[number % 2], stdin=b"in ")
            results[number] = (done.returncode, done.stdout)

        threads = [threading.Thread(target=one, args=(number,)) for number in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(results, {number: (0, f"in {number}\n".encode()) for number in range(10)})

    def test_a_terminal_has_the_clients_size_and_follows_it(self):
        _, container = self.running()
        for transport in TRANSPORTS:
            with self.subTest(transport):
                ours, theirs = pty.openpty()
                self.set_size(ours, 30, 100)
                command = self.command("exec", "--transport", transport, "-i", "-t", container, "sh")
                shell = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
                                         preexec_fn=lambda: self.controlling(0))
                os.close(theirs)
                try:
                    self.read_until(ours, b"#")
                    os.write(ours, b"stty size; tty; echo is-$TERM; echo sta''rted\n")
                    seen = self.read_until(ours, b"started\r\n")
                    self.assertIn(b"30 100", seen)
                    self.assertIn(b"/dev/pts/", seen)
                    self.assertIn(b"is-xterm", seen)
                    self.set_size(ours, 40, 120)
                    shell.send_signal(signal.SIGWINCH)
                    time.sleep(5)
                    os.write(ours, b"stty size; echo resi''zed\n")
                    self.assertIn(b"40 120", self.read_until(ours, b"resized\r\n"))
                    os.write(ours, b"exit 3\n")
                    self.assertNotEqual(shell.wait(60), 0)
                finally:
                    shell.kill()
                    shell.wait()
                    os.close(ours)

    def set_size(self, terminal, rows, columns):
        import fcntl
        import struct
        import termios
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def controlling(self, terminal):
        import fcntl
        import termios
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)

    def test_a_client_that_vanishes_takes_its_streams_along(self):
        _, container = self.running()
        cases = {
            "reads": ["-i", container, "sh", "-c", "cat; sleep 7001"],
            "writes": [container, "sh", "-c", "while cat /proc/uptime; do sleep 0.2; done; sleep 7002"],
        }
        for name, arguments in cases.items():
            client = self.start("exec", *arguments)
            time.sleep(6)
            client.kill()
            client.wait()
        # Each script continues after its failed command, because its streams have ended.
        wait_until(lambda: {"7001", "7002"} <= set(re.findall(r"sleep (700.)", self.says(container, "ps"))), 60,
                   "wait for the commands to notice")

    def test_a_terminal_is_hung_up_when_its_client_vanishes(self):
        _, container = self.running()
        ours, theirs = pty.openpty()
        shell = subprocess.Popen(self.command("exec", "-i", "-t", container, "sh"), stdin=theirs, stdout=theirs,
                                 stderr=theirs, start_new_session=True, preexec_fn=lambda: self.controlling(0))
        os.close(theirs)
        try:
            self.read_until(ours, b"#")
            os.write(ours, b"sleep 7003\n")
            wait_until(lambda: "sleep 7003" in self.says(container, "ps"), 60, "wait for the command")
        finally:
            shell.kill()
            shell.wait()
            os.close(ours)
        wait_until(lambda: "sleep 7003" not in self.says(container, "ps"), 60, "wait for the command to be hung up")

    def test_refusals_are_told(self):
        pod, sandbox = self.pod()
        created = self.container(pod, sandbox, start=False)
        self.assertIn(b"is created", self.run_crictl("exec", created, "true").stderr)
        ended = self.container(pod, sandbox, "ended", command=["true"])
        self.wait_exited(ended)
        self.assertIn(b"is exited", self.run_crictl("attach", ended).stderr)
        self.assertIn(b"not found", self.run_crictl("exec", "none", "true").stderr)

    def test_a_url_works_once_and_only_as_it_is(self):
        _, container = self.running()
        debug = self.run_crictl("--debug", "exec", container, "true").stderr.decode()
        url = re.search(r"http://127\.0\.0\.1:\d+/exec/[\w-]{32,}", debug)[0]
        for address in (url, url[:-1], url.rsplit("/", 1)[0] + "/", url.replace("exec", "attach")):
            with self.assertRaises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(address, timeout=30)
            self.assertEqual(refused.exception.code, 404)
            refused.exception.close()


class Attach(StreamingTest):
    def test_attach_sees_output_from_then_on_and_the_log_has_all(self):
        _, container = self.running(command=["sh", "-c", "i=0; while [ $i -lt 300 ]; do i=$((i+1)); echo o$i; echo e$i >&2; sleep 0.1; done"])
        clients = [self.start("attach", "--transport", transport, container) for transport in TRANSPORTS]
        for client in clients:
            output, errors = client.communicate(timeout=300)
            for letter, lines in (("o", output.decode().split()), ("e", errors.decode().split())):
                self.assertEqual(lines[-1], f"{letter}300")
                first = int(lines[0][1:])
                self.assertEqual(lines, [f"{letter}{number}" for number in range(first, 301)])
            self.assertEqual(client.returncode, 0)
        logged = self.node.crictl("logs", container).split()
        self.assertEqual(len([line for line in logged if line.startswith("o")]), 300)

    def test_attach_before_the_start_misses_nothing(self):
        pod, sandbox = self.pod()
        created = self.container(pod, sandbox, command=["echo", "first"], start=False)
        client = self.start("attach", created)
        time.sleep(2)
        self.node.crictl("start", created)
        self.assertEqual(client.communicate(timeout=120)[0], b"first\n")

    def test_attach_types_into_a_container_whose_input_then_ends(self):
        for transport in TRANSPORTS:
            with self.subTest(transport):
                pod, sandbox = self.pod()
                container = self.container(pod, sandbox, transport, command=["sh"], stdin=True, stdin_once=True)
                done = self.run_crictl("attach", "--transport", transport, "-i", container, stdin=b"echo $((6*7)); exit 4\n")
                self.assertEqual((done.stdout, done.returncode), (b"42\n", 0), done.stderr)
                self.assertEqual(self.wait_exited(container)["exitCode"], 4)
                self.check_input_ends_with_a_client_that_vanishes(pod, sandbox, transport)

    def check_input_ends_with_a_client_that_vanishes(self, pod, sandbox, transport):
        """Whether it has typed, as over one transport, or not."""
        container = self.container(pod, sandbox, f"{transport}-gone", command=["sh", "-c", "cat; exit 5"], stdin=True, stdin_once=True)
        client = self.start("attach", "--transport", transport, "-i", container)
        if transport == "spdy":
            client.stdin.write(b"typed\n")
            client.stdin.flush()
            self.read_until(client.stdout, b"typed")
        else:
            time.sleep(6)
        client.kill()
        client.wait()
        self.assertEqual(self.wait_exited(container)["exitCode"], 5)

    def test_input_stays_open_for_the_next_client(self):
        _, container = self.running(command=["cat"], stdin=True)
        for word in (b"one\n", b"two\n"):
            self.assertEqual(self.run_crictl("attach", "-i", container, stdin=word).stdout, word)
        self.assertEqual(self.status(container)["state"], "CONTAINER_RUNNING")
        self.assertEqual(self.node.crictl("logs", container).split(), ["one", "two"])

    def test_a_client_that_takes_nothing_is_let_go_and_the_container_goes_on(self):
        _, container = self.running(command=["sh", "-c", "sleep 15; dd if=/dev/zero bs=64k count=320 2>/dev/null | tr '\\0' 'x'; echo end >&2; sleep 3600"])
        stuck = self.start("attach", container)
        wait_until(lambda: "end" in self.tail(container), 300, "wait for the container to get on")
        _, errors = stuck.communicate(timeout=60)
        self.assertIn(b"not taken in time", errors)

    def tail(self, container):
        with open(self.status(container)["logPath"], "rb") as log:
            log.seek(max(0, os.fstat(log.fileno()).st_size - 1000))
            return log.read().decode()


class PortForward(StreamingTest):
    def forward(self, pod, port, transport):
        """Starts crictl port-forward; returns it with its local port."""
        forward = self.start("port-forward", "--transport", transport, pod, f":{port}", stdin=subprocess.DEVNULL)
        said = self.read_until(forward.stdout, b"->")
        return forward, int(re.search(rb"Forwarding from 127\.0\.0\.1:(\d+)", said)[1])

    def test_both_ways_and_half_closed(self):
        pod, sandbox = self.pod()
        self.container(pod, sandbox, "count", command=["sh", "-c", "while :; do nc -l -p 8001 -e sh -c 'wc -c; echo done'; done"])
        for transport in TRANSPORTS:
            with self.subTest(transport):
                _, port = self.forward(pod, 8001, transport)
                for size in (10, 3_000_000):
                    wait_until(lambda: "8001" in self.node.exec(self.node.crictl("ps", "-q", "--pod", pod), "netstat", "-ln"),
                               60, "wait for the server")
                    with socket.create_connection(("127.0.0.1", port), timeout=120) as client:
                        client.sendall(b"x" * size)
                        client.shutdown(socket.SHUT_WR)
                        answer = b"".join(iter(lambda: client.recv(65536), b""))
                    self.assertEqual(answer.split(), [str(size).encode(), b"done"])

    def test_several_connections_share_a_session_with_a_web_server(self):
        pod, sandbox = self.pod()
        self.node.crictl("pull", self.node.image("nginx"))
        self.container(pod, sandbox, "web", image="nginx", command=None)
        # crictl ends a forward when a connection is refused.
        address = self.node.crictl_json("inspectp", pod)["status"]["network"]["ip"]
        wait_until(lambda: self.page(address, 80), 120, "wait for nginx")
        for transport in TRANSPORTS:
            with self.subTest(transport):
                _, port = self.forward(pod, 80, transport)
                pages = []
                threads = [threading.Thread(target=lambda: pages.append(self.page("127.0.0.1", port))) for _ in range(8)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                self.assertEqual(len(pages), 8)
                self.assertTrue(all(page == pages[0] and page for page in pages), pages)

    def page(self, address, port):
        try:
            with urllib.request.urlopen(f"http://{address}:{port}/", timeout=60) as page:
                return page.read()
        except OSError:
            return None

    def test_a_port_nobody_listens_on_is_refused_in_words(self):
        pod, _ = self.running()
        for transport in TRANSPORTS:
            with self.subTest(transport):
                forward, port = self.forward(pod, 9, transport)
                with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
                    self.assertEqual(client.recv(10), b"")
                self.assertIn(b"refused", self.read_until(forward.stderr, b"efused"))
