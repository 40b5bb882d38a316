"""Talks CRI to a daemon over one connection, where crictl is a process for each call.

Python's classes for the messages are made from proto/cri/v1/api.proto when they are first wanted, and kept in the cache.
"""

import base64
import hashlib
import importlib.resources
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

# Tests start processes all the time, and none of those uses gRPC.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

import grpc  # noqa: E402
from google.protobuf import json_format  # noqa: E402
from node import CACHE, Failed  # noqa: E402

SUPPORT = Path(__file__).resolve().parent
PROTO = SUPPORT.parent.parent / "proto/cri/v1/api.proto"
# The time limit of a call: software emulation is slow.
SECONDS = 240
# The time limit for a daemon to listen; tests restart it now and then.
CONNECT_SECONDS = 20


def generated():
    """The directory with the generated modules."""
    key = hashlib.sha256(PROTO.read_bytes() + (SUPPORT / "requirements/test.txt").read_bytes()).hexdigest()[:16]
    place = CACHE / "python" / f"cri-{key}"
    if not place.exists():
        with tempfile.TemporaryDirectory(dir=CACHE / "python") as work:
            files = Path(work) / "files"
            files.mkdir()
            common = importlib.resources.files("grpc_tools") / "_proto"
            command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTO.parent}", f"-I{common}"]
            subprocess.run([*command, f"--python_out={files}", f"--grpc_python_out={files}", PROTO.name], check=True)
            files.rename(place)
    return place


sys.path.append(str(generated()))

import api_pb2  # noqa: E402
import api_pb2_grpc  # noqa: E402


class Refused(Failed):
    """A call that the daemon answered with an error, formatted as crictl does."""

    def __init__(self, error):
        # The code is written as in Go: NotFound, not NOT_FOUND.
        code = "".join(word.capitalize() for word in error.code().name.split("_"))
        super().__init__(f"code = {code} desc = {error.details()}")
        self.code = code


class Cri:
    def __init__(self, socket):
        self.socket = socket
        # Without an authority, this library sends the socket's path, which no URI may have (RFC 3986 §3.2).
        options = [("grpc.default_authority", "localhost")]
        # A daemon that was restarted is found at once.
        options += [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 200)]
        self.channel = grpc.insecure_channel(f"unix:{socket}", options=[*options, ("grpc.enable_http_proxy", 0)])
        self.stubs = [api_pb2_grpc.RuntimeServiceStub(self.channel), api_pb2_grpc.ImageServiceStub(self.channel)]

    def call(self, name, **fields):
        """Calls the RPC of that name with the fields of its request."""
        request = getattr(api_pb2, f"{name}Request")(**fields)
        try:
            grpc.channel_ready_future(self.channel).result(CONNECT_SECONDS)
        except grpc.FutureTimeoutError:
            raise Failed(f"{name}: nobody listens on {self.socket}") from None
        try:
            call = next(getattr(stub, name) for stub in self.stubs if hasattr(stub, name))
            return call(request, timeout=SECONDS, wait_for_ready=True)
        except grpc.RpcError as error:
            raise Refused(error) from None

    def pull(self, image):
        return self.call("PullImage", image={"image": image}).image_ref

    # --- Pods ------------------------------------------------------------------------------------------

    def run_pod(self, config, handler):
        """Runs a pod from the file with its configuration; returns its id."""
        config = message(config, api_pb2.PodSandboxConfig())
        return self.call("RunPodSandbox", config=config, runtime_handler=handler).pod_sandbox_id

    def pods(self):
        return [pod.id for pod in self.call("ListPodSandbox").items]

    def ready_pods(self):
        pods = self.call("ListPodSandbox").items
        return [pod.id for pod in pods if pod.state == api_pb2.SANDBOX_READY]

    def remove_pod(self, pod):
        self.call("StopPodSandbox", pod_sandbox_id=pod)
        self.call("RemovePodSandbox", pod_sandbox_id=pod)

    # --- Containers ------------------------------------------------------------------------------------

    def create(self, pod, config, sandbox):
        """Creates a container from the files with its configuration and its pod's; returns its id."""
        config, sandbox = message(config, api_pb2.ContainerConfig()), message(sandbox, api_pb2.PodSandboxConfig())
        return self.call("CreateContainer", pod_sandbox_id=pod, config=config, sandbox_config=sandbox).container_id

    def start(self, container):
        self.call("StartContainer", container_id=container)

    def remove(self, container):
        """Removes a container, whether it runs or not."""
        self.call("StopContainer", container_id=container, timeout=0)
        self.call("RemoveContainer", container_id=container)

    def containers(self):
        return [container.id for container in self.call("ListContainers").containers]

    def status(self, container):
        """Returns a container's status as crictl prints it: JSON, with names in camel case."""
        status = self.call("ContainerStatus", container_id=container).status
        return json_format.MessageToDict(status, always_print_fields_with_no_presence=True)

    def exec(self, container, *command):
        """Runs a command; returns its exit code and output: standard output, then standard error."""
        done = self.call("ExecSync", container_id=container, cmd=[str(word) for word in command], timeout=0)
        return done.exit_code, (done.stdout + done.stderr).decode(errors="replace").rstrip("\n")


def message(file, empty):
    """Reads the message in a file for crictl. There a variable's value is text; JSON of a bytes field would be base64."""
    fields = json.loads(Path(file).read_text())
    for variable in fields.get("envs", []):
        variable["value"] = base64.b64encode(variable["value"].encode()).decode()
    return json_format.ParseDict(fields, empty)


if __name__ == "__main__":
    print(generated())
