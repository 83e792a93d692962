"""Optuna's dashboard for one study, behind a token, served by threads of this process."""

import html
import logging
import re
import secrets
import warnings
import webbrowser
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import bottle
import optuna
from optuna.storages import get_storage
from optuna_dashboard import wsgi

from hpsearch.config.definition import StudyDefinition
from hpsearch.errors import UsageError
from hpsearch.monitor.dashboard.auth import AccessControl
from hpsearch.monitor.dashboard.notes import describe_study, describe_trial
from hpsearch.monitor.dashboard.server import LOOPBACK, host_names, listen, resolve, serve_in_threads, show_host
from hpsearch.monitor.text import echo
from hpsearch.search.study import load_study
from hpsearch.storage.rdb import Storage, open_storage

logger = logging.getLogger(__name__)

_TOKEN = re.compile(r"[A-Za-z0-9._~-]{8,}")  # needs no escaping in URLs and cookies
# The first rules hide the buttons that write (AccessControl refuses what they ask for), and the header says so. Without
# the others, one long line pushes the rest off the page, and a phone shows two columns.
_END, _STYLE = (
    b"</head>",
    b"""<style>
button:is([aria-label="rename study"], [aria-label="delete study"], [aria-label="skip trial"]),
main button:is([type="submit"], .MuiButton-outlinedError) { display: none !important; }
button:has([data-testid="AddBoxIcon"], [data-testid="DriveFileRenameOutlineIcon"], [data-testid="DeleteIcon"]),
button:has([data-testid="EditIcon"], [data-testid="StopCircleIcon"], [data-testid="UploadFileIcon"]),
button:has([data-testid="ReplayIcon"], [data-testid="UndoIcon"], [data-testid="RestoreFromTrashIcon"]) {
  display: none !important;
}
header .MuiToolbar-root::after { content: "read-only"; margin-left: auto; white-space: nowrap; }
main { min-width: 0; }
main p, main td:last-child, main .MuiTypography-root { overflow-wrap: anywhere; }
main p, main .MuiBox-root:not(:has(*)) { white-space: normal !important; overflow-wrap: anywhere; min-width: 0; }
main :has(> p), main :has(> :has(> p)) { min-width: 0; }
main pre, main pre * { white-space: pre-wrap !important; overflow-wrap: anywhere; }
@media (max-width: 700px) {
  main .MuiGrid-container { flex-wrap: wrap; }
  main .MuiGrid-container > .MuiGrid-item { flex-basis: 100%; max-width: 100%; }
  main :has(> .MuiDivider-vertical) { flex-direction: column; }
  main :has(> .MuiDivider-vertical) > :first-child { height: 11em; width: 100%; flex: none; }
}
</style>""",
)


@contextmanager
def serve(
    definition: StudyDefinition,
    arguments: str,
    *,
    host: str = LOOPBACK,
    port: int = 0,
    token: str | None = None,
    opens: bool = False,
) -> Iterator[str]:
    """Serve the study's dashboard and yield its URL; port 0 picks a free one. If `opens`, also open it in a browser.

    `arguments` are shown in the commands of the study's note. Raises `UsageError` if `host`, `port` or `token` is
    invalid, or if the host is reachable from other machines and `token` is None.
    """
    if token is not None and not _TOKEN.fullmatch(token):
        raise UsageError("token must have at least 8 characters (letters, digits, . _ ~ -)")
    family, address = resolve(host)
    is_exposed = not ip_address(address).is_loopback
    if is_exposed and token is None:
        raise UsageError(
            f"{host} is reachable from other machines, so a token is required: set HPSEARCH_TOKEN (or --token), "
            "at least 8 characters"
        )
    with ExitStack() as stack:
        storage = open_storage(definition.study.storage, reads_only=True)
        stack.callback(storage.engine.dispose)
        study = load_study(definition, storage)
        listener = stack.enter_context(listen(family, address, port))
        port = listener.getsockname()[1]
        token = token or secrets.token_urlsafe(16)
        dashboard = Dashboard(definition, storage, study, arguments)
        access = AccessControl(dashboard, token, names=host_names(host, address), cookie=f"hpsearch_{port}")
        stack.enter_context(serve_in_threads(access, listener))
        place = f"http://{show_host(host, address)}:{port}/dashboard/studies/{study._study_id}?token={token}"
        if is_exposed:
            echo(
                "warning: traffic, including the token, is not encrypted; put a TLS reverse proxy in front of it,\n"
                "or drop --host and use an SSH tunnel (ssh -L)"
            )
        if opens:
            webbrowser.open(stack.enter_context(redirect_file(place)))
        yield place


@contextmanager
def redirect_file(address: str) -> Iterator[str]:
    """Yield the URL of a temporary file that redirects a browser to `address`.

    The file keeps the token out of the browser's command line, which all users of the machine can read.
    """
    with NamedTemporaryFile("w", prefix="hpsearch-", suffix=".html", encoding="utf-8") as file:
        file.write(f'<!DOCTYPE html><meta http-equiv="refresh" content="0; url={html.escape(address)}">\n')
        file.flush()
        yield Path(file.name).as_uri()


class Dashboard:
    """Optuna's dashboard of a database as a WSGI application, with our style sheet and generated notes of one study.

    A note is shown where nobody has written one. Nothing is stored.
    """

    def __init__(self, definition: StudyDefinition, storage: Storage, study: optuna.Study, arguments: str) -> None:
        _quiet_loggers()
        self.definition, self.storage, self.arguments = definition, storage, arguments
        self.identity = study.user_attrs.get("id")
        self._studies: set[tuple[int, str]] = set()
        self._application = self._build()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ.get("PATH_INFO", "").startswith(("/api/", "/csv/")):
            studies = {(study._study_id, str(study.user_attrs.get("id"))) for study in self.storage.get_all_studies()}
            if not self._studies <= studies:  # SQLite gives the number of a deleted study to the next one
                self._application = self._build()
            self._studies = studies
        response: Iterable[bytes] = self._application(environ, start_response)
        return response

    def _build(self) -> bottle.Bottle:
        """Return Optuna's dashboard with empty caches."""
        cache = get_storage(self.storage)  # it reads only new trials from the database
        application = wsgi(cache)
        application.catchall = False  # AccessControl reports errors
        additions: dict[str, Callable[..., Any]] = {
            "/dashboard<:re:(/.*)?>": _add_style,
            "/api/studies/<study_id:int>": partial(self._add_notes, cache),
        }
        for route in application.routes:
            if route.method == "GET" and route.rule in additions:
                route.callback = partial(additions[route.rule], route.callback)
        return application

    def _add_notes(self, cache: optuna.storages.BaseStorage, respond: Callable[..., Any], study_id: int) -> Any:
        detail = respond(study_id=study_id)
        if not isinstance(detail, dict) or "note" not in detail:  # an error
            return detail
        attributes = cache.get_study_user_attrs(study_id)
        if attributes.get("id") != self.identity:
            return detail
        _fill(detail, lambda: describe_study(self.definition, attributes["budget"], self.arguments))
        # Read after the response was built, so that every trial that has ended there has ended here.
        trials = {trial._trial_id: trial for trial in cache.get_all_trials(study_id, deepcopy=False)}
        for shown in (*detail["trials"], *detail["best_trials"]):
            if trial := trials.get(shown["trial_id"]):
                _fill(shown, partial(describe_trial, trial))
        return detail


def _add_style(respond: Callable[..., bottle.HTTPResponse]) -> bottle.HTTPResponse:
    page = respond()
    if page.status_code == 200:
        if page.body:  # HEAD has no body
            with page.body as file:
                page.body = file.read().replace(_END, _STYLE + _END, 1)
        page.set_header("Content-Length", str(page.content_length + len(_STYLE)))
    return page


def _fill(shown: dict[str, Any], describe: Callable[[], str]) -> None:
    if shown["note"]["version"] == 0:
        try:
            shown["note"]["body"] = describe()
        except Exception:  # attributes may hold anything; the page works without notes
            logger.debug("cannot create a note", exc_info=True)


def _quiet_loggers() -> None:
    """Silence the warnings about plots of few trials, and cut a failure to one line."""
    if logging.getLogger().getEffectiveLevel() > logging.DEBUG:
        for name in ("optuna.visualization", "optuna.importance", "waitress"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        logging.getLogger("optuna_dashboard._bottle_util").addFilter(_cut)  # it logs a traceback
        warnings.filterwarnings("ignore", module="optuna.(importance|visualization)")


def _cut(record: logging.LogRecord) -> bool:
    record.msg, record.args = f"dashboard error: {record.getMessage().splitlines()[0]}", ()
    return True
