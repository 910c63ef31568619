"""Listening sockets and free ports. A port in use is an error that names port and flag."""

from __future__ import annotations

import errno
import socket

from headgate.launcher.errors import LaunchError

BACKLOG = 2048


def bind_http(hostname: str, port: int) -> socket.socket:
    """The listening socket that all gateways inherit. Raises LaunchError."""
    sock = _bound(hostname, port, "--hostname", "--port")
    sock.listen(BACKLOG)
    return sock


def check_port(hostname: str, port: int, hostname_flag: str, port_flag: str) -> None:
    """Makes sure that another process can bind the port now. Raises LaunchError."""
    _bound(hostname, port, hostname_flag, port_flag).close()


def reserve_port(hostname: str, port: int, hostname_flag: str, port_flag: str) -> socket.socket:
    """A bound socket that keeps others from being given the port; 0 takes a free one.

    The process it is meant for can listen on it all the same, as long as it too sets
    SO_REUSEADDR (nearly all do). Close the socket then. Raises LaunchError.
    """
    return _bound(hostname, port, hostname_flag, port_flag)


def _bound(hostname: str, port: int, hostname_flag: str, port_flag: str) -> socket.socket:
    name = hostname.removeprefix("[").removesuffix("]")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            name or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise LaunchError(
            f"{hostname_flag} {hostname!r} is not an address of this machine: {error.strerror}."
        ) from None
    sock = socket.socket(family, kind, protocol)
    try:
        # Only skips the wait after a former server's connections; a listening one is an error.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise LaunchError(_refusal(error, hostname, port, hostname_flag, port_flag)) from None
    return sock


def _refusal(error: OSError, hostname: str, port: int, hostname_flag: str, port_flag: str) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"Port {port} is in use: another program listens there; choose one by {port_flag}."
    if error.errno == errno.EACCES:
        return (
            f"Port {port} needs privileges this user lacks; choose one above 1023 by {port_flag}."
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{hostname_flag} {hostname!r} is not an address of this machine."
    return f"Port {port} on {hostname!r} cannot be used: {error.strerror}."
