"""What both ends of a local link agree on: the socket, its packets, and the hello with a descriptor.

See LinkHello in protos/expert/v1/expert.proto.
"""

from __future__ import annotations

import os
import socket

from consilium.errors import WireError

PACKET = 2**17  # bytes of the largest packet; sockets have room for a few of them


def new_socket() -> socket.socket:
    """Packets in order, each whole or not at all; it never blocks."""
    made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * PACKET)
    return made


def socket_address(name: str) -> str:
    """``name`` as the system takes it: '@' begins the names of the abstract namespace, which need no file."""
    return "\0" + name[1:] if name.startswith("@") else name


def send_with_descriptor(link: socket.socket, packet: bytes, descriptor: int) -> None:
    """Raises OSError."""
    socket.send_fds(link, [packet], [descriptor])


def receive_with_descriptor(link: socket.socket) -> tuple[bytes, int]:
    """A packet and the one descriptor that came with it. Raises OSError, WireError; no descriptor is left open then."""
    packet, descriptors, _, _ = socket.recv_fds(link, PACKET, 1)
    if len(descriptors) != 1:
        raise WireError("no descriptor came with the first packet")
    os.set_inheritable(descriptors[0], False)
    return packet, descriptors[0]
