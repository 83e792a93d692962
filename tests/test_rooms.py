"""The package has nine rooms, and only one of them relies on Optuna's private API.

The import contracts themselves are in pyproject.toml; `scripts/check` holds them.
"""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "hpsearch"
ROOMS = {"config", "data", "training", "storage", "search", "workers", "bundle", "monitor", "cli"}


def test_the_package_has_nine_rooms_six_files_and_its_documentation() -> None:
    entries = [entry for entry in PACKAGE.iterdir() if entry.name != "__pycache__"]
    assert {entry.name for entry in entries if entry.is_dir()} == ROOMS | {"docs"}
    files = {entry.name for entry in entries if entry.is_file()}
    assert files == {"README.md", "__init__.py", "__main__.py", "errors.py", "plugins.py", "py.typed"}


# Private attributes of others that are used outside `storage`, Optuna's two ids aside: each needs a reason.
PRIVATE = {
    ("search/priors.py", "_get_trials"),  # the list that TPE reads, which is then read once
    ("search/samplers.py", "_get_trials"),  # the only list of trials that TPE reads
    ("monitor/dashboard/server.py", "_map"),  # of waitress
    ("monitor/dashboard/auth.py", "_replace"),  # public, of named tuples
    ("config/urls.py", "_replace"),
    ("workers/forkserver.py", "_config"),  # of multiprocessing: where it makes sockets
    ("workers/forkserver.py", "_forkserver"),
    ("workers/forkserver.py", "_forkserver_pid"),
    ("workers/forkserver.py", "_stop"),
    ("bundle/graph.py", "_schema"),  # of an operator of torch: what it takes and returns
}


def test_private_attributes_are_used_in_storage_and_where_there_is_a_reason() -> None:
    found = {
        (str(file.relative_to(PACKAGE)), node.attr)
        for file in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__")
        if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
    }
    found |= {
        (str(file.relative_to(PACKAGE)), str(name.value))
        for file in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("attr")
        for name in node.args[1:2]
        if isinstance(name, ast.Constant) and str(name.value).startswith("_") and not str(name.value).startswith("__")
    }
    elsewhere = {(file, name) for file, name in found if not file.startswith("storage/")}
    assert {(file, name) for file, name in elsewhere if name not in ("_study_id", "_trial_id")} == PRIVATE


def test_private_names_of_optuna_are_imported_by_storage_alone() -> None:
    found = {
        f"{file.relative_to(PACKAGE)}: {name}"
        for file in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in [f"{getattr(node, 'module', '')}.{alias.name}" for alias in node.names]
        if name.removeprefix(".").startswith("optuna") and "._" in name
    }
    assert found
    assert {line.split("/")[0] for line in found} == {"storage"}
