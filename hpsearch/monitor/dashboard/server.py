"""A web application served at an address of this machine, by waitress."""

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
_SILENCE = 20  # seconds until a connection that says nothing is closed


@contextmanager
def serve_in_threads(application: Application, listener: socket.socket, largest_request: int) -> Iterator[None]:
    """While entered, threads of this process answer what comes to the listener, requests of so many bytes at most."""
    server = create_server(
        application,
        sockets=[listener],
        threads=_N_THREADS,
        ident=None,
        max_request_body_size=largest_request,
        clear_untrusted_proxy_headers=True,
        channel_timeout=_SILENCE,
        connection_limit=_N_CONNECTIONS,
    )
    thread = Thread(target=server.run, name="dashboard", daemon=True)
    thread.start()
    waker = os.dup(server.trigger.trigger)  # a number that nobody else closes, and so none of another file's
    try:
        yield
    finally:
        server.task_dispatcher.shutdown(timeout=1)
        with server.trigger.lock:  # to be called in the server's own thread
            server.trigger.thunks.append(partial(wasyncore.close_all, server._map))
        with suppress(BrokenPipeError):  # it was awake, and is done already
            os.write(waker, b"x")
        os.close(waker)
        thread.join(timeout=1)


def resolve(host: str) -> tuple[socket.AddressFamily, str]:
    """The family of the host's address, and the address in digits."""
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise UsageError(f"{host} is no address of this machine; leave --host out, or name one") from error
    family, *_, address = found[0]
    return family, str(address[0])


def listen(family: socket.AddressFamily, address: str, port: int) -> socket.socket:
    """A socket that listens there; raises `UsageError` where that cannot be."""
    try:
        return socket.create_server((address, port), family=family)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UsageError(f"port {port} is in use; name another with --port") from error
        raise UsageError(f"{address}, port {port}, cannot be used: {os.strerror(error.errno or 0)}") from error


def host_names(host: str, address: str) -> set[str]:
    """What browsers on this machine, and on others where they can reach it, may call the host at the address."""
    names = {LOOPBACK, "localhost", "[::1]", show_host(host, address), _bracket(address)}
    if not ip_address(address).is_loopback:
        found = (each for addresses in psutil.net_if_addrs().values() for each in addresses)
        own = [each.address for each in found if each.family in (socket.AF_INET, socket.AF_INET6)]
        names |= {socket.gethostname(), socket.getfqdn(), *(_bracket(each.split("%")[0]) for each in own)}
    return {name.lower() for name in names}


def show_host(host: str, address: str) -> str:
    """The host as it stands in an address; for all of this machine's addresses, its name."""
    return socket.gethostname() if ip_address(address).is_unspecified else _bracket(host)


def _bracket(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the host's address; raises `UsageError` where it has none."""
    return ip_address(resolve(host)[1]).is_loopback
