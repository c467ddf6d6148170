"""What the benches' bare sockets share."""

from __future__ import annotations

import socket


def receive(link: socket.socket, buffer: memoryview) -> bool:
    """Fill ``buffer``; False when the other side is gone."""
    filled = 0
    while filled < len(buffer):
        count = link.recv_into(buffer[filled:])
        if not count:
            return False
        filled += count
    return True
