"""A function of the user's is read without running it, travels as text, and fails with the line of its file."""

import dataclasses
import inspect
import pickle
import sys
from pathlib import Path

import pytest

from hpsearch.errors import OwnCodeError, UsageError
from hpsearch.plugins import OwnCode

SOURCE = """\
from dataclasses import dataclass

@dataclass
class Block:
    width: int = 3

def build(n):
    return Block(n), __file__, 1 // n
"""


@pytest.fixture
def nets(tmp_path: Path) -> Path:
    file = tmp_path / "nets.py"
    file.write_text(SOURCE)
    return file


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        ("nets.py", SOURCE, "'nets.py' names no function; write nets.py:build or package.module:build"),
        ("nets.py:", SOURCE, "'nets.py:' names no function"),
        (
            "net.py:build",
            SOURCE,
            "net.py not found; did you mean 'nets.py'? A started study has a copy in its artifacts: source/net.py",
        ),
        (
            "nets.py:biuld",
            SOURCE,
            "nets.py has no function 'biuld'; did you mean 'build'? Its top-level functions: build",
        ),
        ("nets.py:build", "", "nets.py has no function 'build'; its top-level functions: none"),
        ("nets.py:build", "x = 1\ndef build(:\n", "nets.py:2: invalid syntax"),
        ("nets.py:build", "# coding: nonsense\n", "nets.py: unknown encoding"),
        ("nets:build", SOURCE, "no module 'nets' with Python source is installed; for nets.py beside the study file"),
        ("no.such.module:build", SOURCE, "no module 'no.such.module' with Python source is installed; install it"),
        ("math:sqrt", SOURCE, "no module 'math' with Python source is installed"),
        ("json.decoder.x:build", SOURCE, "no module 'json.decoder.x' with Python source is installed"),
    ],
)
def test_a_function_that_cannot_be_read_is_named_with_what_there_is(
    nets: Path, path: str, source: str, message: str
) -> None:
    nets.write_text(source)
    with pytest.raises(UsageError) as caught:
        OwnCode.read(path, nets.parent)
    assert message in str(caught.value)


def test_reading_runs_nothing_and_line_ends_and_encodings_are_no_difference(nets: Path) -> None:
    nets.write_text("raise SystemExit\ndef build(): pass\n")
    code = OwnCode.read("nets.py:build", nets.parent)
    nets.write_bytes(b"\xef\xbb\xbfraise SystemExit\r\ndef build(): pass\r\n")
    assert OwnCode.read("nets.py:build", nets.parent).sha256 == code.sha256


def test_the_text_travels_without_its_file_and_has_what_a_module_has(nets: Path) -> None:
    travelled = pickle.dumps(OwnCode.read("nets.py:build", nets.parent))
    nets.unlink()
    code: OwnCode = pickle.loads(travelled)
    block, file, _ = code.load()(1)
    assert (file, dataclasses.asdict(block)) == (str(nets), {"width": 1})
    assert inspect.getsource(code.load()) == SOURCE[SOURCE.index("def build") :]
    assert code.load() is code.load()
    assert sys.modules[type(block).__module__].__loader__.get_source("") == SOURCE  # type: ignore[union-attr]
    assert type(pickle.loads(pickle.dumps(block))) is type(block)


def test_an_error_is_named_with_the_line_of_the_file(nets: Path) -> None:
    code = OwnCode.read("nets.py:build", nets.parent)
    with pytest.raises(ZeroDivisionError) as caught:
        code.load()(0)
    assert code.locate(caught.value).startswith("nets.py:8: ZeroDivisionError: integer")
    nets.write_text("import json\njson.loads('{')\ndef build(): pass\n")
    with pytest.raises(OwnCodeError, match=r"^nets.py:2: JSONDecodeError: "):
        OwnCode.read("nets.py:build", nets.parent).load()
    nets.write_text("def build(): pass\nbuild = 3\n")
    with pytest.raises(OwnCodeError, match=r"'build' is no function after nets.py has run"):
        OwnCode.read("nets.py:build", nets.parent).load()


@pytest.mark.parametrize("line", ["import blocks_of_mine", "from blocks_of_mine.x import y", "from . import blocks"])
def test_a_file_that_imports_another_beside_it_is_told_that_only_one_travels(nets: Path, line: str) -> None:
    (nets.parent / "blocks_of_mine.py").touch()
    nets.write_text(f"{line}\n{SOURCE}")
    with pytest.raises(OwnCodeError, match=r"nets.py:1: .*only nets.py goes to the workers. Put all code in it, or"):
        OwnCode.read("nets.py:build", nets.parent).load()


def test_a_package_that_is_not_installed_is_named(nets: Path) -> None:
    nets.write_text(f"import no_such_package.x\n{SOURCE}")
    with pytest.raises(OwnCodeError, match=r"nets.py:1: .*'no_such_package'; install it wherever workers run$"):
        OwnCode.read("nets.py:build", nets.parent).load()


def test_an_installed_module_is_found_without_importing_it_and_must_be_the_one_that_was_read(
    nets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = nets.parent / "package_of_mine"
    package.mkdir()
    (package / "__init__.py").write_text("imported = True\n")
    (package / "nets.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(nets.parent)
    code = OwnCode.read("package_of_mine.nets:build")
    assert "package_of_mine" not in sys.modules
    assert code.load()(2)[1] == str(package / "nets.py")
    (package / "nets.py").write_text(SOURCE + "# changed\n")
    with pytest.raises(OwnCodeError, match=r"nets.py is not the nets.py that the study was started with"):
        code.load()
