"""Where study files are: in the current folder, in `studies/`, and the examples that come with the package."""

import os
import re
import shlex
from pathlib import Path

from hpsearch.errors import UsageError

_FOLDER = Path(__file__).parent / "examples"
EXAMPLES = {name: _FOLDER / f"{name}.toml" for name in ("digits", "mnist-mlp", "mnist-cnn", "mnist-resnet")}
_CODE = {"mnist-resnet": "nets.py"}  # the file beside an example that it names
_SEARCH_TABLE = re.compile(r"^\s*\[search[].]", re.MULTILINE)


def find_study_file(study: str) -> Path | None:
    """Return the study file that a path or a bare name stands for, or None.

    A bare name is a file here, or else one in `studies/`, or else an example.
    """
    path = Path(study)
    if path.is_file():
        return path
    if path.name != study or path.suffix == ".toml":
        return None
    places = [Path(f"{study}.toml"), Path("studies", f"{study}.toml"), EXAMPLES.get(study)]
    return next((place for place in places if place and place.is_file()), None)


def list_study_files() -> dict[str, Path]:
    """Return the study files here and in `studies/`, and the examples with a database here, by their shortest names."""
    files = [file for folder in (Path(), Path("studies")) for file in sorted(folder.glob("*.toml"))]
    found = {}
    for file in filter(is_study_file, files):
        found[file.stem if find_study_file(file.stem) == file else str(file)] = file
    used = {name: file for name, file in EXAMPLES.items() if Path(f"{name}.db").is_file()}
    return used | found


def is_study_file(file: Path) -> bool:
    """Return whether a TOML file has a table [search], which every study file has; it need not be valid."""
    try:
        return bool(_SEARCH_TABLE.search(file.read_text(encoding="utf-8-sig", errors="replace")))
    except OSError:
        return False


def describe_example(name: str) -> str:
    """Return what an example searches, and how long that takes: its first line."""
    return EXAMPLES[name].read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")


def write_example(name: str) -> list[Path]:
    """Write an example to the current folder and return its study file, and the file with code that it names.

    Raises `UsageError` if there is no such example, or if the name is that of a study file or such a file already.
    """
    if name not in EXAMPLES:
        raise UsageError(
            f"no example '{name}'; the examples are: {', '.join(EXAMPLES)}; "
            f"for your own images: hpsearch init {shlex.quote(name)} --images ~/images"
        )
    code = [Path(_CODE[name])] if name in _CODE else []
    for file in filter(Path.exists, code):
        raise UsageError(f"{file} is there already; begin in another folder")
    written = [write_study_file(name, EXAMPLES[name].read_text(encoding="utf-8"))]
    for file in code:
        file.write_text((_FOLDER / file).read_text(encoding="utf-8"), encoding="utf-8")
    return written + code


def write_study_file(name: str, text: str) -> Path:
    """Write a study file to the current folder and return it. Raises `UsageError` if there is one with this name."""
    check_free(name)
    new = Path(f"{name}.toml")
    with new.open("x", encoding="utf-8") as stream:
        stream.write(text)
    return new


def check_free(name: str) -> None:
    """Raise `UsageError` if the name is that of a study file here or in `studies/`, or no file can be written here."""
    if not os.access(".", os.W_OK):
        raise UsageError("no file can be written to the current folder; begin in another one")
    file = find_study_file(name)
    if file not in (None, EXAMPLES.get(name)):
        start = f"start it with: hpsearch run {shlex.quote(name)}"
        raise UsageError(f"{file} is there already; {start}, or begin in another folder")
