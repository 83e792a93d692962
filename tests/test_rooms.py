"""The package has nine rooms, and what stands on private parts of Optuna stands in one of them.

The import contracts themselves are in pyproject.toml; `scripts/check` holds them.
"""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "hpsearch"
ROOMS = {"config", "data", "training", "storage", "search", "workers", "bundle", "monitor", "cli"}


def test_the_package_has_nine_rooms_five_files_and_its_documentation() -> None:
    entries = [entry for entry in PACKAGE.iterdir() if entry.name != "__pycache__"]
    assert {entry.name for entry in entries if entry.is_dir()} == ROOMS | {"docs"}
    files = {entry.name for entry in entries if entry.is_file()}
    assert files == {"README.md", "__init__.py", "__main__.py", "errors.py", "py.typed"}


def test_private_names_of_optuna_are_used_in_storage_alone() -> None:
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
