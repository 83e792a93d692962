"""The dashboard behind its access: what passes and what does not, and the notes that are made when it is read."""

import gc
import http.client
import json
import re
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit
from wsgiref.util import setup_testing_defaults

import optuna
import optuna_dashboard
import psutil
import pytest
import sqlalchemy
import typer.main
from optuna.trial import TrialState

from hpsearch.cli import app as cli_app
from hpsearch.cli import options, watch
from hpsearch.config.definition import StudyDefinition
from hpsearch.errors import StorageUnavailable, StudyNotFound, UsageError
from hpsearch.monitor.dashboard import app, notes, server
from hpsearch.monitor.dashboard.auth import READING, AccessControl
from hpsearch.search.study import open_study
from hpsearch.storage.rdb import Storage, open_storage

from ..conftest import make_definition

pytestmark = pytest.mark.filterwarnings("ignore:Heartbeat of storage")

TOKEN = "a-token-of-the-test"
HOST = "127.0.0.1:8080"
SECRET = "a-secret-of-the-server"
COOKIE = f"hpsearch_8080={SECRET}"
METHODS = (*READING, "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "delete")
HOSTILE = "RuntimeError: <img src=x onerror=alert(1)> ``` | **b** [l](javascript:alert(1)) $x$\n````\n# heading"


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Site:
    """A study whose dashboard is called directly, as a browser on the page would."""

    definition: StudyDefinition
    study: optuna.Study
    application: Any
    defaults: dict[str, str] = field(default_factory=lambda: {"HTTP_HOST": HOST, "HTTP_COOKIE": COOKIE})

    def __call__(self, path: str, method: str = "GET", data: Any = None, **headers: str | None) -> Answer:
        """The answer to a request; a header of None is left out."""
        access = AccessControl(
            self.application,
            token=TOKEN,
            names={"127.0.0.1", "localhost", "[::1]"},
            cookie="hpsearch_8080",
            secret=SECRET,
        )
        body = b"" if data is None else json.dumps(data).encode()
        path, _, query = path.partition("?")
        environ: dict[str, Any] = {
            "REQUEST_METHOD": method,
            "PATH_INFO": path,
            "QUERY_STRING": query,
            "CONTENT_TYPE": "application/json",
            "CONTENT_LENGTH": str(len(body)),
            "wsgi.input": BytesIO(body),
        }
        setup_testing_defaults(environ)
        for name, value in {"HTTP_HOST": None, **self.defaults, **headers}.items():
            environ.pop(name, None)
            if value is not None:
                environ[name] = value
        started: list[Any] = []
        parts = access(environ, lambda status, headers, error=None: started.append((status, headers)))
        content = b"".join(parts)
        if close := getattr(parts, "close", None):
            close()
        [(status, found)] = started
        return Answer(int(status.split()[0]), {name.lower(): value for name, value in found}, content)


def make_site(definition: StudyDefinition) -> Site:
    opened = open_storage(definition.study.storage, reads_only=True)
    study = optuna.load_study(study_name="small", storage=opened)
    return Site(definition, study, app.Dashboard(definition, opened, study, "small.toml"))


@pytest.fixture
def searched(tmp_path: Path) -> StudyDefinition:
    return search(f"sqlite:///{tmp_path / 'study.db'}", tmp_path)


@pytest.fixture
def searched_anywhere(url: str, tmp_path: Path) -> StudyDefinition:
    return search(url, tmp_path)


def search(url: str, tmp_path: Path) -> StudyDefinition:
    """A study with a complete, a pruned and a failed trial, and one that was killed and waits for another attempt."""
    definition = make_definition(url, study={"artifacts": str(tmp_path / "artifacts")})
    storage = open_storage(url)
    storage.worker = "w1"
    study = open_study(definition, storage)
    add_trial(study, value=0.9)
    pruned = add_trial(study, value=None)
    pruning = {"epoch": 1, "value": 0.8885, "threshold": 0.9412, "rule": "median of 12 trials"}
    pruned.set_user_attr("pruning", pruning)
    study.tell(pruned, state=TrialState.PRUNED)
    storage.end_attempt(add_trial(study, value=None)._trial_id, 0, "exception", HOSTILE)
    storage.end_attempt(add_trial(study, value=None)._trial_id, 0, "killed", "no heartbeat for 60 s", retries=2)
    storage.engine.dispose()
    return definition


def add_trial(study: optuna.Study, value: float | None) -> optuna.Trial:
    trial = study.ask()
    trial.suggest_int("width", 8, 32)
    trial.suggest_float("lr", 1e-3, 1e-1, log=True)
    trial.report(0.5, 1)
    if value is not None:
        study.tell(trial, value)
    return trial


@contextmanager
def writing(site: Site) -> Iterator[optuna.Study]:
    """The study of the site, as another process may write it."""
    storage = open_storage(site.definition.study.storage)
    yield optuna.load_study(study_name="small", storage=storage)
    storage.engine.dispose()


@pytest.fixture
def site(searched: StudyDefinition) -> Site:
    return make_site(searched)


def routes_of(site: Site) -> list[tuple[str, str]]:
    """The method and a plausible path of every route of the application."""
    values = {"study_id": "1", "trial_id": "1", "artifact_id": "0a-1b", "plot_type": "rank", "history_id": "x"}
    found = []
    for route in site.application._application.routes:
        path = re.sub(r"<:re:[^>]*>", "/studies/1", route.rule)
        path = re.sub(r"<filename:path>", "bundle.js", path)
        path = re.sub(r"<(\w+)(:[^>]*)?>", lambda match: values[match[1]], path)
        assert "<" not in path
        found.append((route.method, path))
    assert len(found) > 30
    return found


def count_rows(url: str) -> dict[str, int]:
    engine = sqlalchemy.create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    with engine.connect() as connection:
        tables = sqlalchemy.inspect(connection).get_table_names()
        counts = {
            name: connection.exec_driver_sql(f'SELECT count(*) FROM "{name}"').scalar_one()  # type: ignore[arg-type,unused-ignore]
            for name in tables
        }
    engine.dispose()
    return counts


def test_every_route_is_closed_to_strangers_and_to_writing(site: Site) -> None:
    before = count_rows(site.definition.study.storage)
    paths = {path for _, path in routes_of(site)} | {"/", "/dashboard", "/healthz", "/nonsense", "//api/studies/1"}
    for path in sorted(paths):
        for method in METHODS:
            is_healthz = path == "/healthz" and method in READING
            for host in ("evil.example", "127.0.0.1.evil.example", "", "me@127.0.0.1", "127.0.0.1/x", None):
                assert site(path, method, HTTP_HOST=host).status == 403, (path, method, host)
            assert site(path, method, HTTP_COOKIE=None).status == (200 if is_healthz else 403), (path, method)
            for cookie in (
                f"{COOKIE}x",
                COOKIE[:-1],
                "hpsearch_8080=",
                f"hpsearch_8081={SECRET}",
                f"hpsearch_8080={TOKEN}",
                "ÿ=\xff",
            ):
                assert site(path, method, HTTP_COOKIE=cookie).status == (200 if is_healthz else 403)
            wrong = site(f"{path}?token=wrong", method, HTTP_COOKIE=None).status
            assert wrong == (200 if is_healthz else 403)
            if method not in READING:
                assert site(path, method).status == 403, (path, method)
                assert site(path, method, HTTP_ORIGIN=f"http://{HOST}").status == 403, (path, method)
                assert site(f"{path}?token={TOKEN}", method).status == 403, (path, method)
    assert count_rows(site.definition.study.storage) == before


def test_every_route_that_writes_is_refused_to_the_visitor(site: Site) -> None:
    before = count_rows(site.definition.study.storage)
    writing = [(method, path) for method, path in routes_of(site) if method not in READING]
    assert len(writing) >= 15
    for method, path in writing:
        for headers in ({}, {"HTTP_ORIGIN": f"http://{HOST}"}, {"HTTP_X_HTTP_METHOD_OVERRIDE": "GET"}):
            answer = site(path, method, data={}, **headers)
            assert (answer.status, "read-only" in answer.json["reason"]) == (403, True), (method, path)
    assert count_rows(site.definition.study.storage) == before


def test_what_the_page_reads_is_answered_and_no_other_route(site: Site) -> None:
    closed = {"/incompatible-rdb-schema", "/artifacts/1/0a-1b", "/artifacts/1/1/0a-1b"}
    reading = [path for method, path in routes_of(site) if method == "GET"]
    assert set(reading) > closed
    for path in (*reading, "/dashboard/", "/dashboard/studies/1/trials"):
        for method in READING:
            answer = site(path, method)
            assert answer.status in ((403,) if path in closed else (200, 302)), (method, path, answer.body)
            assert (answer.body == b"") or method == "GET"
    for path in ("/api", "/api/studies/-1", "/api/studies/1/note", "/api/studies/1\n", "/api/\xffllm"):
        assert site(path).status == 403, path


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:1234", "LOCALHOST", "[::1]:8080"])
def test_names_of_this_machine_are_answered_on_any_port(site: Site, host: str) -> None:
    assert site("/api/studies", HTTP_HOST=host).status == 200


def test_the_token_becomes_another_secret_as_a_cookie_and_leaves_the_address(site: Site) -> None:
    answer = site(f"/dashboard/studies/1?token={TOKEN}&x=a+b&y=%C3%BC%26&z=%FF", HTTP_COOKIE=None)
    assert (answer.status, answer.body) == (200, b"")
    assert answer.headers["refresh"] == "0; url=/dashboard/studies/1?x=a+b&y=%C3%BC%26&z=%FF"
    assert answer.headers["referrer-policy"] == "no-referrer"
    parts = answer.headers["set-cookie"].split("; ")
    assert parts[0] == COOKIE
    assert {part.lower() for part in parts[1:]} == {"httponly", "path=/", "samesite=strict"}
    assert TOKEN not in str(answer.headers)
    # Another server of this host sets what it likes, and a proxy may join cookies by a comma.
    for cookies in (f'json={{"a": "b"}}; {COOKIE}; broken=;;', f"a=b, {COOKIE},c=d"):
        assert site("/dashboard/studies/1", HTTP_COOKIE=cookies).status == 200
    for path in ("//evil.example/", "/\\evil.example/", "/a\r\nSet-Cookie: x=y"):
        place = site(f"{path}?token={TOKEN}").headers["refresh"]
        assert re.fullmatch(r"0; url=/[^/\\\r\n][^\\\r\n]*", place), place


def test_every_server_has_a_secret_of_its_own_and_shows_none() -> None:
    controls = [AccessControl(lambda *_: [], token=TOKEN, names=(), cookie="x") for _ in range(2)]
    assert controls[0].secret != controls[1].secret
    assert TOKEN not in repr(controls[0])
    assert controls[0].secret not in repr(controls[0])


def test_a_link_of_another_site_can_be_followed(site: Site) -> None:
    link = {"HTTP_SEC_FETCH_SITE": "cross-site", "HTTP_SEC_FETCH_MODE": "navigate", "HTTP_SEC_FETCH_DEST": "document"}
    assert site("/dashboard/studies/1", **link).status == 200
    assert site("/dashboard/studies/1", HTTP_COOKIE=None, **link).status == 403
    assert site("/api/studies/1", "POST", **link).status == 403
    answer = site(f"/dashboard/studies/1?token={TOKEN}", HTTP_COOKIE=None, **link)
    assert (answer.status, answer.headers["refresh"]) == (200, "0; url=/dashboard/studies/1")


def test_all_answers_keep_to_themselves(site: Site) -> None:
    for path in ("/dashboard", "/api/studies", "/static/bundle.js", "/csv/1", "/healthz", "/nonsense"):
        headers = site(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert headers["cross-origin-opener-policy"] == "same-origin"
        assert headers["content-security-policy"].endswith("base-uri 'none';form-action 'self';frame-ancestors 'none'")
        assert headers.get("cache-control") == (None if path.startswith("/static/") else "no-store")
        assert not [name for name in headers if name.startswith("access-control-")]
    assert "script-src 'self' 'unsafe-eval'" in site("/dashboard").headers["content-security-policy"]


def test_the_opener_policy_is_sent_only_where_browsers_heed_it(site: Site) -> None:
    for host, is_sent in (
        ("192.0.2.1:8080", False),
        ("LOCALHOST", True),
        ("127.9.9.9:8080", True),
        ("[::1]:8080", True),
        ("127.0.0.1.example", False),
    ):
        answer = site("/healthz", HTTP_HOST=host)
        assert ("cross-origin-opener-policy" in answer.headers) == is_sent, host


def test_redirects_name_no_host(site: Site) -> None:
    for forwarded in (None, "evil.example"):
        answer = site("/", HTTP_X_FORWARDED_HOST=forwarded)
        assert (answer.status, answer.headers["location"]) == (302, "/dashboard")


def test_a_request_without_the_usual_headers_is_no_error(site: Site) -> None:
    assert site("/static/bundle.js").headers.get("content-encoding") is None
    assert site("/static/bundle.js", HTTP_ACCEPT_ENCODING="gzip").headers["content-encoding"] == "gzip"


def test_nothing_of_language_models_and_uploads_is_offered(site: Site) -> None:
    found = site("/api/meta").json
    assert (found["llm_is_available"], found["artifact_is_available"]) == (False, False)


def test_reading_makes_no_folder_and_writes_nothing(searched_anywhere: StudyDefinition) -> None:
    url = searched_anywhere.study.storage
    file = Path(url.removeprefix("sqlite:///"))
    before = count_rows(url), file.read_bytes() if url.startswith("sqlite") else None
    site = make_site(searched_anywhere)
    for method, path in routes_of(site):
        if method == "GET":
            assert site(path).status < 500
    assert (count_rows(url), file.read_bytes() if url.startswith("sqlite") else None) == before
    assert not Path(searched_anywhere.study.artifacts).exists()


def test_the_study_has_a_note_and_its_metric_a_name(site: Site) -> None:
    detail = site("/api/studies/1?after=0").json
    assert detail["objective_names"] == ["validation accuracy"]
    note = detail["note"]["body"]
    for text in (
        "**validation accuracy** after 2 epochs",
        "width = {int = [8, 32]}",
        "lr = {float = [0.001, 0.1], log = true}",
        "[fixed]\ndepth = 2\n",
        'name = "digits"\nvalidation = 200\n',
        "trials = 4\nepochs = 2\n",
        "seed = 0",
        "hpsearch run small.toml",
        "hpsearch export small.toml",
    ):
        assert text in note, note


def test_the_commands_of_the_note_can_be_typed(site: Site) -> None:
    verbs = typer.main.get_command(cli_app.app).commands  # type: ignore[attr-defined]
    commands = re.findall(r"^hpsearch (\w+)( --\w+)? small\.toml", site("/api/studies/1").json["note"]["body"], re.M)
    assert len(commands) >= 5
    for verb, option in commands:
        options = [name for parameter in verbs[verb].params for name in parameter.opts]
        assert not option or option.strip() in options


def test_the_note_tells_the_budget_of_the_day_and_no_password() -> None:
    definition = make_definition(
        "postgresql://me:secret@host/db",
        search={
            "optimizer": {"choice": ["adam", "sgd", "rmsprop"]},
            "momentum": {"float": [0.0, 0.9], "when": {"optimizer": ["sgd", "rmsprop"]}},
        },
    )
    note = notes.describe_study(definition, {"trials": 44, "epochs": 2, "minutes": 3}, "x.toml")
    assert "trials = 44\nepochs = 2\nminutes = 3.0\n" in note
    assert 'momentum = {when = {optimizer = ["sgd", "rmsprop"]}, float = [0.0, 0.9]}' in note
    assert "secret" not in note


def test_trials_that_did_not_complete_say_why(searched_anywhere: StudyDefinition) -> None:
    site = make_site(searched_anywhere)
    complete, pruned, failed, killed = site("/api/studies/1?after=0").json["trials"]
    assert complete["note"] == {"version": 0, "body": ""}
    assert "0.8885 < 0.9412 (median of 12 trials) at epoch 1" in pruned["note"]["body"]
    assert "**Pruned**, on worker w1" in pruned["note"]["body"]
    assert f"`````text\nexception: {HOSTILE}\n`````" in failed["note"]["body"]
    assert "killed: no heartbeat for 60 s (worker w1, epoch 1)" in killed["note"]["body"]


@pytest.mark.parametrize(
    "attributes",
    [{"failure": "disk"}, {"failure": {"kind": 1}}, {"interruptions": [3]}, {"pruning": []}, {"worker": [None]}],
)
def test_odd_attributes_cost_a_note_and_not_the_page(site: Site, attributes: dict[str, Any]) -> None:
    with writing(site) as study:
        trial = add_trial(study, value=None)
        for key, value in attributes.items():
            trial.set_user_attr(key, value)
        study.tell(trial, state=TrialState.PRUNED)
    answer = site("/api/studies/1?after=0")
    assert (answer.status, len(answer.json["trials"])) == (200, 4)
    assert "width" in answer.json["note"]["body"]


@pytest.mark.parametrize("is_missed", [False, True])
def test_a_study_made_anew_is_shown_without_notes_of_the_old(site: Site, is_missed: bool) -> None:
    assert len(site("/api/studies/1?after=0").json["trials"]) == 4
    assert len(site("/csv/1").body.splitlines()) > 4
    with writing(site) as study:
        optuna.delete_study(study_name="small", storage=study._storage)
        if is_missed:
            assert site("/api/studies/1?after=0").status == 404
        add_trial(open_study(site.definition, study._storage._backend), value=0.75)  # type: ignore[attr-defined]
    assert len(site("/csv/1").body.splitlines()) == 2
    detail = site("/api/studies/1?after=0").json
    assert [trial["values"] for trial in (*detail["trials"], *detail["best_trials"])] == [[0.75]] * 2
    assert detail["note"]["body"] == ""


def test_a_note_that_somebody_wrote_stays(site: Site) -> None:
    with writing(site) as study:
        optuna_dashboard.save_note(study, "Mine")
        trial_id = study.trials[1]._trial_id
        optuna_dashboard._note.save_note_with_version(study._storage, study._study_id, trial_id, 1, "Mine, too")
    detail = site("/api/studies/1?after=0").json
    assert detail["note"] == {"version": 1, "body": "Mine"}
    assert detail["trials"][1]["note"] == {"version": 1, "body": "Mine, too"}
    assert "exception" in detail["trials"][2]["note"]["body"]


def test_polling_reads_only_what_is_new(searched_anywhere: StudyDefinition) -> None:
    site, read = make_site(searched_anywhere), list[int]()
    original = Storage._get_trials

    def count(self: Storage, *args: Any, **options: Any) -> Any:
        trials = original(self, *args, **options)
        read.append(len(trials))
        return trials

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Storage, "_get_trials", count)
        site("/api/studies/1?after=0")
        assert read[0] == 4
        read.clear()
        for _ in range(3):
            site("/api/studies/1?after=4")
        assert read
        assert max(read) <= 1, "finished trials were read again"


@pytest.mark.parametrize("values", [(), (None,), (0.9,), (0.9, 0.9), (0.9, None, 0.8, 0.7)])
def test_no_request_fails_however_few_trials_there_are(values: tuple[float | None, ...], tmp_path: Path) -> None:
    definition = make_definition(f"sqlite:///{tmp_path / 'study.db'}")
    storage = open_storage(definition.study.storage)
    study = open_study(definition, storage)
    for value in values:
        trial = add_trial(study, value)
        if value is None:
            storage.end_attempt(trial._trial_id, 0, "exception", "why")
    site = make_site(definition)
    plots = ("contour", "slice", "parallel_coordinate", "rank", "edf", "timeline", "pareto_front")
    paths = ["/api/studies/1?after=0", "/api/studies/1/param_importances", "/csv/1", "/api/meta", "/favicon.ico"]
    for path in (*paths, *(f"/api/studies/1/plot/{plot}" for plot in plots if plot != "pareto_front")):
        answer = site(path)
        assert answer.status == 200, (path, answer.body)


def test_an_outage_is_an_error_in_one_line_and_passes(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise StorageUnavailable("the storage postgresql://me:***@host/db cannot be reached")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Storage, "get_all_studies", fail)
        patch.setattr(Storage, "_get_trials", fail)
        assert site("/api/studies/1").status == 500
        answer = site("/csv/1")
        assert (answer.status, answer.body) == (
            500,
            b"Server error: the storage postgresql://me:***@host/db cannot be reached\n",
        )
    assert [record.getMessage().count("\n") for record in caplog.records] == [0, 0]
    assert all("cannot be reached" in record.getMessage() for record in caplog.records)
    assert site("/api/studies/1").status == 200
    assert site("/csv/1").status == 200


@contextmanager
def connected(address: str) -> Iterator[Callable[..., http.client.HTTPResponse]]:
    place = urlsplit(address)
    connection = http.client.HTTPConnection(str(place.hostname), place.port, timeout=30)

    def ask(path: str, method: str = "GET", body: bytes | None = None, **headers: str) -> http.client.HTTPResponse:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        response.body = response.read()  # type: ignore[attr-defined]
        return response

    try:
        yield ask
    finally:
        connection.close()


def test_the_server_answers_on_a_free_port_and_ends(searched: StudyDefinition) -> None:
    with app.serve(searched, "small.toml") as address, connected(address) as ask:
        place = urlsplit(address)
        assert address.startswith(f"http://127.0.0.1:{place.port}/dashboard/studies/1?token=")
        assert len(place.query) > 25
        assert ask("/healthz").status == 200
        assert ask("/api/studies").status == 403
        answer = ask(f"{place.path}?{place.query}")
        assert answer.status == 200
        assert place.query.removeprefix("token=") not in str(answer.headers)
        cookie = str(answer.headers["Set-Cookie"]).partition(";")[0]
        assert cookie.startswith(f"hpsearch_{place.port}=")
        assert ask("/api/studies", Cookie=cookie).status == 200
        assert answer.headers["Server"] is None
        assert "waitress" not in str(answer.headers)
        port = place.port or 0
        with pytest.raises(UsageError, match=f"port {port} is already in use; choose another with --port"):
            app.serve(searched, "small.toml", port=port).__enter__()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)
    with app.serve(searched, "small.toml", port=port) as address:
        assert f":{port}/" in address


def test_other_machines_need_a_token_of_the_user(searched: StudyDefinition) -> None:
    with pytest.raises(UsageError, match="HPSEARCH_TOKEN"):
        app.serve(searched, "small.toml", host="0.0.0.0").__enter__()
    for token in ("short", "with a blank in its middle", "a-token-with-umläuts"):
        with pytest.raises(UsageError, match="at least 8"):
            app.serve(searched, "small.toml", token=token).__enter__()
    with pytest.raises(UsageError, match="is not an address of this machine"):
        app.serve(searched, "small.toml", host="no.such.host.invalid", token=TOKEN).__enter__()
    with pytest.raises(UsageError, match=r"cannot listen on 192\.0\.2\.1:0: "):
        app.serve(searched, "small.toml", host="192.0.2.1", token=TOKEN).__enter__()
    for host in ("a" * 70, ".."):
        with pytest.raises(UsageError, match="is not an address of this machine"):
            app.serve(searched, "small.toml", host=host, token=TOKEN).__enter__()
    with app.serve(searched, "small.toml", host="0.0.0.0", token=TOKEN) as address:
        place = urlsplit(address)
        assert place.hostname == socket.gethostname().lower()
        with connected(f"http://127.0.0.1:{place.port}") as ask:
            cookie = enter(ask, f"{place.path}?{place.query}")
            for host in (socket.gethostname(), "127.0.0.1", *server.host_names("0.0.0.0", "0.0.0.0")):
                assert ask("/api/studies", Host=host, Cookie=cookie).status == 200, host
            assert ask("/api/studies", Host="evil.example", Cookie=cookie).status == 403
            assert ask("/api/studies", Host=socket.gethostname()).status == 403


@pytest.mark.parametrize("host", ["0", "0.0.0.0", "0x0", "*", "::", "::0", "0:0:0:0:0:0:0:0"])
def test_all_addresses_are_known_however_they_are_spelled(searched: StudyDefinition, host: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "create_server", lambda *_, **__: pytest.fail("it listens"))
        with pytest.raises(UsageError, match="HPSEARCH_TOKEN"):
            app.serve(searched, "small.toml", host=host).__enter__()
    with app.serve(searched, "small.toml", host=host, token=TOKEN) as address:
        assert urlsplit(address).hostname == socket.gethostname().lower()


@pytest.mark.parametrize("host", ["127.1", "127.0.0.2", "LOCALHOST", "localhost", "::1", "0:0:0:0:0:0:0:1"])
def test_loopback_is_known_however_it_is_spelled(searched: StudyDefinition, host: str) -> None:
    with app.serve(searched, "small.toml", host=host) as address, connected(address) as ask:
        assert ask("/healthz").status == 200
        assert server.host_names(host, "127.0.0.1") <= {host.lower(), f"[{host}]", "localhost", "127.0.0.1", "[::1]"}


def test_names_of_this_machine_are_addresses_and_no_hardware() -> None:
    names = server.host_names("0.0.0.0", "0.0.0.0")
    hardware = [
        each.address for found in psutil.net_if_addrs().values() for each in found if each.family == psutil.AF_LINK
    ]
    assert hardware
    assert not names & {spelled for each in hardware for spelled in (each, f"[{each}]")}


def test_a_server_refuses_and_leaves_nothing_behind(searched: StudyDefinition) -> None:
    process = psutil.Process()
    with app.serve(searched, "small.toml"):
        pass  # what is loaded once is loaded now
    before = threading.active_count(), process.num_fds()
    with app.serve(searched, "small.toml") as address, connected(address) as ask:
        place = urlsplit(address)
        own = {"Cookie": enter(ask, f"{place.path}?{place.query}")}
        assert ask("/api/studies/1", "DELETE", **own).status == 403
        with connected(address) as ask_much:
            assert ask_much("/api/artifacts/1", "POST", b"x" * 70_000, **own).status == 413
        redirect = ask("/", **own, **{"X-Forwarded-Host": "evil.example"})
        assert (redirect.status, redirect.headers["Location"]) == (302, "/dashboard")
        page, head = ask("/dashboard", **own), ask("/dashboard", "HEAD", **own)
        assert (page.status, head.status) == (200, 200)
        assert int(page.headers["Content-Length"]) == len(page.body)  # type: ignore[attr-defined]
        assert head.headers["Content-Length"] in (None, page.headers["Content-Length"])
        assert ask("/api/studies", **own).status == 200
    wait_until(lambda: threading.active_count() <= before[0] and process.num_fds() <= before[1])


@pytest.mark.parametrize("name", ["serve_in_threads", "Dashboard", "listen", "load_study"])
def test_what_fails_before_it_serves_leaves_nothing_open(searched: StudyDefinition, name: str) -> None:
    process = psutil.Process()
    with app.serve(searched, "small.toml"):
        pass
    before = process.num_fds()
    opened: list[Storage] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, name, lambda *_, **__: 1 / 0)
        patch.setattr(app, "open_storage", lambda *a, **k: opened.append(open_storage(*a, **k)) or opened[0])  # type: ignore[func-returns-value]
        with pytest.raises(ZeroDivisionError):
            app.serve(searched, "small.toml").__enter__()
    assert opened[0].engine.pool.checkedin() == 0  # type: ignore[attr-defined]
    wait_until(lambda: process.num_fds() <= before)


def test_a_browser_is_given_a_file_that_only_this_user_can_read(
    searched: StudyDefinition, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Path] = []

    def look(given: str) -> None:
        assert "token" not in given
        file = Path(urlsplit(given).path)
        seen.append(file)
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        text = file.read_text()
        assert re.search(r'content="0; url=http://127\.0\.0\.1:[0-9]+/dashboard/studies/1\?token=[\w-]+"', text), text
        raise KeyboardInterrupt

    monkeypatch.setattr("webbrowser.open", look)
    monkeypatch.setattr(options, "NamedStudy", lambda *_: SimpleNamespace(definition=searched, arguments="small.toml"))
    with pytest.raises(KeyboardInterrupt):
        watch.dashboard("small.toml", token=None, host="127.0.0.1", port=0, opens=True)
    [file] = seen
    assert not file.exists()
    with app.redirect_file('http://x/?a=1&"><script>') as place:
        assert '"0; url=http://x/?a=1&amp;&quot;&gt;&lt;script&gt;"' in Path(urlsplit(place).path).read_text()


def wait_until(is_so: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it is not so"
        gc.collect()
        time.sleep(0.02)


def enter(ask: Callable[..., Any], place: str) -> str:
    """The cookie that the printed address gives."""
    return str(ask(place).headers["Set-Cookie"]).partition(";")[0]


def test_a_study_that_is_not_there_is_named(tmp_path: Path) -> None:
    definition = make_definition(f"sqlite:///{tmp_path / 'study.db'}")
    with pytest.raises(StudyNotFound, match="no search found"):
        app.serve(definition, "small.toml").__enter__()
    open_study(definition, open_storage(definition.study.storage))
    other = make_definition(definition.study.storage, study={"name": "other"})
    with pytest.raises(StudyNotFound, match="study 'other' not found"):
        app.serve(other, "small.toml").__enter__()
