"""Optuna's dashboard on one study, behind a guard, served by threads of this process."""

import errno
import ipaddress
import logging
import os
import re
import secrets
import socket
import warnings
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
from optuna_dashboard import wsgi
from waitress import create_server, wasyncore

from hpsearch.definition import StudyDefinition
from hpsearch.errors import UsageError
from hpsearch.guard import Guard
from hpsearch.notes import describe_study, describe_trial
from hpsearch.storage import open_storage
from hpsearch.study import checkpoint_folder, load_study

LOOPBACK = "127.0.0.1"
_TOKEN = re.compile(r"[A-Za-z0-9._~-]{8,}")  # nothing that an address or a cookie would have to escape
_N_THREADS = 4
_LARGEST_UPLOAD = 2**27  # bytes, as the dashboard itself has it
_LARGEST_QUESTION = 2**16
# The page lets one long line push the rest out of sight, and leaves a phone two columns.
_STYLE = """<style>
main { min-width: 0; }
main p, main td:last-child, main .MuiTypography-root { overflow-wrap: anywhere; }
main p, main .MuiBox-root:not(:has(*)) { white-space: normal !important; overflow-wrap: anywhere; min-width: 0; }
main :has(> p), main :has(> :has(> p)) { min-width: 0; }
main pre, main pre * { white-space: pre-wrap !important; overflow-wrap: anywhere; }
main .MuiCardContent-root > table :is(th, td) { text-align: left; vertical-align: top; padding-right: 1em; }
@media (max-width: 700px) {
  main .MuiGrid-container { flex-wrap: wrap; }
  main .MuiGrid-container > .MuiGrid-item { flex-basis: 100%; max-width: 100%; }
  main :has(> .MuiDivider-vertical) { flex-direction: column; }
  main :has(> .MuiDivider-vertical) > :first-child { height: 11em; width: 100%; flex: none; }
}
</style></head>"""


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
        raise UsageError("a token has at least 8 letters, digits or any of . _ ~ -")
    if token is None and not is_loopback(host):
        raise UsageError(
            f"{host} can be reached from other machines, so give a token that visitors must know, at least 8 letters "
            "and digits, as HPSEARCH_TOKEN or with --token"
        )
    storage = open_storage(definition.study.storage, must_exist=True, reads_only=not is_writable)
    study = load_study(definition, storage)
    listener = _listen(host, port)
    port = listener.getsockname()[1]
    token = token or secrets.token_urlsafe(16)
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
    _hush()
    files = checkpoint_folder(definition, study) / "files"
    if is_writable:
        files.mkdir(parents=True, exist_ok=True)
    store = Files(files) if files.is_dir() else None  # the page offers uploads where there is one
    application = wsgi(study._storage, artifact_store=store)  # Optuna's cache around the storage reads only what is new
    application.catchall = False  # the guard says what failed
    application.install(_Additions(definition, study, arguments))
    return application


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the host's address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _Additions:
    """A plugin of Bottle: a style for the page, and notes made for its answers where nobody has written one.

    Nothing is stored by it.
    """

    name, api = "hpsearch", 2

    def __init__(self, definition: StudyDefinition, study: optuna.Study, arguments: str) -> None:
        self.definition, self.study, self.arguments = definition, study, arguments

    def apply(self, callback: Callable[..., Any], route: bottle.Route) -> Callable[..., Any]:
        additions = {"/dashboard<:re:(/.*)?>": self._add_style, "/api/studies/<study_id:int>": self._add_notes}
        add = additions.get(route.rule)
        return callback if add is None or route.method != "GET" else lambda **values: add(callback(**values))

    def _add_style(self, page: bottle.HTTPResponse) -> bottle.HTTPResponse:
        if page.status_code == 200 and page.body:
            with page.body as file:
                page.body = file.read().replace(b"</head>", _STYLE.encode())
            page.set_header("Content-Length", str(len(page.body)))
        return page

    def _add_notes(self, detail: Any) -> Any:
        if not isinstance(detail, dict) or detail.get("name") != self.study.study_name:
            return detail
        budget = self.study.user_attrs["budget"]
        _fill(detail, lambda: describe_study(self.definition, budget, self.arguments))
        # Read after the answer was made: a trial that has ended in that has ended here.
        trials = {trial._trial_id: trial for trial in self.study.get_trials(deepcopy=False)}
        for shown in (*detail["trials"], *detail["best_trials"]):
            _fill(shown, partial(describe_trial, trials[shown["trial_id"]]))
        return detail


def _fill(shown: dict[str, Any], describe: Callable[[], str]) -> None:
    if shown["note"]["version"] == 0:
        shown["note"]["body"] = describe()


def _hush() -> None:
    """Silence what would be printed whenever few trials are drawn, and make one line of a failure."""
    if logging.getLogger().getEffectiveLevel() > logging.DEBUG:
        for name in ("optuna.visualization", "optuna.importance", "waitress"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        logging.getLogger("optuna_dashboard._bottle_util").addFilter(_cut)  # it appends a traceback
        warnings.filterwarnings("ignore", module="optuna.(importance|visualization)")


def _cut(record: logging.LogRecord) -> bool:
    record.msg, record.args = f"the dashboard failed: {record.getMessage().splitlines()[0]}", ()
    return True


@contextmanager
def _serving(application: Guard, listener: socket.socket, largest_request: int) -> Iterator[None]:
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
        server.task_dispatcher.shutdown(timeout=1)


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
