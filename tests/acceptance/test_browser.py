"""The dashboard of real processes in a real Chromium: what a visitor sees, and what pages of other origins get."""

import json
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

from .commands import Command, hpsearch, start, wait_for

WIDTHS = (1280, 390)
STUDY = """
[budget]
trials = {trials}
epochs = 4
[data]
name = "digits"
[search]
width = {{ int = [8, 32] }}
lr = {{ float = [1e-3, 1e-1], log = true }}
optimizer = {{ choice = ["adam", "sgd"] }}
momentum = {{ float = [0.0, 0.9], when = {{ optimizer = ["sgd"] }} }}
[fixed]
depth = 2
[pruner]
kind = "asha"
"""
# Everything that a page can try with another origin; each attempt tells what it got.
ATTACKS = """
async (target) => {
  const got = {};
  const attempt = async (name, tried) => {
    try { got[name] = await tried(); } catch (error) { got[name] = 'nothing'; }
  };
  const element = (tag, attributes) => new Promise((resolve) => {
    const made = Object.assign(document.createElement(tag), attributes);
    made.onload = () => resolve('loaded');
    made.onerror = () => resolve('nothing');
    document.body.append(made);
  });
  const ask = async (options, path) => {
    const response = await fetch(target + path, { credentials: 'include', ...options });
    return response.type + ' ' + response.status + ' ' + (await response.text());
  };
  const body = JSON.stringify({ study_name: 'stolen', directions: ['minimize'] });
  await attempt('read', () => ask({}, '/api/studies/1'));
  await attempt('read blindly', () => ask({ mode: 'no-cors' }, '/api/studies/1'));
  await attempt('image', () => element('img', { src: target + '/favicon.ico' }));
  await attempt('script', () => element('script', { src: target + '/static/bundle.js' }));
  await attempt('style', () => element('link', { rel: 'stylesheet', href: target + '/api/studies' }));
  await attempt('post', () => ask({ method: 'POST', body, headers: { 'Content-Type': 'application/json' } },
    '/api/studies'));
  await attempt('post blindly', () => ask({ mode: 'no-cors', method: 'POST', body }, '/api/studies'));
  await attempt('delete', () => ask({ method: 'DELETE' }, '/api/studies/1'));
  await attempt('beacon', () => { navigator.sendBeacon(target + '/api/studies', body); return 'nothing'; });
  const frame = document.createElement('iframe');
  frame.src = target + '/dashboard/studies/1';
  document.body.append(frame);
  await new Promise((resolve) => { frame.onload = resolve; setTimeout(resolve, 2000); });
  await attempt('frame', () => frame.contentDocument.body.innerText || 'nothing');
  return got;
}
"""
FORM = """
(target) => {
  const form = document.createElement('form');
  Object.assign(form, { method: 'POST', enctype: 'text/plain', action: target + '/api/studies' });
  const field = document.createElement('input');
  Object.assign(field, { name: '{"study_name": "stolen", "directions": ["minimize"], "x": "', value: '"}' });
  form.append(field);
  document.body.append(form);
  form.submit();
}
"""
N_TRIALS = "() => Number((document.body.innerText.match(/([0-9]+) Trials/) ?? [0, 0])[1])"
BUTTONS = """() => [...document.querySelectorAll('button')].map((button) => [
    button.ariaLabel || button.textContent || button.querySelector('svg').dataset.testid, button.checkVisibility()])"""
N_POINTS = "() => document.querySelectorAll('main .js-plotly-plot .point').length"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium on the PATH, which is what Debian's package of that name installs")
    options = ("no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking")
    more = ("disable-component-update", "disable-sync")
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(
            executable_path=chromium, args=[f"--{option}" for option in (*options, *more)]
        )
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a study of two trials that is over."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "small.toml").write_text(STUDY.format(trials=2))
    hpsearch("run", "small.toml", "--workers", 1, cwd=folder)
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(finished, tmp_path / "study")


@contextmanager
def served(folder: Path, *arguments: str) -> Iterator[tuple[str, Command]]:
    """The address that a command prints, and its process, which is ended afterwards."""
    log = folder / f"{arguments[0]}{len(list(folder.iterdir()))}.log"
    process = start(*arguments, cwd=folder, log=log)
    try:
        wait_for(lambda: "token=" in log.read_text() or process.poll() is not None, "the address")
        [address] = re.findall(r"http://\S+", log.read_text())
        yield address, process
    finally:
        process.kill()
        process.wait()


@contextmanager
def another_server(folder: Path) -> Iterator[int]:
    """The port of a server of an empty page."""
    folder.mkdir()
    (folder / "index.html").write_text(
        "<!DOCTYPE html><title>elsewhere</title><link rel=icon href=data:,><body></body>"
    )
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    SimpleHTTPRequestHandler.log_message = lambda *_: None  # type: ignore[method-assign]
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


class Watched:
    """A page, and what went wrong on it."""

    def __init__(self, context: BrowserContext) -> None:
        self.page: Page = context.new_page()
        self.complaints: list[str] = []
        self.page.on("console", lambda message: self._note(message.type == "error", message.text))
        self.page.on("pageerror", lambda error: self._note(True, str(error)))
        self.page.on("requestfailed", lambda request: self._note(True, f"{request.url} {request.failure}"))
        self.page.on("response", lambda answer: self._note(answer.status >= 400, f"{answer.url} {answer.status}"))

    def visit(self, tab: str) -> None:
        """Follow a link of the page's menu."""
        self.page.click(f"a[href$='{tab}']")

    def _note(self, is_wrong: bool, what: str) -> None:
        if is_wrong:
            self.complaints.append(what)


def enter(page: Page, address: str) -> None:
    """Open the printed address, and wait until the page has the token in its cookie and no longer in its address."""
    page.goto(address)
    page.wait_for_url(address.partition("?")[0])


def see(page: Page, script: str, is_enough: Callable[[Any], bool], what: str) -> None:
    """Wait until the page shows enough; events of the page are handled meanwhile."""

    def shows() -> bool:
        page.wait_for_timeout(50)
        return is_enough(page.evaluate(script))

    wait_for(shows, what)


def test_a_running_search_is_seen_with_its_trials_arriving(tmp_path: Path, browser: Browser) -> None:
    (tmp_path / "small.toml").write_text(STUDY.format(trials=2000))
    with served(tmp_path, "run", "small.toml", "--workers", "1", "--dashboard") as (address, process):
        watched = [Watched(browser.new_context(viewport={"width": width, "height": 844})) for width in WIDTHS]
        for each in watched:
            enter(each.page, address)
            assert each.page.evaluate("history.length") == 2  # a blank page, and this one without its token
            see(each.page, N_POINTS, lambda n: n > 3, "points in the plots")
        base = watched[0].page.url.partition("/dashboard")[2]
        before = {each: each.page.evaluate(N_POINTS) for each in watched}
        for each in watched:
            each.visit("/trials")
            see(each.page, N_TRIALS, lambda n: n > 0, "the list of trials")
        numbers = {each: each.page.evaluate(N_TRIALS) for each in watched}
        for each in watched:
            see(each.page, N_TRIALS, partial(lambda n, before: n > before, before=numbers[each]), "another trial")
            each.visit(base)
            see(each.page, N_POINTS, partial(lambda n, before: n > before, before=before[each]), "more points")
            each.visit("/analytics")
            see(each.page, N_POINTS, lambda n: n > 3, "plots of the hyperparameters")
            each.visit("/smartSelection")
            see(each.page, N_POINTS, lambda n: n > 3, "the selection")
            each.visit("/note")
            see(each.page, "() => document.body.innerText", lambda text: "hpsearch run small.toml" in text, "the note")
            assert each.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
            assert each.complaints == []
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=120) == 130
    assert "Traceback" not in (tmp_path / "run1.log").read_text()


def test_a_trial_that_failed_says_why_and_runs_nothing(folder: Path, browser: Browser) -> None:
    from hpsearch.storage.rdb import open_storage

    storage = open_storage(f"sqlite:///{folder / 'small.db'}")
    trial_id = storage.create_new_trial(1)
    storage.end_attempt(trial_id, 0, "exception", "RuntimeError: <img src=x onerror=alert(1)><script>alert(2)</script>")
    storage.engine.dispose()
    with served(folder, "dashboard", "small.toml") as (address, _):
        watched = Watched(browser.new_context())
        watched.page.on("dialog", lambda dialog: watched.complaints.append(dialog.message))
        enter(watched.page, address)
        watched.page.goto(f"{watched.page.url}/trials?numbers=2")
        watched.page.get_by_text("RuntimeError: <img").first.wait_for()
        assert [each for each in watched.complaints if "ERR_ABORTED" not in each] == []


def test_a_page_of_another_origin_can_neither_read_nor_write(folder: Path, browser: Browser) -> None:
    with another_server(folder / "elsewhere") as port, served(folder, "dashboard", "small.toml") as (address, _):
        site = address.partition("/dashboard")[0]
        context = browser.new_context()
        enter(context.new_page(), address)
        before = context.request.get(f"{site}/api/studies/1").json()
        for host in ("127.0.0.1", "localhost"):
            page, answers = context.new_page(), list[tuple[str, int]]()
            page.goto(f"http://{host}:{port}/")
            page.on(
                "response", partial(lambda answer, to: to.append((answer.request.method, answer.status)), to=answers)
            )
            got = page.evaluate(ATTACKS, site)
            assert set(got.values()) == {"nothing"}, got
            [frame] = page.frames[1:]
            is_refused = partial(lambda _, frame: frame.url == "chrome-error://chromewebdata/", frame=frame)
            see(page, "0", is_refused, "the frame to be refused")
            with page.expect_response(f"{site}/**") as answer:
                page.evaluate(FORM, site)
            assert answer.value.status == 403
            assert {status for method, status in answers if method not in ("GET", "HEAD")} == {403}, answers
        assert context.request.get(f"{site}/api/studies/1").json() == before
        assert len(context.request.get(f"{site}/api/studies").json()["study_summaries"]) == 1


def test_a_link_of_another_site_leads_to_the_study(folder: Path, browser: Browser) -> None:
    with another_server(folder / "elsewhere") as port, served(folder, "dashboard", "small.toml") as (address, _):
        watched = Watched(browser.new_context())
        follow(watched.page, f"http://localhost:{port}/", address)
        assert watched.complaints == []


def test_a_link_to_another_machine_leads_to_the_study_and_browsers_complain_of_nothing(
    folder: Path, browser: Browser
) -> None:
    options = ("--host", "0.0.0.0", "--token", "a-token-of-the-test")
    with another_server(folder / "elsewhere") as port, served(folder, "dashboard", "small.toml", *options) as (it, _):
        watched = Watched(browser.new_context())
        follow(watched.page, f"http://localhost:{port}/", it)
        assert watched.complaints == []


def test_a_file_leads_to_the_study(folder: Path, browser: Browser) -> None:
    from hpsearch.monitor.dashboard.app import redirect_file

    with served(folder, "dashboard", "small.toml") as (address, _), redirect_file(address) as file:
        page = browser.new_context().new_page()
        page.goto(file)
        page.wait_for_url(address.partition("?")[0])
        page.get_by_text("small (id=1)").wait_for()


def follow(page: Page, start: str, address: str) -> None:
    page.goto(start)
    page.evaluate("(place) => { location.href = place; }", address)
    page.wait_for_url(address.partition("?")[0])
    page.get_by_text("small (id=1)").wait_for()


def test_the_page_offers_nothing_that_writes_and_what_asks_for_it_is_refused(folder: Path, browser: Browser) -> None:
    from hpsearch.storage.rdb import open_storage

    storage = open_storage(f"sqlite:///{folder / 'small.db'}")
    storage.create_new_trial(1)  # a running one can be failed in Optuna's dashboard
    storage.engine.dispose()
    delete = "() => fetch('/api/studies/1', {method: 'DELETE'}).then((response) => response.json())"
    write = """() => fetch('/api/studies/1/note', {method: 'PUT', headers: {'Content-Type': 'application/json'},
        body: JSON.stringify({version: 1, body: 'Mine'})}).then((response) => response.json())"""
    pages = {
        "/dashboard": ("small", {"Create", "rename study", "delete study"}),
        "/dashboard/studies/1/note": ("hpsearch run small.toml", {"EditIcon"}),
        "/dashboard/studies/1/trials?numbers=2": ("Trial 2 (trial_id", {"EditIcon", "Fail Trial"}),
    }
    with served(folder, "dashboard", "small.toml") as (address, _):
        watched = Watched(browser.new_context())
        enter(watched.page, address)
        site = address.partition("/dashboard")[0]
        for place, (text, hidden) in pages.items():
            watched.page.goto(site + place)
            watched.page.get_by_text(text).first.wait_for()
            buttons = dict(watched.page.evaluate(BUTTONS))
            assert {name for name in buttons if not buttons[name]} >= hidden, "they are in the page"
            assert {name for name in buttons if buttons[name]} <= {"open drawer", "ChevronLeftIcon", "Reload", "Filter"}
            shown = watched.page.evaluate("getComputedStyle(document.querySelector('header div'), '::after').content")
            assert shown == '"read-only"'
        for script in (write, delete):
            assert "read-only" in watched.page.evaluate(script)["reason"]
        assert json.loads(hpsearch("status", "small.toml", "--json", cwd=folder).stdout)["best"]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 0), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_signal_ends_the_dashboard_at_once(folder: Path, number: signal.Signals, status: int) -> None:
    with served(folder, "dashboard", "small.toml") as (_, process):
        process.send_signal(number)
        assert process.wait(timeout=5) == status
    [log] = folder.glob("dashboard*.log")
    assert "Traceback" not in log.read_text()
    assert log.read_text().count("\n") == 2, "the heading and the address"
