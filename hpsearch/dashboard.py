"""Optuna's dashboard on one study, behind a guard, served by threads of this process."""

import errno
import ipaddress
import logging
import os
import re
import secrets
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from threading import Thread
from typing import Any, BinaryIO

import bottle
import optuna
import psutil
from optuna.artifacts import FileSystemArtifactStore
from optuna.artifacts.exceptions import ArtifactNotFound
from optuna.storages import BaseStorage, get_storage
from optuna_dashboard import wsgi
from waitress import create_server, wasyncore

from hpsearch.definition import StudyDefinition
from hpsearch.errors import UsageError
from hpsearch.guard import Guard
from hpsearch.notes import describe_study, describe_trial
from hpsearch.storage import open_storage
from hpsearch.study import checkpoint_folder, load_study

LOOPBACK = "127.0.0.1"
_TOKEN = re.compile(r"[A-Za-z0-9._~-]{16,}")  # nothing that an address or a cookie would have to escape
_N_THREADS = 4
_LARGEST_UPLOAD = 2**27  # bytes, as the dashboard itself has it
_LARGEST_QUESTION = 2**16


class Files(FileSystemArtifactStore):
    """Uploaded files; one that is gone is answered with 404."""

    def open_reader(self, artifact_id: str) -> BinaryIO:
        try:
            return super().open_reader(artifact_id)
        except ArtifactNotFound as error:
            raise bottle.HTTPError(404, "This file is gone.") from error

    def remove(self, artifact_id: str) -> None:
        try:
            super().remove(artifact_id)
        except ArtifactNotFound:
            return  # its study or trial can be rid of it all the same


@contextmanager
def serve(
    definition: StudyDefinition,
    arguments: str,
    *,
    host: str = LOOPBACK,
    port: int = 0,
    token: str | None = None,
    is_writable: bool = False,
) -> Iterator[str]:
    """The address of the study's dashboard, which is served meanwhile; port 0 is a free one.

    `arguments` are those of the study as they are typed, for its note. Raises `UsageError` where `host`, `port` or
    `token` cannot be used; what anybody may reach needs a `token` of the user's.
    """
    if token is not None and not _TOKEN.fullmatch(token):
        raise UsageError("a token has at least 16 letters, digits or any of . _ ~ -")
    if token is None and not is_loopback(host):
        raise UsageError(
            f"{host} can be reached from other machines, so name a secret of at least 16 letters and digits that "
            "visitors have to know: HPSEARCH_TOKEN=... or --token"
        )
    storage = open_storage(definition.study.storage, must_exist=True, reads_only=not is_writable)
    study = load_study(definition, storage)
    listener = _listen(host, port)
    port = listener.getsockname()[1]
    token = token or secrets.token_urlsafe(32)
    guard = Guard(
        build_application(definition, study, arguments, is_writable=is_writable),
        token=token,
        names=_names_of(host),
        cookie=f"hpsearch_{port}",
        writes_below="/api/" if is_writable else None,
    )
    try:
        with _serving(guard, listener, _LARGEST_UPLOAD if is_writable else _LARGEST_QUESTION):
            yield f"http://{_show_host(host)}:{port}/dashboard/studies/{study._study_id}?token={token}"
    finally:
        listener.close()
        storage.engine.dispose()


def build_application(
    definition: StudyDefinition, study: optuna.Study, arguments: str, *, is_writable: bool = False
) -> bottle.Bottle:
    """Optuna's dashboard on the storage of the study, which has notes about it and its trials."""
    if logging.getLogger().getEffectiveLevel() > logging.DEBUG:
        logging.getLogger("optuna_dashboard").setLevel(logging.CRITICAL)  # it would print tracebacks
    files = checkpoint_folder(definition, study) / "files"
    if is_writable:
        files.mkdir(parents=True, exist_ok=True)
    storage = get_storage(study._storage)  # its cache reads only what is new
    application = wsgi(storage, artifact_store=Files(files))
    application.catchall = False  # the guard says what failed
    application.install(_Notes(definition, study, arguments, storage))
    return application


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the host's address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _Notes:
    """A plugin of Bottle: where nobody has written a note, one is made for the answer. Nothing is stored by it."""

    name, api = "notes", 2

    def __init__(self, definition: StudyDefinition, study: optuna.Study, arguments: str, storage: BaseStorage) -> None:
        self.definition, self.study_id, self.arguments, self.storage = definition, study._study_id, arguments, storage

    def apply(self, callback: Callable[..., Any], route: bottle.Route) -> Callable[..., Any]:
        if (route.method, route.rule) != ("GET", "/api/studies/<study_id:int>"):
            return callback

        def answer(study_id: int) -> Any:
            detail = callback(study_id=study_id)
            if study_id == self.study_id and isinstance(detail, dict) and "trials" in detail:
                self._add_notes(detail)
            return detail

        return answer

    def _add_notes(self, detail: dict[str, Any]) -> None:
        budget = self.storage.get_study_user_attrs(self.study_id)["budget"]
        _fill(detail, lambda: describe_study(self.definition, budget, self.arguments))
        # Read after the answer was made, so that a trial that has ended in it has here.
        trials = {trial._trial_id: trial for trial in self.storage.get_all_trials(self.study_id, deepcopy=False)}
        for shown in (*detail["trials"], *detail["best_trials"]):
            _fill(shown, partial(describe_trial, trials[shown["trial_id"]]))


def _fill(shown: dict[str, Any], describe: Callable[[], str]) -> None:
    if shown["note"]["version"] == 0:
        shown["note"]["body"] = describe()


@contextmanager
def _serving(application: Guard, listener: socket.socket, largest_request: int) -> Iterator[None]:
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # it would tell of every short queue
    server = create_server(
        application,
        sockets=[listener],
        threads=_N_THREADS,
        ident=None,
        max_request_body_size=largest_request,
        clear_untrusted_proxy_headers=True,
    )
    thread = Thread(target=server.run, name="dashboard", daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.trigger.pull_trigger(partial(wasyncore.close_all, server._map))  # in its own thread
        thread.join(timeout=1)
        server.task_dispatcher.shutdown(timeout=0)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family)
    except socket.gaierror as error:
        raise UsageError(f"{host} is no address of this machine; leave --host out, or name one") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UsageError(f"port {port} is in use; name another with --port") from error
        raise UsageError(f"{host}, port {port}, cannot be used: {os.strerror(error.errno or 0)}") from error


def _names_of(host: str) -> set[str]:
    """What browsers on this machine, and on others where they can reach it, may call the host."""
    names = {LOOPBACK, "localhost", "[::1]", _show_host(host)}
    if not is_loopback(host):
        addresses = [address.address for found in psutil.net_if_addrs().values() for address in found]
        names |= {socket.gethostname(), socket.getfqdn(), *(_bracket(each.split("%")[0]) for each in addresses)}
    return {name.lower() for name in names}


def _show_host(host: str) -> str:
    """The host as it stands in an address; for all of this machine's addresses, its name."""
    is_any = host in ("0.0.0.0", "::")  # noqa: S104  it is compared, not listened on
    return socket.gethostname() if is_any else _bracket(host)


def _bracket(address: str) -> str:
    return f"[{address}]" if ":" in address else address
