#!/usr/bin/env python3
"""Assembles what stands for the images that critest pulls, and prints the directory that holds them.

critest pulls from gcr.io, registry.k8s.io and k8s.gcr.io. These are images with the same names and the same
behaviour, made from Debian's packages and sources, once, and kept under ~/.cache/husk: DIRECTORY/registry is the
storage of a docker-registry that has them all, and DIRECTORY/images.json says what each reference's digest is.
A runtime finds them through hosts.toml.
"""

import hashlib
import importlib.machinery
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
SUPPORT = HERE.parent / "support" / "images"
CACHE = Path(os.environ.get("HUSK_CACHE") or Path.home() / ".cache" / "husk")
sys.path.insert(0, str(SUPPORT))

import registry  # noqa: E402
from oci import image_of, layer_of  # noqa: E402


def test_images():
    """The builder of the other test images, for its ways with Debian packages."""
    loader = importlib.machinery.SourceFileLoader("test_images", str(SUPPORT / "build"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("test_images", loader))
    loader.exec_module(module)
    return module


common = test_images()

# The hosts that critest names; their repositories differ, so one registry can stand for all.
HOSTS = ("gcr.io", "registry.k8s.io", "k8s.gcr.io")
E2E = "e2e-test-images"
STAGING = "k8s-staging-cri-tools"
# Options of the suite's own image that a busybox with default settings lacks, or has otherwise.
BUSYBOX = {
    "STATIC": "y",
    # An applet that the shell runs by itself cannot be hidden by a masked path.
    "FEATURE_SH_STANDALONE": "n",
    "FEATURE_PREFER_APPLETS": "n",
    "FEATURE_SH_NOFORK": "n",
    # Does not compile with the headers of newer kernels.
    "TC": "n",
}


def cache_key():
    key = hashlib.sha256()
    content = [HERE / "images.py", *sorted((HERE / "content").iterdir()), SUPPORT / "build", SUPPORT / "oci.py"]
    for path in content:
        key.update(path.name.encode() + b"\0" + path.read_bytes())
    release = [line for line in Path("/etc/os-release").read_text().splitlines() if line.startswith("VERSION_ID")]
    key.update("".join(release).encode())
    return key.hexdigest()[:16]


# --- Busybox, from source --------------------------------------------------------------------------


def debian_source(work, package):
    """Downloads a source package, whichever sources this machine's apt has; returns its upstream archive."""
    release = dict(re.findall(r'^(\w+)="?([^"\n]*)', Path("/etc/os-release").read_text(), re.MULTILINE))
    codename = release["VERSION_CODENAME"]
    # The same mirror that this machine's packages come from.
    listed = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI)", f"Codename: {codename}", "Created-By: Packages"],
        stdout=subprocess.PIPE, text=True, check=True,
    ).stdout.split()
    if not listed:
        sys.exit(f"apt has no package lists of {codename}: try `apt-get update`")
    place = work / "source"
    (place / "lists" / "partial").mkdir(parents=True)
    keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
    (place / "sources.list").write_text(f"deb-src [signed-by={keyring}] {listed[0]} {codename} main\n")
    apt = ["apt-get", "--quiet=2", "-o", f"Dir::Etc::sourcelist={place}/sources.list", "-o", "Dir::Etc::sourceparts=-"]
    apt += ["-o", f"Dir::State::lists={place}/lists", "-o", f"Dir::Cache={place}/cache"]
    apt += ["-o", "APT::Sandbox::User=root", "-o", "Acquire::Languages=none"]
    subprocess.run(apt + ["update"], stdout=subprocess.DEVNULL, check=True)
    subprocess.run(apt + ["--download-only", "source", package], cwd=place, stdout=subprocess.DEVNULL, check=True)
    return next(place.glob("*.orig.tar.*"))


def build_busybox(work):
    """Returns the program, with every applet that `make defconfig` selects."""
    tree = work / "busybox-source"
    tree.mkdir()
    archive = debian_source(work, "busybox")
    subprocess.run(["tar", "--extract", "--strip-components=1", "-C", tree, "-f", archive], check=True)
    make = ["make", "--silent", "-C", tree, f"-j{os.cpu_count()}"]
    subprocess.run(make + ["defconfig"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    config = tree / ".config"
    lines = [line for line in config.read_text().splitlines() if not is_setting(line, BUSYBOX)]
    lines += [f"CONFIG_{name}=y" if value == "y" else f"# CONFIG_{name} is not set" for name, value in BUSYBOX.items()]
    config.write_text("\n".join(lines) + "\n")
    with (work / "busybox.log").open("wb") as log:
        subprocess.run(make + ["oldconfig"], stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False)
        if subprocess.run(make + ["busybox"], stdout=log, stderr=log).returncode != 0:
            sys.exit((work / "busybox.log").read_text(errors="replace")[-3000:])
    return tree / "busybox"


def is_setting(line, names):
    found = re.match(r"(?:# )?CONFIG_(\w+)(?:=| is not set)", line)
    return found is not None and found[1] in names


def busybox_tree(work, busybox, name, users=(), groups=()):
    """A root with busybox. Each applet is a file of its own name, a hard link: masking one must spare the others."""
    root = common.new_tree(work, name)
    place = root / "usr" / "bin"
    shutil.copy(busybox, place / "busybox")
    for applet in subprocess.run([busybox, "--list"], stdout=subprocess.PIPE, text=True, check=True).stdout.split():
        if applet != "busybox":
            (place / applet).hardlink_to(place / "busybox")
    common.write(root, "etc/passwd", "\n".join([*common.USERS, *users]) + "\n")
    common.write(root, "etc/group", "\n".join([*common.GROUPS, *groups]) + "\n")
    for directory, mode in (("root", 0o700), ("tmp", 0o1777), ("run", 0o755), ("var/tmp", 0o1777), ("var/www", 0o755)):
        (root / directory).mkdir(parents=True, exist_ok=True)
        (root / directory).chmod(mode)
    (root / "var/run").symlink_to("../run")
    return root


# --- The others ------------------------------------------------------------------------------------


def compiled(work, name):
    """A static program from content/NAME.c."""
    program = work / name
    source = HERE / "content" / f"{name}.c"
    subprocess.run(["gcc", "-O2", "-static", "-s", "-o", program, source], check=True)
    return program


def program_layer(work, program, mode=0o755):
    root = work / f"{program.name}-root"
    root.mkdir()
    shutil.copy(program, root / program.name)
    (root / program.name).chmod(mode)
    return layer_of(root, "gzip")


def file_layer(work, name, text):
    root = work / f"file-{name}"
    common.write(root, name, text)
    return layer_of(root, "gzip")


def server_layer(work, debian, name, wanted, finish):
    """The named packages among those that the first one depends on."""
    archives = debian.closure(wanted[0])
    root = common.new_tree(work, name)
    known = [re.compile(pattern) for pattern in wanted]
    common.unpack(root, [path for package, path in archives.items() if any(p.fullmatch(package) for p in known)])
    finish(root)
    common.prune_links(root)
    return layer_of(root, "gzip")


def finish_nginx(root):
    for directory in ("etc/nginx/sites-available", "etc/nginx/modules-available", "usr/share/nginx/modules-available"):
        shutil.rmtree(root / directory, ignore_errors=True)
    shutil.copy(HERE / "content/nginx.conf", root / "etc/nginx/nginx.conf")
    common.write(root, "usr/share/nginx/html/index.html", "<h1>Welcome to nginx!</h1>\n")
    common.write(root, "var/lib/nginx/.keep", "")
    common.write(root, "var/log/nginx/.keep", "")


def finish_httpd(root):
    (root / "usr/sbin/httpd").symlink_to("apache2")
    modules = root / "usr/lib/apache2/modules"
    for module in modules.iterdir():
        if module.name not in ("mod_mpm_event.so", "mod_authz_core.so", "mod_dir.so"):
            module.unlink()
    common.write(root, "etc/httpd.conf", (HERE / "content/httpd.conf").read_text())
    common.write(root, "var/www/html/index.html", "<h1>It works!</h1>\n")


def build(work):
    """Yields (repository, blobs, tags) for every image; the last blob is what the tags name."""
    debian = common.Debian(work)
    step = common.step
    environment = {"Env": [common.PATH]}

    step("busybox, from Debian's source package")
    busybox = build_busybox(work)
    plain = layer_of(busybox_tree(work, busybox, "busybox"), "gzip")
    yield f"{E2E}/busybox", image_of([plain], {**environment, "Cmd": ["sh"]}), ["1.29-2"]

    step("pause, and a program that tells its effective user")
    pause = program_layer(work, compiled(work, "pause"))
    yield "pause", image_of([pause], {**environment, "Entrypoint": ["/pause"]}), ["3.9"]
    effective = program_layer(work, compiled(work, "effective-uid"), 0o4755)
    yield f"{E2E}/nonewprivs", image_of([effective], {**environment, "Entrypoint": ["/effective-uid"]}), ["1.3"]

    step("images that differ in little")
    names = {"latest": ["latest"], "tag": ["test"], "1": ["latest"], "2": ["latest"], "3": ["latest"]}
    names |= {"tags": ["1", "2", "3"], "digest": ["latest"]}
    for name, tags in names.items():
        own = file_layer(work, f"image-{name}", f"{name}\n")
        yield f"{STAGING}/test-image-{name}", image_of([plain, own], {**environment, "Cmd": ["sh"]}), tags
    own = file_layer(work, "image-tag-all", "all\n")
    yield f"{STAGING}/test-image-tag", image_of([plain, own], {**environment, "Cmd": ["sh"]}), ["all"]

    step("images with users")
    users = {"uid": "1002", "username": "www-data", "uid-group": "1003:1004", "username-group": "www-data:1004"}
    for name, user in users.items():
        image = image_of([plain], {**environment, "Cmd": ["sh"], "User": user})
        yield f"{STAGING}/test-image-user-{name}", image, ["latest"]
    member = "default-user"
    tree = busybox_tree(
        work, busybox, "groups", [f"{member}:x:1000:1000::/home/{member}:/bin/sh"],
        [f"{member}:x:1000:", f"group-defined-in-image:x:50000:{member}"],
    )
    image = image_of([layer_of(tree, "gzip")], {**environment, "Cmd": ["sh"], "User": "1000"})
    yield f"{STAGING}/test-image-predefined-group", image, ["latest"]

    step("nginx")
    libraries = [r"libc6", r"zlib1g", r"libssl3(t64)?", r"libcrypt1", r"libpcre.*", r"libexpat1", r"libuuid1"]
    base = debian.first_known(["nginx-light", "nginx"])
    nginx = server_layer(work, debian, "nginx", [base, r"nginx.*", *libraries], finish_nginx)
    # The file that it starts is the configuration: with the file of a later layer it listens elsewhere.
    settings = {**environment, "Entrypoint": ["/usr/sbin/nginx", "-e", "stderr"], "StopSignal": "SIGQUIT"}
    yield f"{E2E}/nginx", image_of([plain, nginx], settings), ["1.14-2"]
    listen = (HERE / "content/nginx.conf").read_text()
    host = file_layer(work, "etc/nginx/nginx.conf", re.sub(r"(listen (?:\[::\]:)?)80\b", r"\g<1>12003", listen))
    yield f"{STAGING}/hostnet-nginx-amd64", image_of([plain, nginx, host], settings), ["latest"]

    step("httpd")
    # A thread that ends asks for libgcc-s1, and without it the whole process ends.
    libraries += [r"libapr.*", r"libpcre2-8-0", r"libgcc-s1"]
    httpd = server_layer(work, debian, "httpd", ["apache2-bin", *libraries], finish_httpd)
    settings = {**environment, "Entrypoint": ["/usr/sbin/httpd", "-f", "/etc/httpd.conf", "-D", "FOREGROUND"]}
    yield f"{E2E}/httpd", image_of([plain, httpd], settings), ["2.4.39-4"]


def main():
    done = CACHE / f"critest-images-{cache_key()}"
    if not done.exists():
        print("assembling critest's images from Debian packages and sources", file=sys.stderr)
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="critest-images-", dir=CACHE) as work:
            work = Path(work)
            work.chmod(0o755)
            result = work / "result"
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = free.getsockname()[1]
            server = subprocess.Popen([SUPPORT / "serve", result / "registry", f"127.0.0.1:{port}", "writable"])
            try:
                registry.wait_until_up(f"http://127.0.0.1:{port}")
                digests = {}
                for repository, blobs, tags in build(work):
                    for tag in tags:
                        digest = registry.push(f"http://127.0.0.1:{port}", repository, blobs, tag)
                        digests[f"{repository}:{tag}"] = digest
            finally:
                server.terminate()
                server.wait()
            shutil.rmtree(result / "registry/docker/registry/v2/repositories/_uploads", ignore_errors=True)
            (result / "images.json").write_text(json.dumps(digests, indent=2) + "\n")
            result.rename(done)
    print(done)


if __name__ == "__main__":
    main()
