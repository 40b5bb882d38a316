"""The pod's network: addresses of both families, more interfaces, limits, names; and a configuration that changes."""

import contextlib
import socket
import subprocess
import threading

from pods import PodTest, json, leases, time, wait_until

SERVE = ["sh", "-c", "while :; do nc -l -p 700 -e echo hello; done"]

# A plugin that is chained behind others, as Multus is: it makes one more interface, and leaves their result as it is.
SECOND = """#!/bin/sh
config=$(cat)
case $CNI_COMMAND in
ADD)
    ip link add second0 type veth peer name net1 netns "${CNI_NETNS##*/}" || exit 1
    ip address add 10.99.0.1/24 dev second0 && ip link set second0 up
    ip -n "${CNI_NETNS##*/}" address add 10.99.0.2/24 dev net1
    ip -n "${CNI_NETNS##*/}" link set net1 mtu 1300 up
    echo "$config" | jq .prevResult ;;
DEL) ip link delete second0 2>/dev/null || true ;;
esac
"""


class Network(PodTest):
    @contextlib.contextmanager
    def network(self, *chained, ranges=(("10.88.0.0/16",),)):
        """Another configuration, which comes first, for the pods that are made meanwhile."""
        configuration = json.loads((self.node.cni / "10-husk.conflist").read_text())
        ipam = configuration["plugins"][0]["ipam"]
        ipam["ranges"] = [[{"subnet": subnet} for subnet in subnets] for subnets in ranges]
        if len(ranges) > 1:
            ipam["routes"].append({"dst": "::/0"})
        configuration["plugins"] += chained
        first = self.node.cni / "05-first.conflist"
        first.write_text(json.dumps(configuration))
        try:
            yield
        finally:
            first.unlink()

    def addresses(self, pod):
        network = self.node.crictl_json("inspectp", pod)["status"]["network"]
        return [network["ip"], *(address["ip"] for address in network.get("additionalIps", []))]

    def says(self, container, *command):
        return self.node.exec(container, *command)

    def hears(self, address):
        """Returns the bytes that a server of the pod sends to the host."""
        try:
            with socket.create_connection((address, 700), timeout=5) as client:
                return client.recv(100)
        except OSError:
            return None

    def test_the_next_pod_has_what_a_changed_configuration_says(self):
        before, sandbox = self.pod()
        self.container(before, sandbox, command=SERVE)
        with self.network(ranges=(("10.88.0.0/16",), ("fd88::/64",))):
            pod, sandbox = self.pod("dual", hostname="of-both")
        container = self.container(pod, sandbox, command=SERVE)
        [four] = self.addresses(before)
        ours = self.addresses(pod)
        self.assertEqual([":" in address for address in ours], [False, True])
        for address in (four, *ours):
            wait_until(lambda to=address: self.hears(to) == b"hello\n", 60, f"hear from {address}")
        hosts = self.says(container, "cat", "/etc/hosts")
        for address in ours:
            self.assertIn(f"{address}\tof-both", hosts)
        # Now in the other direction, by the default route.
        gateway = ours[1].split("::")[0] + "::1"
        with socket.create_server((gateway, 0), family=socket.AF_INET6) as server:
            threading.Thread(target=answer_one, args=(server, b"from the host"), daemon=True).start()
            said = self.says(container, "sh", "-c", f"sleep 2 | nc {gateway} {server.getsockname()[1]}")
        self.assertEqual(said, "from the host")
        self.assertIn(f"via {gateway}", self.says(container, "ip", "-6", "route"))
        self.node.cri.remove_pod(pod)
        self.node.cri.remove_pod(before)
        self.assertEqual(leases(self.node), [])

    def test_a_second_interface_is_the_pods_too(self):
        plugin = self.node.plugins / "second"
        plugin.write_text(SECOND)
        plugin.chmod(0o755)
        self.addCleanup(plugin.unlink)
        with self.network({"type": "second"}):
            pod, sandbox = self.pod()
        container = self.container(pod, sandbox, command=SERVE)
        self.assertEqual(self.says(container, "ls", "/sys/class/net").split(), ["eth0", "lo", "net1"])
        self.assertEqual(self.says(container, "cat", "/sys/class/net/net1/mtu"), "1300")
        for address in (*self.addresses(pod), "10.99.0.2"):
            wait_until(lambda to=address: self.hears(to) == b"hello\n", 60, f"hear from {address}")

    def test_a_pods_bandwidth_is_limited_as_its_annotations_say(self):
        limits = {"kubernetes.io/ingress-bandwidth": "2M", "kubernetes.io/egress-bandwidth": "4M"}
        with self.network({"type": "bandwidth", "capabilities": {"bandwidth": True}}):
            pod, sandbox = self.pod(annotations=limits)
        self.container(pod, sandbox, command=["sh", "-c", "while :; do nc -l -p 700 -e cat; done"])
        [address] = self.addresses(pod)
        disciplines = subprocess.run(["tc", "qdisc", "show"], capture_output=True, text=True, check=True).stdout
        self.assertEqual(sorted(rate for rate in ("2Mbit", "4Mbit") if f"rate {rate}" in disciplines), ["2Mbit", "4Mbit"])
        # In both directions, traffic beyond the burst of 2 Mbit takes its time.
        data = b"x" * (1 << 20)

        def exchange():
            try:
                with socket.create_connection((address, 700), timeout=60) as client:
                    threading.Thread(target=client.sendall, args=(data,), daemon=True).start()
                    return receive(client, len(data))
            except ConnectionRefusedError:
                return None

        started = time.monotonic()
        received = wait_until(exchange, 60, "send and receive")
        self.assertEqual(received, len(data))
        self.assertGreater(time.monotonic() - started, 3)
        bad = self.node.sandbox_file("bad", annotations={"kubernetes.io/egress-bandwidth": "fast"})
        self.assertIn("kubernetes.io/egress-bandwidth", self.fails("runp", bad))

    def test_names_are_as_the_client_says(self):
        dns = {"servers": ["10.96.0.10", "fd00::10"], "searches": ["default.svc", "svc"], "options": ["ndots:5"]}
        pod, sandbox = self.pod(hostname="web-0", dns_config=dns)
        container = self.container(pod, sandbox)
        self.assertEqual(
            self.says(container, "cat", "/etc/resolv.conf").splitlines(),
            ["nameserver 10.96.0.10", "nameserver fd00::10", "search default.svc svc", "options ndots:5"],
        )
        self.assertEqual(self.says(container, "cat", "/etc/hostname"), "web-0")
        self.assertIn(f"{self.addresses(pod)[0]}\tweb-0", self.says(container, "cat", "/etc/hosts"))
        # If the client sets nothing, names are those of the host, except for servers that only the host can reach.
        pod, sandbox = self.pod(dns_config={})
        theirs = self.says(self.container(pod, sandbox), "cat", "/etc/resolv.conf").splitlines()
        with open("/etc/resolv.conf") as hosts:
            servers = [line.split()[1] for line in hosts if line.startswith("nameserver ")]
        self.assertEqual(
            [line for line in theirs if line.startswith("nameserver")],
            [f"nameserver {server}" for server in servers if not server.startswith(("127.", "fe80", "::1"))],
        )


def receive(client, size):
    """Returns how many bytes arrive, up to `size`."""
    received = 0
    while received < size and (piece := client.recv(65536)):
        received += len(piece)
    return received


def answer_one(server, text):
    client, _ = server.accept()
    with client:
        client.sendall(text)
