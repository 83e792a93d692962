"""Optuna's dashboard for one study, behind a token, served by threads of this process."""

import html
import logging
import re
import secrets
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from io import BytesIO
from ipaddress import ip_address
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, BinaryIO

import bottle
import optuna
from optuna_dashboard import wsgi

from hpsearch.config.definition import StudyDefinition
from hpsearch.errors import UsageError
from hpsearch.monitor.dashboard.auth import AccessControl
from hpsearch.monitor.dashboard.notes import describe_study, describe_trial
from hpsearch.monitor.dashboard.server import LOOPBACK, host_names, listen, resolve, serve_in_threads, show_host
from hpsearch.search.checkpoints import checkpoint_folder
from hpsearch.search.study import load_study
from hpsearch.storage.artifacts import Folder
from hpsearch.storage.rdb import cache_of, clear_cache, open_storage

logger = logging.getLogger(__name__)

_TOKEN = re.compile(r"[A-Za-z0-9._~-]{8,}")  # needs no escaping in URLs and cookies
_LARGEST_UPLOAD = 2**25  # bytes; uploads are held in memory, in several copies
_LARGEST_REQUEST = 2**16
# Writes that do not touch the results of trials: notes, files, and deleting a study.
_WRITES = re.compile(
    r"PUT /api/studies/[0-9]+(/[0-9]+)?/note|POST /api/artifacts/[0-9]+(/[0-9]+)?"
    r"|DELETE /api/artifacts/[0-9]+(/[0-9]+)?/[0-9a-fA-F-]+|DELETE /api/studies/[0-9]+"
)
# Without these rules, one long line pushes the rest off the page, and a phone shows two columns.
_END, _STYLE = (
    b"</head>",
    b"""<style>
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
</style>""",
)


def _has_any(folder: Folder) -> bool:
    try:
        return bool(folder.find())
    except OSError as error:  # the dashboard works without attachments
        logger.warning("warning: attachments are not shown; cannot read %s (%s)", folder, error.strerror)
        return False


class Files:
    """An Optuna artifact store for uploaded files. A missing file is answered with 404."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder

    def open_reader(self, artifact_id: str) -> BinaryIO:
        try:
            return BytesIO(self.folder.read(artifact_id))
        except FileNotFoundError as error:
            raise bottle.HTTPError(404, "File not found.") from error

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        self.folder.write(artifact_id, content_body.read())

    def remove(self, artifact_id: str) -> None:
        self.folder.remove(artifact_id)


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
    """Serve the study's dashboard and yield its URL; port 0 picks a free one.

    `arguments` are shown in the commands of the study's note. Raises `UsageError` if `host`, `port` or `token` is
    invalid, or if the host is reachable from other machines and `token` is None.
    """
    if token is not None and not _TOKEN.fullmatch(token):
        raise UsageError("token must have at least 8 characters (letters, digits, . _ ~ -)")
    family, address = resolve(host)
    if token is None and not ip_address(address).is_loopback:
        raise UsageError(
            f"{host} is reachable from other machines, so a token is required: set HPSEARCH_TOKEN (or --token), "
            "at least 8 characters"
        )
    with ExitStack() as stack:
        storage = open_storage(definition.study.storage, must_exist=True, reads_only=not is_writable)
        stack.callback(storage.engine.dispose)
        study = load_study(definition, storage)
        listener = stack.enter_context(listen(family, address, port))
        port = listener.getsockname()[1]
        token = token or secrets.token_urlsafe(16)
        access = AccessControl(
            build_application(definition, study, arguments, is_writable=is_writable),
            token=token,
            names=host_names(host, address),
            cookie=f"hpsearch_{port}",
            writes=_WRITES if is_writable else None,
        )
        stack.enter_context(serve_in_threads(access, listener, _LARGEST_UPLOAD if is_writable else _LARGEST_REQUEST))
        yield f"http://{show_host(host, address)}:{port}/dashboard/studies/{study._study_id}?token={token}"


@contextmanager
def redirect_file(address: str) -> Iterator[str]:
    """Yield the URL of a temporary file that redirects a browser to `address`.

    The file keeps the token out of the browser's command line, which all users of the machine can read.
    """
    with NamedTemporaryFile("w", prefix="hpsearch-", suffix=".html", encoding="utf-8") as file:
        file.write(f'<!DOCTYPE html><meta http-equiv="refresh" content="0; url={html.escape(address)}">\n')
        file.flush()
        yield Path(file.name).as_uri()


def build_application(
    definition: StudyDefinition, study: optuna.Study, arguments: str, *, is_writable: bool = False
) -> bottle.Bottle:
    """Return Optuna's dashboard for the storage of the study, with notes about the study and its trials."""
    _quiet_loggers()
    files = checkpoint_folder(definition, study) / "files"
    store = Files(files) if is_writable or _has_any(files) else None  # with a store, the page offers uploads
    application = wsgi(cache_of(study), artifact_store=store)
    application.catchall = False  # AccessControl reports errors
    application.install(_Additions(application, definition, study, arguments))
    return application


class _Additions:
    """A Bottle plugin that adds a style sheet to the page and generated notes where there is none.

    It stores nothing.
    """

    name, api = "hpsearch", 2

    def __init__(
        self, application: bottle.Bottle, definition: StudyDefinition, study: optuna.Study, arguments: str
    ) -> None:
        self.application, self.definition, self.study, self.arguments = application, definition, study, arguments
        self.identity = study.user_attrs.get("id")
        self.identities = {study._study_id: self.identity}  # of all requested studies

    def apply(self, callback: Callable[..., Any], route: bottle.Route) -> Callable[..., Any]:
        style, notes = "/dashboard<:re:(/.*)?>", "/api/studies/<study_id:int>"
        additions: dict[str, Callable[..., Any]] = {style: self._add_style, notes: self._add_notes}
        add = additions.get(route.rule) if route.method == "GET" else None

        def respond(**values: Any) -> Any:
            if "study_id" in values:
                self._forget_if_replaced(values["study_id"])
            response = callback(**values)
            return response if add is None else add(response, **values)

        return respond

    def _forget_if_replaced(self, study_id: int) -> None:
        """Clear the caches if the study was deleted: SQLite reuses its number for the next study."""
        try:
            identity = cache_of(self.study).get_study_user_attrs(study_id).get("id")
        except KeyError:
            identity = None
        if self.identities.setdefault(study_id, identity) != identity:
            clear_cache(self.study)
            self.application._inmemory_cache.clear()
            self.identities[study_id] = identity

    def _add_style(self, page: bottle.HTTPResponse) -> bottle.HTTPResponse:
        if page.status_code == 200:
            if page.body:  # HEAD has no body
                with page.body as file:
                    page.body = file.read().replace(_END, _STYLE + _END, 1)
            page.set_header("Content-Length", str(page.content_length + len(_STYLE)))
        return page

    def _add_notes(self, detail: Any, study_id: int) -> Any:
        is_ours = study_id == self.study._study_id and self.identities[study_id] == self.identity
        if not is_ours or not isinstance(detail, dict) or "note" not in detail:
            return detail
        _fill(detail, lambda: describe_study(self.definition, self.study.user_attrs["budget"], self.arguments))
        # Read after the response was built, so that every trial that has ended there has ended here.
        trials = {trial._trial_id: trial for trial in self.study.get_trials(deepcopy=False)}
        for shown in (*detail["trials"], *detail["best_trials"]):
            if trial := trials.get(shown["trial_id"]):
                _fill(shown, partial(describe_trial, trial))
        return detail


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
