"""The study file: reports all errors at once, resolves defaults, fingerprints the identity."""

import copy
import pickle
import re
import tomllib
from contextlib import nullcontext
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import FixedTrial
from psycopg.pq import Conninfo

from hpsearch.config.definition import (
    StudyDefinition,
    check_new,
    evolve,
    load_definition,
    parse_definition,
    read_identity,
)
from hpsearch.config.space import suggest
from hpsearch.config.urls import find_secrets, parse_url, remove_secrets, show_url
from hpsearch.errors import DefinitionError, UsageError
from hpsearch.storage.rdb import open_storage

from ..conftest import make_definition

STUDIES = Path(__file__).parents[2] / "studies"

ERRORS = [
    ("[stuudy]\nname = 'x'", "stuudy: unknown key; did you mean 'study'?"),
    ("[study]\nsede = 3", "study.sede: unknown key; did you mean 'seed'? Valid names: name, storage, artifacts, seed"),
    ("[study]\nseed = -1", "study.seed: must be greater than or equal to 0, but got -1"),
    ("[study]\nname = 'a/b'", "study.name: may contain only letters, digits, _ . - and must start with"),
    ("[budget]\ntrials = '60'", "budget.trials: must be a valid integer, but got '60'"),
    ("[budget]\nepochs = 0", "budget.epochs: must be greater than or equal to 1, but got 0"),
    ("[budget]\ntarget = 2.0", "budget.target: must be less than or equal to 1, but got 2.0"),
    ("[data]\nname = 'minst'", "data.name: 'minst' is not valid; did you mean 'mnist'?"),
    ("[data]\nname = 'digits'\nvalidation = 1437", "data: digits has only 1437 training images, but"),
    ("[network]\nkind = 'rnn'", "network.kind: 'rnn' is not valid"),
    ("[search]\nwidht = { int = [8, 9] }", "search.widht: unknown hyperparameter; did you mean 'width'?"),
    ("[network]\nkind = 'mlp'\n[fixed]\nstem_stride = 1", "fixed.stem_stride: unknown hyperparameter"),
    ("[network]\nkind = 'cnn'\n[fixed]\nstem_stride = 3", "fixed.stem_stride: must be less than or equal to 2"),
    ("[search]\nlr = { float = [0.1, 0.0001] }", "search.lr: lower bound 0.1 is greater than upper bound 0.0001"),
    ("[search]\nlr = { float = [0.0, 0.1], log = true }", "search.lr: log = true needs a lower bound > 0, got 0.0"),
    ("[search]\ndropout = { float = [0.0, 0.5], log = true }", "search.dropout: log = true needs a lower bound > 0"),
    ("[search]\ndropout = { float = [0.0, 1.5] }", "search.dropout: must be less than 1, but got 1.5"),
    ("[search]\nwidth = { int = [1.5, 2] }", "search.width.int.0: must be a valid integer, but got 1.5"),
    ("[search]\nwidth = { int = [8] }", "search.width.int: expected exactly two values [low, high], got [8]"),
    ("[search]\nwidth = { int = [8, 33], step = 8 }", "search.width: step 8 does not divide the range from 8 to 33"),
    ("[search]\nbatch_size = { int = [1, 64] }", "search.batch_size: must be greater than or equal to 2, but got 1"),
    (
        "[data]\nfolder = 'x'\nsize = [48]\n[search]\nlr = { float = [0.1, 0.2] }",
        "data.size: must be a number of pixels up to 4096, or height and width: 64 or [48, 64], but got [48]",
    ),
    (
        "[data]\nfolder = 'x'\nsize = [48, 4097]\n[search]\nlr = { float = [0.1, 0.2] }",
        "data.size: must be a number of pixels up to 4096, or height and width: 64 or [48, 64], but got [48, 4097]",
    ),
    ("search = 'x'", "search: expected a table ([section]), got 'x'"),
    ("[search]", "search: expected at least one entry, got {}"),
    (
        "[search]\nmomentum = { float = [0.0, 0.9], when = { optimizer = ['sgd'] } }\n"
        "optimizer = { choice = ['sgd', 'adam'] }\n[[try]]\noptimizer = 'adam'\nmomentum = 0.5",
        "try.0.momentum: has no effect when optimizer = 'adam'",
    ),
    (
        "[search]\nbatch_size = { choice = [32, 64] }\n[[try]]\nbatch_size = 32.0",
        "try.0.batch_size: must be a valid integer, but got 32.0",
    ),
    ("study = 'postgresql://me:secret@host/db'", "study: expected a table ([section]), got 'str'"),
    ("[search]\nwidth = { choice = [8, inf] }", "search.width.choice.1: must be a finite number, string or boolean"),
    (
        "[search]\nlr = { float = [0.1, 0.2], when = { depth = [[2]] } }\ndepth = { int = [2, 4] }",
        "search.lr.when.depth.0: must be a finite number, string or boolean, but got [2]",
    ),
    ("[search]\nwidth = 3", "search.width: expected a range or a choice: { int = [low, high] }"),
    ("[search]\nwidth = { int = [8, 9], logg = true }", "search.width.logg: unknown key; did you mean 'log'?"),
    ("[search]\nlr = { float = [0.1, 1], prior = 2 }", "search.lr.prior: 2 is outside [0.1, 1.0]"),
    (
        "[search]\nlr = { float = [0.1, 1], prior = true }",
        "search.lr.prior: must be a number, or false for no prior, but",
    ),
    (
        "[search]\nlr = { float = [0.1, 1], prior = '0.2' }",
        "search.lr.prior: must be a number, or false for no prior, but",
    ),
    (
        "[search]\nwidth = { int = [8, 32], prior = 9.0 }",
        "search.width.prior: must be an integer, or false for no prior",
    ),
    (
        "[search]\nwidth = { int = [8, 32], step = 8, prior = 9 }",
        "search.width.prior: 9 is not a multiple of step 8 from 8",
    ),
    ("[search]\nlr = { float = [0.1, 1], prior = [1] }", "search.lr.prior: must be a finite number, string or boolean"),
    ("[search]\nlr = { float = [0.1, 1], prior = nan }", "search.lr.prior: must be a finite number, string or boolean"),
    (
        "[search]\noptimizer = { choice = ['adam', 'sgd'], prior = 'rmsprop' }",
        "search.optimizer.prior: 'rmsprop' is not among the choices ['adam', 'sgd']",
    ),
    ("[search]\nlr = { float = [0.1, 1], priro = 1 }", "search.lr.priro: unknown key; did you mean 'prior'?"),
    ("[search]\noptimizer = { choice = ['adma'] }", "search.optimizer: 'adma' is not valid; did you mean 'adam'?"),
    ("[search]\noptimizer = { choice = ['muon'] }", "search.optimizer: 'muon' is not valid"),
    ("[search]\noptimizer = { choice = [] }", "search.optimizer.choice: "),
    ("[search]\noptimizer = { choice = ['sgd', 'sgd'] }", "search.optimizer: duplicate values in ['sgd', 'sgd']"),
    (
        "[search]\nmomentum = { float = [0.0, 0.9], when = { optimizer = ['sgd'] } }",
        "search.momentum.when.optimizer: 'optimizer' is neither in [search] nor in [fixed]",
    ),
    (
        "[search]\nlr = { float = [0.1, 0.2], when = { depth = [9] } }\ndepth = { int = [2, 4] }",
        "search.lr.when.depth: depth can never be 9 in this search",
    ),
    (
        "[search]\nlr = { float = [1, 2], when = { depth = [2] } }\ndepth = { int = [2, 4], when = { lr = [1] } }",
        "search.depth.when: circular `when` conditions",
    ),
    ("[search]\nlr = { float = [0.1, 0.2] }\n[fixed]\nlr = 0.1", "fixed.lr: is in both [search] and [fixed]"),
    ("[fixed]\nschedule = 'step'", "fixed.schedule: 'step' is not valid; valid names: constant, cosine, onecycle"),
    ("[fixed]\nbatch_norm = 1", "fixed.batch_norm: must be a valid boolean, but got 1"),
    ("[[try]]\nwidth = 9000", "try.0.width: 9000 is outside the search range [8, 32]"),
    ("[[try]]\nnope = 1", "try.0.nope: is not in [search]; "),
    ("[sampler]\nkind = 'tpee'", "sampler.kind: 'tpee' is not valid; did you mean 'tpe'?"),
    ("[pruner]\nkind = 'nome'", "pruner.kind: 'nome' is not valid; did you mean 'none'?"),
    ("[recovery]\nheartbeat = 60", "recovery: grace (60 s) must be greater than heartbeat (60 s)"),
    ('[retrain]\nexport = "ensemble"', 'retrain: export = "ensemble" needs several networks, such as seeds = 5'),
    ('[retrain]\nexport = "best"', "retrain.export: 'best' is not valid; valid names: first, ensemble"),
    ("[retrain]\nepochs = 0", "retrain.epochs: must be greater than or equal to 1, but got 0"),
]


@pytest.mark.parametrize(("text", "message"), ERRORS)
def test_each_error_is_reported_with_its_path_and_value(text: str, message: str) -> None:
    raw: dict[str, Any] = {"search": {"width": {"int": [8, 32]}}} | tomllib.loads(text)
    with pytest.raises(DefinitionError) as caught:
        parse_definition(raw)
    assert any(problem.startswith(message) for problem in caught.value.problems), caught.value.problems


def test_all_errors_are_reported_at_once() -> None:
    tables: dict[str, Any] = {}
    for text, _ in ERRORS[:8]:
        for name, table in tomllib.loads(text).items():
            tables.setdefault(name, {}).update(table)
    tables["search"] = {"widht": {"int": [8, 9]}, "lr": {"float": [0.1, 0.0001]}, "dropout": {"float": [0.0, 1.5]}}
    tables["fixed"] = {"schedule": "step"}
    with pytest.raises(DefinitionError) as caught:
        parse_definition(tables)
    assert len(caught.value.problems) == 12


def test_tables_with_mistakes_are_still_checked_against_each_other_and_each_mistake_is_reported_once() -> None:
    text = """
        fixed = { schedule = "step", width = 9 }
        try = [{ width = 33, nope = 2 }, { width = "x" }]
        [search]
        width = { int = [8, 32] }
        momentum = { float = [0.0, 0.9], when = { optimizer = ["sgd"], schedule = ["cosine"] } }
    """
    with pytest.raises(DefinitionError) as caught:
        parse_definition(tomllib.loads(text))
    assert list(caught.value.problems) == [
        "search.momentum.when.optimizer: 'optimizer' is neither in [search] nor in [fixed]; "
        "valid names: width, momentum, schedule, width",
        "search.momentum.when.schedule: schedule can never be 'cosine' in this search",
        "fixed.schedule: 'step' is not valid; valid names: constant, cosine, onecycle",
        "fixed.width: is in both [search] and [fixed]; remove one",
        "try.0.width: 33 is outside the search range [8, 32]",
        "try.0.nope: is not in [search]; valid names: width, momentum",
        "try.1.width: must be a valid integer, but got 'x'",
    ]


def test_the_study_file_of_the_design_is_valid() -> None:
    text = (Path(__file__).parent / "design.toml").read_text()
    definition = parse_definition(tomllib.loads(text))
    assert definition.space.is_conditional
    assert definition.budget.target == 0.992


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.toml")), ids=lambda path: path.stem)
def test_the_study_files_of_the_project_are_valid(path: Path) -> None:
    assert load_definition(path).study.name == path.stem


NUMBERS = """
    study = { name = "numbers" }
    fixed = { weight_decay = 0 }
    try = [{ lr = 1, dropout = 0, batch_size = 64, augment = 0.3 }]
    [search]
    lr = { float = [1e-3, 1], log = true }
    dropout = { choice = [0, 0.5] }
    augment = { float = [0, 1], step = 0.1 }
    batch_size = { choice = [64, 128] }
    momentum = { float = [0.0, 0.9], when = { dropout = [0], weight_decay = [0], augment = [0.3] } }
"""


@pytest.mark.parametrize(
    ("integer", "same"),
    [
        ("lr = 1,", "lr = 1.0,"),
        ("dropout = 0,", "dropout = 0.0,"),
        ("augment = 0.3 ", "augment = 0.30000000000000004 "),
        ("weight_decay = 0 ", "weight_decay = 0.0 "),
        ("[1e-3, 1]", "[0.001, 1.0]"),
        ("[0, 0.5]", "[0.0, 0.5]"),
        ("[0, 1], step", "[0.0, 1.0], step"),
        ("dropout = [0]", "dropout = [0.0]"),
        ("weight_decay = [0]", "weight_decay = [0.0]"),
        ("augment = [0.3]", "augment = [0.30000000000000004]"),
        ("[0.0, 0.9]", "[0, 0.9]"),
    ],
)
def test_equal_numbers_are_the_same_study_however_they_are_written(integer: str, same: str) -> None:
    assert integer in NUMBERS
    definition, other = (parse_definition(tomllib.loads(text)) for text in (NUMBERS, NUMBERS.replace(integer, same)))
    assert other == definition
    assert repr(other.first) == repr(definition.first)
    assert other.fingerprint == definition.fingerprint
    assert parse_definition(tomllib.loads(definition.to_toml())).fingerprint == definition.fingerprint


def test_priors_are_written_back_and_another_prior_is_the_same_study() -> None:
    text = """
        study = { name = "priors" }
        sampler = { prior = true }
        [search]
        lr = { float = [1e-3, 1.0], prior = 1 }
        augment = { float = [0, 1], step = 0.1, prior = 0.3 }
        dropout = { choice = [0, 0.5], prior = 0 }
        width = { int = [8, 32], prior = false }
        flip = { choice = [true, false], prior = false }
    """
    definition = parse_definition(tomllib.loads(text))
    again = parse_definition(tomllib.loads(definition.to_toml()))
    assert again == definition
    priors = {name: dimension.prior for name, dimension in definition.search.items()}
    assert repr(priors) == repr({"lr": 1.0, "augment": 0.1 * 3, "dropout": 0.0, "width": False, "flip": False})
    without = re.sub(r", prior = [\w.]+", "", text).replace("true }\n", "false }\n", 1)
    other = parse_definition(tomllib.loads(without))
    assert other != definition
    assert other.fingerprint == definition.fingerprint
    assert "prior" not in str(definition.identity)
    assert read_identity(definition.identity | {"sampler.prior": True}) == definition.identity


def test_problems_of_priors_are_reported_with_all_others() -> None:
    text = """
        [search]
        lr = { float = [0.1, 1.0], prior = 3 }
        width = { int = [8, 32], prior = "wide", when = { depth = [9] } }
    """
    with pytest.raises(DefinitionError) as caught:
        parse_definition(tomllib.loads(text))
    assert list(caught.value.problems) == [
        "search.lr.prior: 3 is outside [0.1, 1.0]",
        "search.width.when.depth: 'depth' is neither in [search] nor in [fixed]; did you mean 'width'? "
        "Valid names: lr, width",
        "search.width.prior: must be an integer, or false for no prior, but got 'wide'",
    ]


def test_a_value_to_try_brings_what_its_condition_needs_and_no_value_is_dropped() -> None:
    text = """
        [search]
        optimizer = { choice = ["adam", "sgd", "rmsprop"], when = { depth = [3] } }
        depth = { int = [2, 4] }
        momentum = { float = [0.0, 0.9], when = { optimizer = ["sgd", "rmsprop"] } }
        [[try]]
        momentum = 0.5
        [[try]]
        momentum = 0.5
        optimizer = "rmsprop"
        [[try]]
        depth = 2
    """
    definition = parse_definition(tomllib.loads(text))
    assert definition.first == [
        {"momentum": 0.5, "optimizer": "sgd", "depth": 3},
        {"momentum": 0.5, "optimizer": "rmsprop", "depth": 3},
        {"depth": 2},
    ]
    drawn = [suggest(FixedTrial(values), definition.space) for values in definition.first[:2]]
    assert [each.momentum for each in drawn] == [0.5, 0.5]


CONFLICT = """
    [search]
    optimizer = { choice = ["sgd", "adam"] }
    lr = { float = [0.1, 1], when = { optimizer = ["adam"] } }
    momentum = { float = [0, 0.9], when = { optimizer = ["sgd"] } }
    [[try]]
    momentum = 0.5
    lr = 0.1
"""
DROPOUT = "[search]\nlr = { float = [0.1, 0.2], when = { dropout = [0.4] } }\ndropout = { float = [0.1, 0.4] }"
NEVER = "search.lr.when.dropout: dropout is practically never 0.4: its range is continuous; give it a step or choices"


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        (CONFLICT, ["try.0.lr: has no effect when optimizer = 'sgd'"]),
        (DROPOUT, [NEVER]),
        (f"{DROPOUT}\n[[try]]\ndropout = 0.3", [NEVER]),
        (f"{DROPOUT}\n[[try]]\ndropout = 0.4", []),
        (f"{DROPOUT}\n[sampler]\nkind = 'gp'", [NEVER]),
    ],
)
def test_what_has_no_effect_is_a_problem_of_a_new_study(text: str, problems: list[str]) -> None:
    definition = parse_definition(tomllib.loads(text))
    with pytest.raises(DefinitionError) if problems else nullcontext() as caught:
        check_new(definition)
    assert [*(caught.value.problems if caught else ())] == problems


@pytest.mark.parametrize("lines", list(permutations(range(3))))
def test_values_to_try_get_what_suits_all_of_them_whatever_their_order(lines: tuple[int, ...]) -> None:
    search = [
        'optimizer = { choice = ["sgd", "adam", "rmsprop"] }',
        'lr = { float = [0.1, 1.0], when = { optimizer = ["rmsprop"] } }',
        'momentum = { float = [0.0, 0.9], when = { optimizer = ["sgd", "rmsprop"] } }',
    ]
    table = "\n".join(["[search]", *(search[line] for line in lines), "[[try]]", "lr = 0.1", "momentum = 0.5"])
    definition = parse_definition(tomllib.loads(table))
    assert definition.first == [{"lr": 0.1, "momentum": 0.5, "optimizer": "rmsprop"}]
    check_new(definition)


def test_the_resolved_study_reads_back_as_the_same_study() -> None:
    definition = load_definition(STUDIES / "mnist-mlp.toml")
    again = parse_definition(tomllib.loads(definition.to_toml()))
    assert again == definition
    assert again.fingerprint == definition.fingerprint


@pytest.mark.parametrize(
    "url", ["postgresql://me:secret@host:5433/db?sslmode=require&sslpassword=secret", "sqlite:////anywhere/study.db"]
)
def test_neither_the_repr_nor_the_pickle_of_a_definition_has_a_password(url: str) -> None:
    definition = make_definition(url)
    assert "secret" not in f"{definition!r} {definition} {definition.study!r}"
    pickled = pickle.dumps(definition)
    assert b"secret" not in pickled
    there = pickle.loads(pickled)
    assert there.fingerprint == definition.fingerprint
    assert there.study.storage == url.replace(":secret", "").replace("&sslpassword=secret", "")
    assert copy.deepcopy(definition).study.storage == url


def test_every_secret_of_libpq_is_hidden() -> None:
    options = [option for option in Conninfo.get_defaults() if option.dispchar == b"*"]
    names = {option.keyword.decode() for option in options}
    assert names >= {"password", "sslpassword"}
    url = f"postgresql://host/db?{'&'.join(f'{name}=s3cr3t' for name in names)}"
    for shown in (show_url(url), remove_secrets(url), repr(make_definition(url))):
        assert "s3cr3t" not in shown
    assert len(find_secrets(url)) == len(names)


def test_the_resolved_study_hides_the_password() -> None:
    definition = make_definition("postgresql://me:secret@host/db")
    assert "secret" not in definition.to_toml()


def test_relative_paths_in_the_file_are_relative_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "deep" / "mine.toml"
    file.parent.mkdir()
    file.write_text("[search]\nwidth = { int = [8, 32] }")
    assert load_definition(file).study.storage == f"sqlite:///{file.parent}/mine.db"
    assert load_definition(file).study.artifacts == f"{file.parent}/artifacts"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HPSEARCH_STORAGE", "sqlite:///other.db")
    assert load_definition(file).study.storage == f"sqlite:///{tmp_path}/other.db"
    assert load_definition(file, storage="sqlite:///third.db").study.storage == f"sqlite:///{tmp_path}/third.db"
    assert load_definition(file, artifacts="mine").study.artifacts == f"{tmp_path}/mine"
    monkeypatch.setenv("HPSEARCH_ARTIFACTS", "s3://bucket/prefix")
    assert load_definition(file).study.artifacts == "s3://bucket/prefix"


@pytest.mark.parametrize("url", ["sftp://me:secret@host/folder", "s3://AKIA:sec/secret@bucket/x"])
def test_a_password_in_the_url_of_artifacts_is_refused_and_not_repeated(tmp_path: Path, url: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("[search]\nwidth = { int = [8, 32] }")
    with pytest.raises(DefinitionError, match=r"study\.artifacts: .*must not contain a password") as caught:
        load_definition(file, artifacts=url)
    assert "secret" not in str(caught.value)
    assert load_definition(file, artifacts="sftp://me@host/folder").study.artifacts == "sftp://me@host/folder"


@pytest.mark.parametrize("url", ["file://", "file:///", "local://", "s3://"])
def test_a_url_of_artifacts_without_a_path_is_refused(tmp_path: Path, url: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(f'[study]\nartifacts = "{url}"\n[search]\nwidth = {{ int = [8, 32] }}')
    with pytest.raises(DefinitionError, match=f"study.artifacts: {url}: bucket or path missing"):
        load_definition(file)


def test_a_tilde_is_the_home_folder_wherever_a_path_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    file = tmp_path / "mine.toml"
    search = "[search]\nwidth = { int = [8, 32] }"
    file.write_text(f'[study]\nstorage = "sqlite:///~/x.db"\nartifacts = "~/a"\n{search}')
    url, folder = f"sqlite:///{tmp_path}/home/x.db", f"{tmp_path}/home/a"
    assert (load_definition(file).study.storage, load_definition(file).study.artifacts) == (url, folder)
    file.write_text(search)
    given = load_definition(file, storage="sqlite:///~/x.db", artifacts="file://~/a").study
    assert (given.storage, given.artifacts) == (url, folder)
    monkeypatch.setenv("HPSEARCH_STORAGE", "sqlite:///~/x.db")
    monkeypatch.setenv("HPSEARCH_ARTIFACTS", "~/a")
    assert (load_definition(file).study.storage, load_definition(file).study.artifacts) == (url, folder)


def test_an_unknown_home_folder_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("[search]\nwidth = { int = [8, 32] }")
    with pytest.raises(UsageError, match="the home folder ~nobody-at-all is unknown"):
        load_definition(file, storage="sqlite:///~nobody-at-all/x.db")
    with pytest.raises(UsageError, match="the home folder ~nobody-at-all is unknown"):
        load_definition(file, artifacts="~nobody-at-all/x")


@pytest.mark.parametrize("name", ["a b", "what?", "#1", "50%", "a?b#c 100%", "{x}", "x=1&y"])
def test_the_url_of_a_sqlite_database_is_the_path_of_its_file(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    (folder / "mine.toml").write_text("[search]\nwidth = { int = [8, 32] }")
    definition = load_definition(folder / "mine.toml")
    assert parse_url(definition.study.storage).database == f"{folder}/mine.db"
    definition = load_definition(folder / "mine.toml", storage=f"sqlite:///{tmp_path}/{name}.db")
    assert parse_url(definition.study.storage).database == f"{tmp_path}/{name}.db"
    open_storage(definition.study.storage).engine.dispose()
    assert (tmp_path / f"{name}.db").is_file()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("sqlite:///x.db?timeout=5", "takes no options"),
        ("sqlite://folder/x.db", "three slashes"),
        ("sqlite://~/x.db", "three slashes"),
    ],
)
def test_the_url_of_a_sqlite_database_that_names_no_file_is_refused(url: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_url(url)


def test_invalid_toml_is_reported_with_the_line(tmp_path: Path) -> None:
    file = tmp_path / "broken.toml"
    file.write_text("[search]\nwidth = = 3")
    with pytest.raises(DefinitionError, match=r"broken\.toml: not valid TOML: .*line 2"):
        load_definition(file)


def test_a_storage_that_is_no_url_is_refused_without_repeating_it(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("[search]\nwidth = { int = [8, 32] }\n[study]\nstorage = 'me:secret@host'")
    with pytest.raises(UsageError, match="invalid database URL") as caught:
        load_definition(file)
    assert "secret" not in str(caught.value)


def test_a_file_name_that_is_no_valid_study_name_is_reported(tmp_path: Path) -> None:
    file = tmp_path / "my study.toml"
    file.write_text("\ufeff[search]\nwidth = { int = [8, 32] }", encoding="utf-8")  # as Windows' Notepad writes it
    with pytest.raises(DefinitionError, match=r"file name cannot serve as study name: may contain .* got 'my study'"):
        load_definition(file)


def test_the_validation_split_is_a_sixth_by_default() -> None:
    assert parse_definition({"search": {"width": {"int": [8, 9]}}}).data.validation == 10_000


def test_the_fingerprint_of_a_study_of_the_accuracy_does_not_change_between_versions() -> None:
    definition = make_definition(None, study={"metric": "accuracy"})
    assert definition.fingerprint == "c89d8c92e5bd99edfbc8def577cd4b65f93f8d87c609096715135c46b17bbb62"


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("budget", {"trials": 9, "failures": 1}),
        ("sampler", {"kind": "random"}),
        ("pruner", {"kind": "median"}),
        ("recovery", {"retries": 7}),
        ("retrain", {"epochs": 9}),
    ],
)
def test_budget_sampler_pruner_recovery_and_retrain_leave_the_fingerprint_alone(
    section: str, values: dict[str, Any]
) -> None:
    assert make_definition(None, **{section: values}).fingerprint == make_definition().fingerprint


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("budget", {"epochs": 3}),
        ("data", {"split_seed": 1}),
        ("fixed", {"depth": 3}),
        ("search", {"width": {"int": [8, 33]}}),
        ("study", {"seed": 1}),
        ("study", {"metric": "balanced_accuracy"}),
    ],
)
def test_what_makes_trials_incomparable_changes_the_fingerprint(section: str, values: dict[str, Any]) -> None:
    assert make_definition(None, **{section: values}).fingerprint != make_definition().fingerprint


def test_evolve_checks_what_it_replaces() -> None:
    assert evolve(make_definition(), "budget", trials=7).budget.trials == 7
    with pytest.raises(UsageError, match="trials: must be greater"):
        evolve(make_definition(), "budget", trials=0)


def test_the_schema_describes_every_section() -> None:
    properties = StudyDefinition.model_json_schema()["properties"]
    assert {"study", "budget", "data", "network", "search", "fixed", "try"} < set(properties)
    assert "label_smoothing" in properties["fixed"]["properties"]


def test_the_size_of_images_is_one_number_or_height_and_width() -> None:
    for size in (64, [48, 64]):
        tables = {"study": {"name": "x"}, "data": {"folder": "x", "size": size}, "search": {"depth": {"int": [1, 2]}}}
        definition = parse_definition(tables)
        assert parse_definition(tomllib.loads(definition.to_toml().replace('storage = ""', ""))) == definition
