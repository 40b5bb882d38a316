"""Writes OCI images: layers whose bytes depend on their content alone, configs, manifests, indexes."""

import gzip
import hashlib
import io
import json
import os
import subprocess
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

CONFIG = "application/vnd.oci.image.config.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"


def digest(data):
    return "sha256:" + hashlib.sha256(data).hexdigest()


def to_json(value):
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


@dataclass
class Blob:
    """A blob of a registry, with its media type."""

    media_type: str
    data: bytes
    extra: dict = field(default_factory=dict)

    def descriptor(self):
        return {"mediaType": self.media_type, "digest": digest(self.data), "size": len(self.data), **self.extra}


@dataclass
class Layer:
    blob: Blob
    diff_id: str


def layer_of(root, compression, whiteouts=(), opaque=()):
    """Packs the tree below `root` as a layer.

    `whiteouts` are paths of lower layers that this one removes, `opaque` directories whose lower content
    it hides. `compression` is "gzip", "zstd" or "none".
    """
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for path in sorted(Path(root).rglob("*"), key=lambda path: path.relative_to(root).parts):
            entry = tar.gettarinfo(path, arcname=str(path.relative_to(root)))
            entry.uid = entry.gid = 0
            entry.uname = entry.gname = ""
            entry.mtime = 0
            if entry.isreg():
                with path.open("rb") as content:
                    tar.addfile(entry, content)
            else:
                tar.addfile(entry)
        marks = [os.path.join(os.path.dirname(path), ".wh." + os.path.basename(path)) for path in whiteouts]
        marks += [os.path.join(directory, ".wh..wh..opq") for directory in opaque]
        for mark in sorted(marks):
            tar.addfile(tarfile.TarInfo(mark))
    plain = plain.getvalue()
    if compression == "gzip":
        packed, suffix = gzip.compress(plain, compresslevel=6, mtime=0), "+gzip"
    elif compression == "zstd":
        zstd = ["zstd", "--quiet", "-9", "-T1", "--stdout"]
        packed, suffix = subprocess.run(zstd, input=plain, stdout=subprocess.PIPE, check=True).stdout, "+zstd"
    else:
        packed, suffix = plain, ""
    return Layer(Blob(LAYER + suffix, packed), digest(plain))


def image_of(layers, settings, architecture="amd64"):
    """The blobs of an image and its manifest, last; `settings` is what runs (`Cmd`, `Env`, `User`, …)."""
    config = {
        "architecture": architecture,
        "os": "linux",
        "created": "1970-01-01T00:00:00Z",
        "config": settings,
        "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
        "history": [{"created": "1970-01-01T00:00:00Z", "created_by": "husk test images"} for _ in layers],
    }
    config = Blob(CONFIG, to_json(config))
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": config.descriptor(),
        "layers": [layer.blob.descriptor() for layer in layers],
    }
    platform = {"platform": {"architecture": architecture, "os": "linux"}}
    return [layer.blob for layer in layers] + [config, Blob(MANIFEST, to_json(manifest), platform)]


def index_of(manifests):
    """An image for several architectures."""
    value = {"schemaVersion": 2, "mediaType": INDEX, "manifests": [m.descriptor() for m in manifests]}
    return Blob(INDEX, to_json(value))
