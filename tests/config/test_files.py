"""Study files are found by name: here, in studies/, or among the examples of the package, which studies/ repeats."""

from pathlib import Path

import pytest

from hpsearch.config.definition import load_definition
from hpsearch.config.files import EXAMPLES, describe_example, find_study_file, list_study_files, write_example
from hpsearch.errors import DefinitionError, UsageError

TABLES = "[search]\nwidth = { int = [8, 32] }"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "studies").mkdir()
    return tmp_path


def test_the_studies_of_the_repository_are_the_examples_byte_for_byte() -> None:
    studies = Path(__file__).parents[2] / "studies"
    assert {file.stem: file.read_bytes() for file in studies.glob("*.toml")} == {
        name: file.read_bytes() for name, file in EXAMPLES.items()
    }
    assert (studies / "nets.py").read_bytes() == EXAMPLES["mnist-resnet"].with_name("nets.py").read_bytes()


def test_a_bare_name_is_a_file_here_else_one_in_studies_else_an_example() -> None:
    assert find_study_file("digits") == EXAMPLES["digits"]
    for file in (Path("studies/digits.toml"), Path("digits.toml")):
        file.write_text(TABLES)
        assert find_study_file("digits") == file
    for name in ("digits.tom", "other/digits", "", "."):
        assert find_study_file(name) is None
    with pytest.raises(
        DefinitionError, match=r"study file not found; did you mean 'digits'\? .*: digits, studies/digi"
    ):
        load_definition("digitss.toml")


def test_a_search_of_an_example_lies_in_the_current_folder(here: Path) -> None:
    study = load_definition("digits").study
    assert study.name == "digits"
    assert study.storage == f"sqlite:///{here / 'digits.db'}"
    assert study.artifacts == str(here / "artifacts")


def test_the_studies_here_are_the_files_that_search_and_the_examples_with_a_database() -> None:
    for file in ("b.toml", "studies/a.toml", "studies/b.toml"):
        Path(file).write_text(TABLES)
    Path("pyproject.toml").write_text('[project]\nname = "search"')
    Path("broken.toml").write_text("[search\n[search]\nwidth = ")
    Path("mnist-cnn.db").touch()
    assert list_study_files() == {
        "mnist-cnn": EXAMPLES["mnist-cnn"],
        "b": Path("b.toml"),
        "broken": Path("broken.toml"),
        "a": Path("studies/a.toml"),
        "studies/b.toml": Path("studies/b.toml"),
    }


def test_an_example_is_written_here_unless_its_name_is_taken() -> None:
    assert write_example("digits") == [Path("digits.toml")]
    assert Path("digits.toml").read_bytes() == EXAMPLES["digits"].read_bytes()
    Path("studies/mnist-mlp.toml").touch()
    for name, file in (("digits", "digits.toml"), ("mnist-mlp", "studies/mnist-mlp.toml")):
        with pytest.raises(UsageError, match=rf"{file} is there already; start it with: hpsearch run {name}"):
            write_example(name)
    with pytest.raises(
        UsageError, match="no example 'mine'; the examples are: digits, mnist-mlp, mnist-cnn, mnist-resnet"
    ):
        write_example("mine")
    assert sorted(map(str, Path().glob("*.toml"))) == ["digits.toml"]


def test_an_example_with_a_network_of_its_own_is_written_with_its_code_and_is_found_without(here: Path) -> None:
    packaged = load_definition("mnist-resnet")
    Path("nets.py").touch()
    with pytest.raises(UsageError, match=r"nets.py is there already; begin in another folder"):
        write_example("mnist-resnet")
    Path("nets.py").unlink()
    assert write_example("mnist-resnet") == [Path("mnist-resnet.toml"), Path("nets.py")]
    written = load_definition("mnist-resnet")
    assert written.network.code
    assert written.network.code.file == str(here / "nets.py")
    assert written.fingerprint == packaged.fingerprint


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_says_in_a_short_line_what_it_searches_and_how_long(name: str) -> None:
    assert "minute" in describe_example(name)
    assert len(describe_example(name)) <= 80 - len("mnist-resnet  ")
