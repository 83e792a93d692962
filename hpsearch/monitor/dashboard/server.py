"""Serves a web application on an address of this machine, with waitress."""

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from ipaddress import ip_address
from threading import Thread

import psutil
from waitress import create_server, wasyncore

from hpsearch.errors import UsageError
from hpsearch.monitor.dashboard.auth import Application

LOOPBACK = "127.0.0.1"
_N_THREADS = 4
_N_CONNECTIONS = 500
_IDLE_TIMEOUT = 20  # seconds
_LARGEST_REQUEST = 2**16  # bytes


@contextmanager
def serve_in_threads(application: Application, listener: socket.socket) -> Iterator[None]:
    """Serve the application on the listener in threads."""
    server = create_server(
        application,
        sockets=[listener],
        threads=_N_THREADS,
        ident=None,
        max_request_body_size=_LARGEST_REQUEST,
        clear_untrusted_proxy_headers=True,
        channel_timeout=_IDLE_TIMEOUT,
        connection_limit=_N_CONNECTIONS,
    )
    thread = Thread(target=server.run, name="dashboard", daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.task_dispatcher.shutdown(timeout=1)
        with server.trigger.lock:  # until it is pulled; then the server's thread closes all, the trigger included
            server.trigger.thunks.append(partial(wasyncore.close_all, server._map))
            os.write(server.trigger.trigger, b"x")
        thread.join(timeout=1)


def resolve(host: str) -> tuple[socket.AddressFamily, str]:
    """Return the address family and the numeric address of a host. Raises `UsageError` if there is none."""
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise UsageError(f"{host} is not an address of this machine; omit --host or choose another") from error
    family, *_, address = found[0]
    return family, str(address[0])


def listen(family: socket.AddressFamily, address: str, port: int) -> socket.socket:
    """Return a listening socket. Raises `UsageError` if the address or port cannot be used."""
    try:
        return socket.create_server((address, port), family=family)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UsageError(f"port {port} is already in use; choose another with --port") from error
        raise UsageError(f"cannot listen on {address}:{port}: {os.strerror(error.errno or 0)}") from error


def host_names(host: str, address: str) -> set[str]:
    """Return the host names that browsers on this machine, or on others that can reach it, may use."""
    names = {LOOPBACK, "localhost", "[::1]", show_host(host, address), _bracket(address)}
    if not ip_address(address).is_loopback:
        every = (entry for entries in psutil.net_if_addrs().values() for entry in entries)
        own = [entry.address for entry in every if entry.family in (socket.AF_INET, socket.AF_INET6)]
        names |= {socket.gethostname(), socket.getfqdn(), *(_bracket(ip.split("%")[0]) for ip in own)}
    return {name.lower() for name in names}


def show_host(host: str, address: str) -> str:
    """Return the host as written in a URL; for the unspecified address, the name of this machine."""
    return socket.gethostname() if ip_address(address).is_unspecified else _bracket(host)


def _bracket(address: str) -> str:
    return f"[{address}]" if ":" in address else address
