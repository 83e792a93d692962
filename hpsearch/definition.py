"""The study file: read, validated with all its mistakes at once, resolved, fingerprinted."""

import hashlib
import json
import os
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomlkit
from pydantic import Field, TypeAdapter, ValidationError, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError
from tomlkit.items import InlineTable

from hpsearch.database import parse_url, show_url
from hpsearch.errors import DefinitionError, UsageError
from hpsearch.space import (
    AnyDimension,
    Dimension,
    Hyperparameters,
    Problem,
    SearchSpace,
    Table,
    check_space,
    check_try,
    check_values,
    did_you_mean,
    explain,
)

N_TRAINING_IMAGES = {"mnist": 60_000, "fashion-mnist": 60_000, "kmnist": 60_000, "digits": 1_437}


class Study(Table):
    name: str = Field("", pattern=r"^[A-Za-z0-9][\w.-]*$", max_length=100, description="default: the file's stem")
    storage: str = Field("", description="SQLAlchemy URL; default: sqlite:///<name>.db beside the file")
    artifacts: str = Field("artifacts", description="folder of what trials leave behind, in <artifacts>/<name>/")
    seed: int = Field(0, ge=0, lt=2**63)


class Budget(Table):
    """Of the whole study, across all workers and machines."""

    trials: int = Field(60, ge=1, description="finished (complete or pruned) trials")
    epochs: int = Field(10, ge=1, description="full fidelity of a trial")
    minutes: float | None = Field(None, gt=0, description="of searching, pauses not counted")
    target: float | None = Field(None, gt=0, le=1, description="validation accuracy that ends the search")
    failures: int = Field(5, ge=1, description="failed trials that end the search")


class Data(Table):
    name: Literal["mnist", "fashion-mnist", "kmnist", "digits"] = "mnist"
    validation: int = Field(0, ge=1, description="images held out of the training split; default: a sixth")
    train: int | None = Field(None, ge=1, description="size of a smaller training subset")
    split_seed: int = Field(0, ge=0, lt=2**32)

    @model_validator(mode="after")
    def _resolve(self) -> Self:
        n_images = N_TRAINING_IMAGES[self.name]
        if "validation" not in self.model_fields_set:
            object.__setattr__(self, "validation", n_images // 6)
        wanted = self.validation + (self.train or 1)
        if wanted > n_images:
            message = "train + validation <= {n} must hold for {name}, but got {wanted}"
            raise PydanticCustomError("bounds", message, {"n": n_images, "name": self.name, "wanted": wanted})
        return self


class Network(Table):
    kind: Literal["mlp", "cnn"] = "mlp"


class Sampler(Table):
    kind: Literal["tpe", "random", "gp", "cmaes"] = "tpe"
    startup: int = Field(10, ge=1, description="random trials before the sampler learns")


class Pruner(Table):
    kind: Literal["asha", "hyperband", "median", "none"] = "median"


class Recovery(Table):
    heartbeat: int = Field(10, ge=1, description="seconds between two signs of life")
    grace: int = Field(60, ge=2, description="seconds without one after which a worker is given up")
    retries: int = Field(2, ge=0, description="of a trial whose worker was killed")
    checkpoint: float = Field(5.0, ge=0, description="least seconds between two checkpoints of a trial")
    keep: int = Field(3, ge=0, description="checkpoints of finished trials that stay: those of the best")

    @model_validator(mode="after")
    def _check_grace(self) -> Self:
        if self.grace <= self.heartbeat:
            message = "heartbeat < grace must hold, but got (heartbeat={heartbeat}, grace={grace})"
            raise PydanticCustomError("bounds", message, self.model_dump(include={"heartbeat", "grace"}))
        return self


class Retrain(Table):
    epochs: int | None = Field(None, ge=1, description="default: budget.epochs")
    seeds: int = Field(1, ge=1, le=100, description="models trained; the first one is exported")


class StudyDefinition(Table):
    """A study file, checked and resolved: what is searched, on which data, within which budget."""

    study: Study = Study()
    budget: Budget = Budget()
    data: Data = Data()
    network: Network = Network()
    search: dict[str, AnyDimension] = Field(min_length=1)
    fixed: Annotated[dict[str, Any], WithJsonSchema(Hyperparameters.model_json_schema())] = {}
    first: list[dict[str, Any]] = Field([], alias="try")
    sampler: Sampler = Sampler()
    pruner: Pruner = Pruner()
    recovery: Recovery = Recovery()
    retrain: Retrain = Retrain()

    @cached_property
    def space(self) -> SearchSpace:
        return SearchSpace(self.search, self.fixed)

    @property
    def identity(self) -> dict[str, Any]:
        """What makes two trials of a study comparable, as a flat table of `section.key` to value.

        Budget, recovery and retrain may change in a study's life, and so may its place; the epochs of a trial may
        not, since they are part of what its value means.
        """
        tables = self.to_tables()
        kept = {key: tables[key] for key in ("data", "network", "search", "fixed", "try", "sampler", "pruner")}
        kept |= {"study": {"seed": self.study.seed}, "budget": {"epochs": self.budget.epochs}}
        return dict(_flatten(kept))

    @property
    def fingerprint(self) -> str:
        """SHA-256 over `identity`."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    def to_tables(self) -> dict[str, Any]:
        """The resolved study as plain tables, as in a study file, the password of its storage hidden."""
        tables = self.model_dump(by_alias=True, exclude_none=True)
        if self.study.storage:
            tables["study"]["storage"] = show_url(self.study.storage)
        tables["fixed"] = Hyperparameters(**self.fixed).model_dump(include=set(self.fixed))
        tables["search"] = {
            name: table.model_dump(by_alias=True, exclude_defaults=True) for name, table in self.search.items()
        }
        return tables

    def to_toml(self) -> str:
        """The resolved study as the text of a study file."""
        tables = self.to_tables()
        tables["search"] = {name: _inline(table) for name, table in tables["search"].items()}
        return tomlkit.dumps({key: table for key, table in tables.items() if table})


def load_definition(path: Path | str, *, storage: str | None = None) -> StudyDefinition:
    """The definition in a study file, with its defaults and its storage resolved.

    `path` may be the bare name of a file in `studies/`. The storage is the argument, else HPSEARCH_STORAGE, else the
    file's; relative paths in the file are relative to it, others to the current folder. Raises `DefinitionError` with
    one line for each mistake.
    """
    file = _find_study_file(str(path))
    try:
        raw = tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DefinitionError(str(file), [f"cannot be read: {error.strerror}"]) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DefinitionError(str(file), [f"not valid TOML: {error}"]) from error
    definition = parse_definition(raw, str(file))
    name = definition.study.name or file.stem
    given = storage or os.environ.get("HPSEARCH_STORAGE")
    try:
        url = _relative_to(
            Path() if given else file.parent, given or definition.study.storage or f"sqlite:///{name}.db"
        )
    except UsageError as error:
        raise error if given else DefinitionError(str(file), [f"study.storage: {error}"]) from error
    artifacts = str(file.parent.resolve() / definition.study.artifacts)
    study = definition.study.model_dump() | {"name": name, "storage": url, "artifacts": artifacts}
    try:
        resolved = Study.model_validate(study)
    except ValidationError as error:
        problem = f"{next(_describe(error))} (from the file's name); set study.name in the file"
        raise DefinitionError(str(file), [f"study.{problem}"]) from error
    return definition.model_copy(update={"study": resolved})


def parse_definition(raw: Mapping[str, Any], source: str = "study") -> StudyDefinition:
    """The definition in the tables of a study file; raises `DefinitionError` with all mistakes."""
    try:
        definition = StudyDefinition.model_validate(raw)
        problems: list[str] = []
    except ValidationError as error:
        problems = list(_describe(error))
    problems += [f"{path}: {message}" for path, message in _check_space(raw)]
    if problems:
        raise DefinitionError(source, list(dict.fromkeys(problems)))
    return definition


def evolve(definition: StudyDefinition, section: str, **values: Any) -> StudyDefinition:
    """The definition with some values of a section replaced, checked again; raises `UsageError`."""
    table = getattr(definition, section)
    try:
        changed = type(table).model_validate(table.model_dump() | values)
    except ValidationError as error:
        raise UsageError("; ".join(_describe(error))) from error
    return definition.model_copy(update={section: changed})


def _find_study_file(name: str) -> Path:
    path = Path(name)
    if path.is_file():
        return path
    if path.name == name and not path.suffix:
        path = Path("studies") / f"{name}.toml"
        if path.is_file():
            return path
    known = sorted(file.stem for file in Path("studies").glob("*.toml"))
    hint = did_you_mean(path.stem, known) if known else "name a study file, such as studies/digits.toml"
    raise DefinitionError(name, [f"no such study file; {hint}"])


def _relative_to(folder: Path, url: str) -> str:
    parsed = parse_url(url)
    if parsed.get_backend_name() != "sqlite":
        return url
    database = str(folder.resolve() / (parsed.database or ""))
    return parsed.set(database=database).render_as_string(hide_password=False)


def _flatten(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping) and value and not (prefix.startswith("search.") and prefix.count(".") == 1):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _inline(table: Mapping[str, Any]) -> InlineTable:
    inline = tomlkit.inline_table()
    inline.update({key: _inline(value) if isinstance(value, Mapping) else value for key, value in table.items()})
    return inline


def _check_space(raw: Mapping[str, Any]) -> Iterator[Problem]:
    """The problems of search, fixed and try with each other, as far as each can be read by itself."""
    search: dict[str, Dimension] = {}
    for name, table in _table(raw, "search").items():
        with suppress(ValidationError):  # reported with the tables' own mistakes
            search[name] = TypeAdapter(AnyDimension).validate_python(table)
    unread = _table(raw, "search").keys() - search.keys()
    yield from check_values("search", {name: None for name in unread if name not in Hyperparameters.model_fields})
    for path, message in check_space(search, _table(raw, "fixed")):
        if path.rpartition(".")[-1] not in unread:
            yield path, message
    if unread:
        return
    first = raw.get("try", [])
    for i, values in enumerate(first if isinstance(first, list) else []):
        if isinstance(values, Mapping):
            yield from check_try(f"try.{i}", values, search, _table(raw, "fixed"))


def _table(raw: Mapping[str, Any], section: str) -> Mapping[str, Any]:
    table = raw.get(section)
    return table if isinstance(table, Mapping) else {}


def _describe(error: ValidationError) -> Iterator[str]:
    """Lines `path: what is wrong` for all entries of a pydantic error."""
    for entry in error.errors():
        location = tuple(part for i, part in enumerate(entry["loc"]) if not _is_tag(entry["loc"], i))
        if location[2:3] == ("choice",) and len(location) == 5:
            if location[-1] != "str":
                continue  # the union of scalars complains once for each of its types
            location, entry["msg"] = location[:-1], "must be a finite number, string or boolean"
        if location == ("study",) or location[:2] == ("study", "storage"):
            entry["input"] = type(entry["input"]).__name__  # there may be a password in it
        yield f"{'.'.join(map(str, location))}: {explain(dict(entry, loc=location), _names_at)}"


def _is_tag(location: tuple[Any, ...], index: int) -> bool:
    return location[0] == "search" and index == 2 and location[index] in ("int", "float", "choice")


def _names_at(location: tuple[Any, ...]) -> list[str]:
    if location[:1] == ("search",):
        return ["int", "float", "choice", "log", "step", "when"]
    model: Any = StudyDefinition
    for part in location:
        model = model.model_fields[part].annotation
    fields: dict[str, Any] = model.model_fields
    return [field.alias or name for name, field in fields.items()]
