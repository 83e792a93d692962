"""The documentation is true: its commands and programs run, its links lead somewhere, and it names all there is."""

import ast
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from inspect import isclass, signature
from itertools import count, groupby
from pathlib import Path

import pytest
import typer.core
import typer.main
import yaml

import hpsearch
from hpsearch import errors
from hpsearch.cli import app
from hpsearch.config.definition import parse_definition
from hpsearch.training.kinds import Hyperparameters
from tests.acceptance.commands import Command, wait_for

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "hpsearch"
README, INSIDE = ROOT / "README.md", PACKAGE / "README.md"
DOCS = PACKAGE / "docs"
GUIDES = [README, *(DOCS / f"{name}.md" for name in ("export", "study-file", "monitoring", "cluster", "reliability"))]
PAGES = [*GUIDES, INSIDE, ROOT / "tests" / "benchmark" / "README.md", ROOT / "tests" / "acceptance" / "README.md"]
ROOMS = sorted({file.parent for file in PACKAGE.rglob("__init__.py")} - {PACKAGE})
_READERS = {"check", "status", "trials", "dashboard", "doctor", "copy", "evaluate", "predict", "report"}


def blocks(language: str, pages: list[Path] = PAGES) -> list[str]:
    pattern = re.compile(rf"^```{language}\n(.*?)^```", re.MULTILINE | re.DOTALL)
    return [block for page in pages for block in pattern.findall(page.read_text())]


def group() -> typer.core.TyperGroup:
    found = typer.main.get_command(app.app)
    assert isinstance(found, typer.core.TyperGroup)
    return found


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """What a user has after a clone and an installation, with a digits study that takes a few seconds."""
    for name in ("scripts", "studies"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.db*", "artifacts"))
    for name in ("pyproject.toml", "tests/digit.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    subprocess.run([ROOT / "scripts" / "install", "dev"], check=True)  # so that quickstart finds nothing to install
    (tmp_path / ".venv").symlink_to(ROOT / ".venv")
    study = tmp_path / "studies" / "digits.toml"
    text = study.read_text()
    for long, short in (("trials = 30", "trials = 6"), ("epochs = 15", "epochs = 4"), ("epochs = 30", "epochs = 15")):
        assert text.count(long) == 1
        text = text.replace(long, short)
    study.write_text(text)
    return tmp_path


@pytest.mark.timeout(600)
def test_every_command_and_program_of_the_guides_runs(tree: Path) -> None:
    commands = [line[2:] for block in blocks("console") for line in block.splitlines() if line.startswith("$ ")]
    assert len(commands) > 20
    assert len(commands) == len(set(commands)), "a command is shown twice"
    Command("--version", cwd=tree, out=tree / "version", err=tree / "version")  # imports torch beside the first command
    program = "\n".join(blocks("python"))
    numbers = count()
    for may_share, some in groupby([*commands, f".venv/bin/python -c {shlex.quote(program)}"], only_reads):
        with ThreadPoolExecutor(2 if may_share else 1) as pool:
            list(pool.map(lambda command: run(command, tree, tree / f"output-{next(numbers)}"), some))


def only_reads(command: str) -> bool:
    """Whether others may run beside the command: it changes neither a study nor a model folder."""
    program, *arguments = shlex.split(command)
    return program.endswith("python") or (program == "hpsearch" and arguments[0] in _READERS)


def run(command: str, tree: Path, log: Path) -> None:
    """Run a command as a user of a shell would, and check its exit status."""
    errors_log, start = log.with_suffix(".err"), time.monotonic()
    words = shlex.split(command)
    if words[0] == "hpsearch":
        process = Command(*words[1:], cwd=tree, out=log, err=errors_log, **offline(tree))
        if words[1] == "dashboard":
            wait_for(lambda: log.exists() and "http://127.0.0.1:" in log.read_text(), "the address of the dashboard")
            process.send_signal(signal.SIGINT)
        status = process.wait(300)
    else:
        with log.open("w") as out, errors_log.open("w") as err:
            status = subprocess.run(
                ["bash", "-c", command], cwd=tree, env=offline(tree), stdout=out, stderr=err, timeout=300, check=False
            ).returncode
    print(f"{time.monotonic() - start:5.1f} s  {command[:80]}")  # shown where the test fails, or with -rA
    # The doctor may find that other tests keep the cores busy.
    allowed = {0, 1} if words[1:2] == ["doctor"] else {0}
    output, messages = log.read_text(), errors_log.read_text()
    assert status in allowed, f"{command}\n{output}\n{messages}"
    if command == "scripts/quickstart":
        assert "using the built-in digits data set instead" in messages
        assert "test accuracy 0.9" in output


def offline(tree: Path) -> dict[str, str]:
    """No MNIST and no network: quickstart then takes digits, which the other commands continue with."""
    blocked = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    return os.environ | blocked | {"HPSEARCH_DATA": str(tree / "no-data"), "TMPDIR": str(tree)}


def test_scripts_and_manifests_are_well_formed_and_their_options_exist() -> None:
    for script in blocks("bash"):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    [manifest] = map(yaml.safe_load, blocks("yaml"))
    [container] = manifest["spec"]["template"]["spec"]["containers"]
    lines = [line for script in blocks("bash") for line in script.splitlines()] + [" ".join(container["command"])]
    typed = [match for line in lines if (match := re.match(r"(?:srun )?hpsearch (\w+) (.*)", line))]
    assert len(typed) > 5
    for match in typed:
        known = {name for parameter in group().commands[match[1]].params for name in parameter.opts}
        assert set(re.findall(r"--[\w-]+", match[2].partition("#")[0])) <= known, match[0]
    for line in lines:
        if match := re.match(r"scripts/(\w+)", line):
            assert (ROOT / match[0]).is_file(), line


def test_every_study_file_of_the_guides_is_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    [network] = [block for block in blocks("python") if "def build(" in block]
    (tmp_path / "nets.py").write_text(network)
    texts = blocks("toml")
    assert texts
    for text in texts:
        assert parse_definition(tomllib.loads(text)).budget.trials == 60


def test_every_command_hyperparameter_and_option_is_named_and_no_other() -> None:
    rows = re.findall(r"^\| `hpsearch (\w+)[^|]* \|(.*)\|$", README.read_text(), re.MULTILINE)
    assert {name for name, _ in rows} == set(group().commands)
    for name, text in rows:
        known = {option for parameter in group().commands[name].params for option in parameter.opts}
        assert set(re.findall(r"--[\w-]+", text)) <= known, name
    named = re.findall(r"^\| `(\w+)` \|", (DOCS / "study-file.md").read_text(), re.MULTILINE)
    assert sorted(named) == sorted(Hyperparameters.model_fields)


def test_every_key_of_a_study_file_is_described_with_its_default() -> None:
    definition = parse_definition({"search": {"depth": {"int": [1, 2]}}})
    rows = dict(re.findall(r"^\| `(\w+\.\w+)` \|.*\| (.*) \|$", (DOCS / "study-file.md").read_text(), re.MULTILINE))
    tables = {name: getattr(definition, name) for name in {key.partition(".")[0] for key in rows}}
    assert set(rows) == {f"{name}.{key}" for name, table in tables.items() for key in type(table).model_fields}
    for key, shown in rows.items():
        section, _, name = key.partition(".")
        default = getattr(tables[section], name)
        if shown.isalnum() and key not in ("data.train", "budget.target"):
            assert str(default).removesuffix(".0") == shown, key


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_heading_of_it(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        assert target.is_file(), link
        assert target.is_relative_to(ROOT), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, link


def test_every_page_is_linked_from_the_readme_which_is_short() -> None:
    lines = README.read_text().splitlines()
    assert len(lines) <= 150
    linked = re.findall(r"\]\(([^):]+\.md)\)", README.read_text())
    assert {(ROOT / link).resolve() for link in linked} == {*PAGES} - {README}
    assert {*DOCS.iterdir()} == {*GUIDES} - {README}


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: str(room.relative_to(PACKAGE)))
def test_a_room_names_each_of_its_files_and_the_page_inside_agrees(room: Path) -> None:
    text = ast.get_docstring(ast.parse((room / "__init__.py").read_text())) or ""
    named = dict(re.findall(r"^(\w+) {2,}(\S.*)$", text, re.MULTILINE))
    found = {entry.stem for entry in room.iterdir() if (entry / "__init__.py").exists() or entry.suffix == ".py"}
    assert set(named) == found - {"__init__"}
    within = f"{room.name}/" if room.parent != PACKAGE else ""
    for name, purpose in named.items():
        assert f"| `{within}{name}{'/' if (room / name).is_dir() else '.py'}` | {purpose} |" in INSIDE.read_text()


def test_the_map_of_the_package_names_every_room() -> None:
    levels = re.findall(r"^ {4}([a-z]+(?: \| [a-z]+)?) {2,}\S", hpsearch.__doc__ or "", re.MULTILINE)
    drawn = [name for level in levels for name in level.split(" | ")]
    assert sorted(drawn) == sorted(room.name for room in ROOMS if room.parent == PACKAGE)
    assert re.findall(r"^([a-z]+(?: \| [a-z]+)?) {2,}\S", INSIDE.read_text(), re.MULTILINE) == levels


@pytest.mark.parametrize("room", [room for room in ROOMS if room.parent == PACKAGE], ids=lambda room: room.name)
def test_a_room_is_described_in_the_same_words_everywhere(room: Path) -> None:
    sentence = (ast.get_docstring(ast.parse((room / "__init__.py").read_text())) or "").partition("\n")[0]
    assert f"### {room.name}\n\n{sentence}" in INSIDE.read_text()
    drawn = f"  {sentence[0].lower()}{sentence[1:].removesuffix('.')}\n"
    assert drawn in INSIDE.read_text()
    assert drawn in (hpsearch.__doc__ or "")


def test_every_function_that_the_way_of_a_trial_passes_is_where_it_says() -> None:
    text = INSIDE.read_text()
    places = re.findall(r"`([\w/]+\.py): ([\w.]+)`", text)
    assert len(places) > 40
    for file, name in places:
        assert name.rpartition(".")[2] in definitions(PACKAGE / file), f"{file}: {name}"
    for name, method in re.findall(r"`(_?[A-Z]\w+)\.(\w+)`", text.partition("## The files")[0]):
        assert any({name, method} <= definitions(file) for file in PACKAGE.rglob("*.py")), f"{name}.{method}"


def definitions(file: Path) -> set[str]:
    """The names that a file gives to functions, classes and constants."""
    found = re.findall(r"^ *(?:def|class) (\w+)|^([A-Z_]+)\b.* = ", file.read_text(), re.MULTILINE)
    return {name for names in found for name in names}


def test_every_public_function_takes_a_path_as_a_string_too() -> None:
    for name in hpsearch.__all__:
        public = getattr(hpsearch, name)
        methods = [value for key, value in vars(public).items() if not key.startswith("_")] if isclass(public) else []
        for function in filter(callable, (public, *methods)):
            for parameter in signature(function).parameters.values():
                kinds = str(parameter.annotation)
                assert "Path" not in kinds or "str" in kinds, f"{name}: {parameter}"


def test_the_public_names_are_sorted_and_there() -> None:
    assert hpsearch.__all__ == sorted(hpsearch.__all__)
    for name in hpsearch.__all__:
        assert getattr(hpsearch, name).__name__ == name
        assert getattr(hpsearch, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = hpsearch.nonsense


def test_the_tree_of_errors_is_the_tree_of_classes() -> None:
    drawn = dict(re.findall(r"(\w+) +(\d+)$", errors.__doc__ or "", re.MULTILINE))
    classes = {
        name: error
        for name, error in vars(errors).items()
        if isinstance(error, type) and issubclass(error, errors.HpsearchError)
    }
    assert {name: int(status) for name, status in drawn.items()} == {
        name: error.exit_status for name, error in classes.items()
    }
    assert all(str(error()) for name, error in classes.items() if name != "DefinitionError")


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_file_says_on_top_what_it_is(file: Path) -> None:
    assert ast.get_docstring(ast.parse(file.read_text()))


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").iterdir()), ids=lambda path: path.name)
def test_a_script_says_on_top_what_it_does(script: Path) -> None:
    lines = script.read_text().splitlines()
    if script.suffix != ".txt":
        assert lines[0].startswith("#!")
        assert lines[1].startswith(f"# scripts/{script.name}")
        assert os.access(script, os.X_OK)
