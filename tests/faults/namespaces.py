"""Two hosts in network namespaces of this machine, with a link between them that can be cut."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

HOW = "needs root and iproute2 (apt-get install iproute2), for network namespaces"


@dataclass(frozen=True)
class Host:
    """A namespace, its end of the link, and its address there."""

    name: str
    device: str
    address: str

    def run(self, *words: str) -> None:
        ip("netns", "exec", self.name, *words)

    @property
    def before(self) -> list[str]:
        """What stands before a command that is to run there."""
        return ["ip", "netns", "exec", self.name]


class Link:
    """The two hosts and what lies between them."""

    def __init__(self, a: Host, b: Host):
        self.hosts = (a, b)

    def cut(self) -> None:
        ip("-n", self.hosts[0].name, "link", "set", self.hosts[0].device, "down")

    def mend(self) -> None:
        ip("-n", self.hosts[0].name, "link", "set", self.hosts[0].device, "up")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@contextmanager
def two_hosts() -> Iterator[Link]:
    """Gone again at the end, whatever happened. The test skips where there can be none."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip(HOW)
    tag = f"lt{os.getpid() % 100_000}"  # a device's name has 15 characters at most
    hosts = [
        Host(f"{tag}{end}", f"{tag}v{end}", f"10.231.7.{n}") for n, end in ((1, "a"), (2, "b"))
    ]
    made: list[Host] = []
    try:
        for host in hosts:
            try:
                ip("netns", "add", host.name)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"{HOW}; ip netns add: {error.stderr.strip()}")
            made.append(host)
        _join(*hosts)
        yield Link(*hosts)
    finally:
        for host in made:  # with it goes its end of the link, and so the other
            subprocess.run(["ip", "netns", "del", host.name], check=False)


def _join(a: Host, b: Host) -> None:
    ip("link", "add", a.device, "netns", a.name, "type", "veth",
       "peer", "name", b.device, "netns", b.name)  # fmt: skip
    for host in (a, b):
        ip("-n", host.name, "addr", "add", f"{host.address}/30", "dev", host.device)
        ip("-n", host.name, "link", "set", "lo", "up")
        ip("-n", host.name, "link", "set", host.device, "up")
        # So long until a connection counts as lost on which nothing is answered; else 15 minutes.
        host.run("sysctl", "-qw", "net.ipv4.tcp_retries2=5")
