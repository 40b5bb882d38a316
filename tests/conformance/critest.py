"""Builds critest, and the ginkgo program that runs it in parallel, from tests/support/tools, and caches them by their
inputs."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
TOOLS = HERE.parent / "support" / "tools"
CACHE = Path(os.environ.get("HUSK_CACHE") or Path.home() / ".cache" / "husk")
VERSION = "1.36.0"
# Options that select another transport of streams than SPDY.
OVER_WEBSOCKET = ("-websocket-exec", "-websocket-attach", "-websocket-portforward")
# One spec pulls by this digest. An image assembled from other parts cannot have it.
DIGEST = b"9700f9a2f5bf2c45f2f605a0bd3bce7cf37420ec9d3ed50ac2758413308766bf"


def key(*parts):
    digest = hashlib.sha256()
    for part in (VERSION.encode(), (TOOLS / "go.mod").read_bytes(), (TOOLS / "go.sum").read_bytes(), *parts):
        digest.update(part + b"\0")
    return digest.hexdigest()[:16]


def go(*arguments):
    subprocess.run(["go", *arguments], cwd=TOOLS, env=dict(os.environ, GOFLAGS="-mod=readonly"), check=True)


def built(image_digest):
    """Returns (critest, ginkgo); the spec that pulls by digest asks for `image_digest`, "sha256:…"."""
    wanted = image_digest.removeprefix("sha256:").encode()
    critest = CACHE / "bin" / f"critest-{key(wanted)}"
    ginkgo = CACHE / "bin" / f"ginkgo-{key()}"
    critest.parent.mkdir(parents=True, exist_ok=True)
    if not critest.exists():
        print(f"building critest {VERSION}", file=sys.stderr)
        plain = critest.with_suffix(".plain")
        # The package consists of test files alone.
        version = f"-X sigs.k8s.io/cri-tools/pkg/version.Version={VERSION}"
        go("test", "-c", "-o", str(plain), "-ldflags", version, "sigs.k8s.io/cri-tools/cmd/critest")
        program = plain.read_bytes()
        plain.unlink()
        if len(wanted) != len(DIGEST) or DIGEST not in program:
            sys.exit("critest has no longer the digest that its image is known by: see tests/conformance/critest.py")
        partial = critest.with_suffix(".partial")
        partial.write_bytes(program.replace(DIGEST, wanted))
        partial.chmod(0o755)
        partial.rename(critest)
    if not ginkgo.exists():
        go("build", "-o", str(ginkgo), "github.com/onsi/ginkgo/v2/ginkgo")
    return critest, ginkgo
