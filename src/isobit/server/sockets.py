"""Where a server listens: taken before a model is loaded, opened when it can answer."""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence
from ipaddress import ip_address

from isobit.errors import UsageError

UNGUARDED = (
    "whoever reaches this machine may ask: --api-key-env names a key, --host 127.0.0.1 is it alone"
)
_WAITING = 2048  # connections that are not accepted yet


def bound(host: str, port: int) -> list[socket.socket]:
    """Sockets of all addresses of a host, or for port 0 of one; nobody can connect to them yet.

    Raises UsageError for a host that is not this machine, and for a port that somebody else has.
    """
    try:
        kind, flags = socket.SOCK_STREAM, socket.AI_PASSIVE
        found = socket.getaddrinfo(host or None, port, type=kind, flags=flags)
    except (OSError, UnicodeError) as error:
        raise _refusal(host, port, error) from None
    sockets: list[socket.socket] = []
    refused: OSError | None = None
    for family, kind, protocol, _, address in found if port else found[:1]:
        s = socket.socket(family, kind, protocol)
        try:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            s.bind(address)
            sockets.append(s)
        except OSError as error:
            s.close()
            if refused is None or error.errno != errno.EADDRNOTAVAIL:  # no IPv6 here
                refused = error
    if refused is not None and (not sockets or refused.errno != errno.EADDRNOTAVAIL):
        for s in sockets:
            s.close()
        raise _refusal(host, port, refused)
    return sockets


def listen(sockets: Sequence[socket.socket]) -> None:
    """Let clients connect. Raises UsageError if another server was faster."""
    for s in sockets:
        try:
            s.listen(_WAITING)
        except OSError as error:
            host, port, *_ = s.getsockname()
            raise _refusal(host, port, error) from None


def unguarded(sockets: Sequence[socket.socket], key: str | None) -> bool:
    """Whether others than this machine reach them, and need no key."""
    hosts = [ip_address(s.getsockname()[0].partition("%")[0]) for s in sockets]
    return key is None and not all(host.is_loopback for host in hosts)


def address(host: str, sockets: Sequence[socket.socket]) -> str:
    """What a client connects to."""
    return f"http://{f'[{host}]' if ':' in host else host}:{sockets[0].getsockname()[1]}"


def _refusal(host: str, port: int, error: Exception) -> UsageError:
    reason = getattr(error, "strerror", None) or error
    expected = "expected an address of this machine that is free (--host, --port)"
    return UsageError(f"{host}:{port}: {expected}, got: {reason}")
