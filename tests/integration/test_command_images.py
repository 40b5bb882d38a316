"""Verbs of images of the command itself: `husk pull`, `images`, `rmi`, `image …`, `history`, `login`, `system df`."""

import json
import os
import tempfile
import threading
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from command import Command
from pods import PodTest


class Guarded:
    """The node's registry behind a user and a password. It counts the requests that have them."""

    def __init__(self, registry, authorization):
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                if self.headers.get("Authorization") != authorization:
                    self.send_response(401)
                    self.send_header("WWW-Authenticate", 'Basic realm="husk"')
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                self.server.allowed += 1
                behind = HTTPConnection(registry, timeout=60)
                behind.request(self.command, self.path, headers={"Accept": ", ".join(self.headers.get_all("Accept") or ["*/*"])})
                answer = behind.getresponse()
                body = answer.read()
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() in ("content-type", "docker-content-digest"):
                        self.send_header(name, value)
                self.send_header("Content-Length", answer.getheader("Content-Length") or str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_HEAD = do_GET

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.allowed = 0
        self.address = f"127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


class CommandImagesTest(Command, PodTest):
    def setUp(self):
        super().setUp()
        self.home = tempfile.TemporaryDirectory()
        self.addCleanup(self.home.cleanup)
        self.config = Path(self.home.name) / ".docker/config.json"
        self.pulled = []

    def tearDown(self):
        for image in self.pulled:
            self.husk("rmi", "--force", image)
        # Other tests count on it.
        self.node.crictl("pull", self.node.image("busybox"))
        super().tearDown()

    def husk(self, *arguments, code=0, stdin="", **environment):
        """Runs husk with a home of its own, in which credentials are."""
        inherited = {name: value for name, value in os.environ.items() if name != "DOCKER_CONFIG"}
        env = {**inherited, "HOME": self.home.name, **environment}
        return super().husk(*arguments, code=code, stdin=stdin, env=env)

    def pull(self, image):
        self.pulled.append(image)
        return self.husk("pull", image)

    def listed(self):
        return json.loads(self.husk("images", "-o", "json"))

    def test_an_image_is_pulled_listed_shown_and_removed(self):
        name = self.node.image("volumes")
        reference = self.pull(name)
        shown = next(image for image in self.listed() if name in image["RepoTags"])
        self.assertGreater(shown["Size"], 1000)
        digest = shown["RepoDigests"][0].partition("@")[2]
        self.assertTrue(digest.startswith("sha256:"))
        self.assertIn(reference, [shown["ID"], *shown["RepoDigests"]])
        short = shown["ID"].removeprefix("sha256:")[:12]
        rows = [line.split() for line in self.husk("images").splitlines()]
        self.assertEqual(rows[0], ["REPOSITORY", "TAG", "IMAGE", "ID", "SIZE"])
        self.assertIn([f"{self.node.registry}/husk/volumes", "1", short], [row[:3] for row in rows])
        self.assertIn(digest, self.husk("images", "--digests", name))
        self.assertIn(short, self.husk("images", "-q").split())
        self.assertEqual(self.husk("images", "-q", "--no-trunc", short), shown["ID"])

        (inspected,) = json.loads(self.husk("image", "inspect", name))
        self.assertEqual((inspected["ID"], inspected["Architecture"], inspected["Os"]), (shown["ID"], "amd64", "linux"))
        self.assertTrue(inspected["Config"]["Volumes"])
        self.assertTrue(self.husk("history", name).startswith("CREATED"))
        images = next(line.split() for line in self.husk("system", "df").splitlines() if line.startswith("images"))
        self.assertEqual(images[1], str(len(self.listed())))

        removed = self.husk("rmi", short)
        self.assertIn(f"untagged: {name}", removed)
        self.assertIn(f"deleted: {shown['ID']}", removed)
        self.assertNotIn(shown["ID"], [image["ID"] for image in self.listed()])
        said = self.husk("rmi", name, code=1)
        self.assertIn(f"there is no image {name}", said)
        self.husk("rmi", "--force", name)

    def test_a_pull_that_fails_says_why_and_the_daemon_is_named(self):
        said = self.husk("pull", f"{self.node.registry}/husk/nothing:1", code=1)
        self.assertIn("husk/nothing", said)
        self.assertIn("husk: huskd:", said)

    def test_prune_takes_what_no_container_needs(self):
        name = self.node.image("volumes")
        self.pull(name)
        said = self.husk("image", "prune", "--all", code=1)
        self.assertIn("use --force", said)
        self.husk("image", "prune", "--force")
        self.assertIn(name, [tag for image in self.listed() for tag in image["RepoTags"]])
        self.assertIn("reclaimed: ", self.husk("image", "prune", "--all", "--force"))
        self.assertNotIn(name, [tag for image in self.listed() for tag in image["RepoTags"]])

    def test_credentials_of_login_are_those_of_the_pull(self):
        # "me:secret"
        guarded = Guarded(self.node.registry, "Basic bWU6c2VjcmV0")
        self.addCleanup(guarded.server.shutdown)
        name = f"{guarded.address}/husk/busybox:1"
        self.husk("pull", name, code=1)
        self.assertEqual(guarded.server.allowed, 0)
        said = self.husk("login", "-u", "me", "--password-stdin", f"http://{guarded.address}/v2/", stdin="secret\n")
        self.assertIn(str(self.config), said)
        kept = json.loads(self.config.read_text())
        self.assertEqual(kept, {"auths": {guarded.address: {"auth": "bWU6c2VjcmV0"}}})
        self.assertEqual((self.config.stat().st_mode & 0o777, self.config.parent.stat().st_mode & 0o777), (0o600, 0o700))
        self.pull(name)
        self.assertGreater(guarded.server.allowed, 0)
        self.husk("rmi", name)
        self.husk("pull", "--anonymous", name, code=1)
        self.husk("logout", guarded.address)
        self.assertEqual(json.loads(self.config.read_text()), {"auths": {}})
        self.husk("pull", name, code=1)

    def test_a_credential_helper_is_asked(self):
        guarded = Guarded(self.node.registry, "Basic bWU6c2VjcmV0")
        self.addCleanup(guarded.server.shutdown)
        # A helper that keeps one secret in a file, as docker's protocol has it.
        helper = Path(self.home.name) / "docker-credential-husktest"
        helper.write_text(
            '#!/bin/sh\nkept=$HOME/secret\ncase $1 in\nget) [ -e "$kept" ] || { echo credentials not found in native keychain; exit 1; }\n'
            'cat "$kept" ;;\nstore) cat >"$kept" ;;\nerase) rm -f "$kept" ;;\nesac\n'
        )
        helper.chmod(0o755)
        self.config.parent.mkdir()
        self.config.write_text(json.dumps({"credHelpers": {guarded.address: "husktest"}, "detachKeys": "ctrl-x"}))
        more = {"PATH": f"{self.home.name}:{os.environ['PATH']}"}
        name = f"{guarded.address}/husk/busybox:1"
        self.husk("pull", name, code=1, **more)
        self.husk("login", "-u", "me", "--password-stdin", guarded.address, stdin="secret", **more)
        self.assertNotIn("auths", json.loads(self.config.read_text()))
        self.pulled.append(name)
        self.husk("pull", name, **more)
        self.assertGreater(guarded.server.allowed, 0)
        self.husk("logout", guarded.address, **more)
        self.husk("rmi", name, **more)
        self.husk("pull", name, code=1, **more)

    def test_an_image_in_use_stays(self):
        self.running()
        image = self.node.image("busybox")
        self.assertIn("is used by a container", self.husk("rmi", image, code=1))
        self.husk("image", "prune", "--all", "--force")
        self.assertIn(image, [tag for image in self.listed() for tag in image["RepoTags"]])
        rows = {line.split()[0]: line.split() for line in self.husk("system", "df").splitlines()}
        self.assertEqual(rows["images"][1:3], ["1", "1"])
        self.assertEqual(rows["containers"][1:3], ["1", "1"])
        self.husk("rmi", "--force", image)
        self.assertEqual(self.listed(), [])
