"""Speaks to an OCI registry over plain HTTP, as far as pushing needs it."""

import time
import urllib.error
import urllib.request
from urllib.parse import urlencode, urljoin

from oci import INDEX, MANIFEST, digest


def request(method, url, data=None, media_type=None):
    headers = {"Content-Type": media_type} if media_type else {}
    asked = urllib.request.Request(url, data=data, method=method, headers=headers)
    return urllib.request.urlopen(asked, timeout=60)


def wait_until_up(registry, seconds=30):
    deadline = time.monotonic() + seconds
    while True:
        try:
            return request("GET", f"{registry}/v2/")
        except (urllib.error.URLError, ConnectionError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def push(registry, repository, blobs, tag):
    """Pushes `blobs`, manifests by their digest, and tags the last of them."""
    base = f"{registry}/v2/{repository}"
    for blob in blobs:
        name = digest(blob.data)
        if blob.media_type in (MANIFEST, INDEX):
            request("PUT", f"{base}/manifests/{name}", blob.data, blob.media_type)
            continue
        place = urljoin(base, request("POST", f"{base}/blobs/uploads/", b"").headers["Location"])
        place += ("&" if "?" in place else "?") + urlencode({"digest": name})
        request("PUT", place, blob.data, "application/octet-stream")
    last = blobs[-1]
    request("PUT", f"{base}/manifests/{tag}", last.data, last.media_type)
    return digest(last.data)
