"""The keyword arguments of a network's function are hyperparameters like those of the built-in kinds."""

import pickle
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import FixedTrial

from hpsearch.config.definition import StudyDefinition, load_definition, parse_definition, read_identity
from hpsearch.config.space import suggest
from hpsearch.errors import DefinitionError, StudyMismatch
from hpsearch.search.study import load_study, open_study
from hpsearch.storage.rdb import Storage

BUILD = """\
raise SystemExit("nothing here runs when a study file is checked")

def build(image_shape, n_classes, *, {}):
    pass
"""
ARGUMENTS = 'depth: int, width: "int" = 64, drop: float = 0, act: Literal["relu", "gelu"] = "relu", skip=True'
SEARCH = "[search]\ndepth = { int = [1, 3] }\nact = { choice = ['relu', 'gelu'] }\n"


def write(folder: Path, arguments: str = ARGUMENTS, tables: str = SEARCH, source: str = BUILD) -> Path:
    (folder / "nets.py").write_text(source.format(arguments))
    file = folder / "own.toml"
    file.write_text(f'[network]\nkind = "nets.py:build"\n{tables}')
    return file


def problems(file: Path) -> list[str]:
    with pytest.raises(DefinitionError) as caught:
        load_definition(file)
    return list(caught.value.problems)


def test_names_types_and_defaults_are_those_of_the_signature(tmp_path: Path) -> None:
    definition = load_definition(write(tmp_path, tables=f"{SEARCH}[fixed]\nlr = 1e-2\ndrop = 1\n"))
    found: Any = suggest(FixedTrial({"depth": 2, "act": "gelu"}), definition.space)
    assert found.arguments() == {"depth": 2, "width": 64, "drop": 1.0, "act": "gelu", "skip": True}
    assert (found.lr, found.batch_size) == (1e-2, 128)
    assert type(found.drop) is float


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("depth: int, lr: float = 1.0", "lr is a hyperparameter of training already; give it another name"),
        ("depth: int, copy: int = 1", "copy cannot be the name of a hyperparameter"),
        ("depth: int, _x: int = 1", "_x cannot be the name of a hyperparameter"),
        ("depth", "depth has neither a type nor a default; its type must be int, float, str, bool or Literal[...]"),
        ("depth: int | None = None", "depth has the type int | None; it must be int, float, str, bool or Literal"),
        ("depth: Optional[int] = None", "depth has the type Optional[int]; it must be"),
        ("depth: Literal['a', None] = 'a'", "depth has the type Literal['a', None]; it must be"),
        ("depth=None", "depth has the default None, but needs one that is int"),
        ("depth: int = None", "depth has the default None, which is no int"),
        ("depth: int = 2.0", "depth has the default 2.0, which is no int"),
        ("depth: bool = 1", "depth has the default 1, which is no bool"),
        ("depth: Literal['a'] = 'b'", "depth has the default 'b', which is no Literal['a']"),
        ("depth: int = SIZE", "depth has the default SIZE, which must be a plain value such as 64"),
        ("depth=[1]", "depth has the default [1], but needs one"),
    ],
)
def test_an_argument_that_cannot_be_a_hyperparameter_is_named_with_its_line(
    tmp_path: Path, arguments: str, message: str
) -> None:
    [problem] = problems(write(tmp_path, arguments))
    assert problem.startswith(f"network.kind: nets.py:3: {message}")


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (
            "build(image_shape, n_classes, depth=1)",
            "build must take depth by name: build(image_shape, n_classes, *, depth)",
        ),
        (
            "build(image_shape, *, depth=1)",
            "build must take image_shape and n_classes, and the hyperparameters after *",
        ),
        ("build(image_shape, n_classes, *sizes)", "build takes *sizes; name each hyperparameter instead"),
        ("build(image_shape, n_classes, *, depth=1, **rest)", "build takes **rest; name each hyperparameter instead"),
    ],
)
def test_a_function_with_other_arguments_is_refused(tmp_path: Path, head: str, message: str) -> None:
    assert problems(write(tmp_path, source=f"def {head}: pass\n")) == [f"network.kind: {message}"]


def test_all_problems_of_a_function_and_of_the_other_tables_are_reported_at_once(tmp_path: Path) -> None:
    file = write(
        tmp_path, "depth, lr=1, **rest", "[search]\nanything = { int = [2, 1] }\nlr = { float = [0.0, 1.0] }\n"
    )
    found = problems(file)
    assert [problem.partition(": ")[0] for problem in found] == ["network.kind"] * 3 + ["search.anything", "search.lr"]


@pytest.mark.parametrize(
    ("tables", "expected"),
    [
        (
            "[search]\nwdith = { int = [1, 2] }\n[fixed]\ndepth = 1",
            "search.wdith: unknown hyperparameter; did you mean 'width'?",
        ),
        (
            "[search]\ndepth = { int = [1, 2] }\n[fixed]\nact = 'rleu'",
            "fixed.act: 'rleu' is not valid; did you mean 'relu'?",
        ),
        ("[search]\ndepth = { choice = [1.5] }", "search.depth: must be a valid integer, but got 1.5"),
        (
            "[search]\ndepth = { int = [1, 2] }\n[[try]]\ndepth = 'x'",
            "try.0.depth: must be a valid integer, but got 'x'",
        ),
        (
            "[search]\nact = { choice = ['relu'] }",
            "search.depth: has no default in the network's function; search it here",
        ),
        (
            "[search]\ndepth = { int = [1, 2], when = { act = ['relu'] } }\nact = { choice = ['relu', 'gelu'] }",
            "search.depth.when: every trial needs depth, which has no default in the network's function",
        ),
    ],
)
def test_mistakes_are_reported_as_for_the_built_in_kinds(tmp_path: Path, tables: str, expected: str) -> None:
    [problem] = problems(write(tmp_path, tables=tables))
    assert problem.startswith(expected)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("resnet", "'resnet' is not valid; valid names: mlp, cnn, or a function of your own such as nets.py:build"),
        ("nets.py", "'nets.py' names no function; write nets.py:build"),
        ("no.py:build", "no.py not found"),
        ("no_such_package:build", "no module 'no_such_package' with Python source is installed"),
    ],
)
def test_a_kind_that_is_not_there_is_named_and_no_hyperparameter_is_called_unknown(
    tmp_path: Path, kind: str, message: str
) -> None:
    file = write(tmp_path, tables="[search]\nlr = { float = [0.1, 1.0] }\n")
    file.write_text(file.read_text().replace("nets.py:build", kind))
    [problem] = problems(file)
    assert problem.startswith("network.kind: ")
    assert message in problem


def test_a_definition_carries_the_source_to_other_processes_and_its_files_do_not(tmp_path: Path) -> None:
    definition = load_definition(write(tmp_path))
    assert definition.space.is_conditional is False  # it is cached
    (tmp_path / "nets.py").unlink()
    copy: StudyDefinition = pickle.loads(pickle.dumps(definition))
    assert copy.network.code
    assert copy.network.code.source == BUILD.format(ARGUMENTS)
    assert copy.fingerprint == definition.fingerprint
    assert copy.to_tables() == definition.to_tables()
    assert definition.to_tables()["network"] == {"kind": "nets.py:build"}
    assert "SystemExit" not in definition.to_toml() + repr(definition)


def test_the_fingerprint_covers_the_source_and_not_the_place_of_its_file(tmp_path: Path) -> None:
    definition = load_definition(write(tmp_path))
    (tmp_path / "moved").mkdir()
    assert load_definition(write(tmp_path / "moved")).fingerprint == definition.fingerprint
    other = load_definition(write(tmp_path, source=BUILD + "# changed\n"))
    assert other.fingerprint != definition.fingerprint
    assert read_identity(definition.identity, other.codes) == definition.identity


def test_a_study_whose_network_was_edited_is_refused_and_goes_on_when_the_edit_is_undone(
    tmp_path: Path, storage: Storage
) -> None:
    definition = load_definition(write(tmp_path))
    open_study(definition, storage)
    edited = load_definition(write(tmp_path, ARGUMENTS + ", more=1"))
    with pytest.raises(StudyMismatch) as caught:
        load_study(edited, storage)
    original = next((tmp_path / "artifacts").rglob("nets.py"))
    assert original.read_text() == BUILD.format(ARGUMENTS)
    digests = " -> ".join(each.identity["network.source"] for each in (definition, edited))
    assert str(caught.value).splitlines()[1:] == [
        f"  nets.py was edited, SHA-256: {digests}",
        f"Undo the change (nets.py as it was: {original}), or set study.name in the file to start a new study.",
    ]
    assert isinstance(load_study(load_definition(write(tmp_path)), storage), optuna.Study)
    assert "network.kind: nets.py:build -> mlp" in _refuse(
        parse_definition({"study": {"name": "own"}, "search": {"lr": {"float": [0.1, 1.0]}}}), storage
    )


def _refuse(definition: StudyDefinition, storage: Storage) -> str:
    with pytest.raises(StudyMismatch) as caught:
        load_study(definition, storage)
    return str(caught.value)
