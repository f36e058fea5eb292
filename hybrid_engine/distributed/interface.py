"""Which network interface leads to the other hosts.

Left alone, Gloo listens where this host's name resolves to, which on many a machine is the loopback
address: the others then try to connect to themselves.
"""

from __future__ import annotations

import fcntl
import socket
import struct

_SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of a named interface
_ANY_PORT = 9


def interface_towards(host: str) -> str | None:
    """The interface that a packet to `host` would leave by; None where that cannot be told."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, _ANY_PORT))  # chooses a route, and sends nothing
        except OSError:
            return None
        own = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            if _address_of(probe, name) == own:
                return name
    return None


def _address_of(probe: socket.socket, name: str) -> str | None:
    try:
        answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
    except OSError:  # it has no IPv4 address
        return None
    return socket.inet_ntoa(answer[20:24])
