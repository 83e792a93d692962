"""What the documentation says is so: its commands run, its names exist, its map is whole."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer.core
import typer.main
import yaml

import hpsearch
from hpsearch import errors
from hpsearch.cli import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
MODULES = sorted(path.stem for path in (ROOT / "hpsearch").glob("[a-z]*.py"))


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.timeout(600)
def test_every_command_and_program_of_the_readme_runs(tmp_path: Path) -> None:
    for name in ("hpsearch", "scripts", "studies", "tests"):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.db*", "artifacts")
        )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "README.md").touch()
    subprocess.run([ROOT / "scripts" / "install", "dev"], check=True)  # so that quickstart finds nothing to install
    (tmp_path / ".venv").symlink_to(ROOT / ".venv")
    # No MNIST and no network: quickstart then takes digits, which the other commands go on with.
    blocked = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    environment = os.environ | blocked | {"HPSEARCH_DATA": str(tmp_path / "no-data")}
    commands = [line[2:] for block in blocks("console") for line in block.splitlines() if line.startswith("$ ")]
    assert len(commands) > 10
    for command in commands:
        is_server = command.startswith("hpsearch dashboard")
        process = subprocess.run(
            ["timeout", "8" if is_server else "300", "bash", "-c", f"source .venv/bin/activate && {command}"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        # The doctor may find that other tests keep the cores busy.
        expected = {124} if is_server else {0, 1} if command.startswith("hpsearch doctor") else {0}
        assert process.returncode in expected, f"{command}\n{process.stdout}\n{process.stderr}"
        if command == "scripts/quickstart":
            assert "MNIST can be neither found nor downloaded" in process.stderr
            assert "test accuracy 0.9" in process.stdout
    subprocess.run([sys.executable, "-c", "\n".join(blocks("python"))], cwd=tmp_path, env=environment, check=True)


def test_scripts_and_manifests_of_the_readme_are_well_formed_and_their_options_exist() -> None:
    for script in blocks("bash"):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    [manifest] = map(yaml.safe_load, blocks("yaml"))
    [container] = manifest["spec"]["template"]["spec"]["containers"]
    lines = [line for script in blocks("bash") for line in script.splitlines()] + [" ".join(container["command"])]
    group = typer.main.get_command(app.app)
    assert isinstance(group, typer.core.TyperGroup)
    typed = [match for line in lines if (match := re.match(r"(?:srun )?hpsearch (\w+) (.*)", line))]
    assert len(typed) > 5
    for match in typed:
        known = {name for parameter in group.commands[match[1]].params for name in parameter.opts}
        assert set(re.findall(r"--[\w-]+", match[2].partition("#")[0])) <= known, match[0]


def test_the_study_file_of_the_readme_is_valid() -> None:
    import tomllib

    from hpsearch.config.definition import parse_definition

    [text] = blocks("toml")
    assert parse_definition(tomllib.loads(text)).budget.trials == 60


def test_the_readme_names_every_verb_and_hyperparameter() -> None:
    from hpsearch.config.space import Hyperparameters

    group = typer.main.get_command(app.app)
    assert isinstance(group, typer.core.TyperGroup)
    assert set(re.findall(r"^\| `hpsearch (\w+)", README, re.MULTILINE)) == set(group.commands)
    assert set(Hyperparameters.model_fields) <= set(re.findall(r"\| `(\w+)` \|", README))


def test_the_public_names_are_sorted_and_there() -> None:
    assert hpsearch.__all__ == sorted(hpsearch.__all__)
    for name in hpsearch.__all__:
        assert getattr(hpsearch, name).__name__ == name
        assert getattr(hpsearch, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = hpsearch.nonsense


def test_the_map_of_the_package_names_every_module() -> None:
    drawn = re.findall(r"[a-z_]+", (hpsearch.__doc__ or "").split(">>>")[0])
    assert set(MODULES) <= set(drawn)


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


@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_one_idea_on_few_pages(name: str) -> None:
    text = (ROOT / "hpsearch" / f"{name}.py").read_text()
    assert ast.get_docstring(ast.parse(text))
    assert len(text.splitlines()) <= 300


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").iterdir()), ids=lambda path: path.name)
def test_a_script_says_on_top_what_it_does(script: Path) -> None:
    lines = script.read_text().splitlines()
    if script.suffix != ".txt":
        assert lines[0].startswith("#!")
        assert lines[1].startswith(f"# scripts/{script.name}")
        assert os.access(script, os.X_OK)
