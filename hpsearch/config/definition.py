"""The study file: read, validated with all its mistakes at once, resolved, fingerprinted."""

import hashlib
import json
import os
import tomllib
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomlkit
from pydantic import Field, ValidationError, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError
from tomlkit.items import InlineTable

from hpsearch.config.space import AnyDimension, Hyperparameters, SearchSpace, Table
from hpsearch.config.urls import is_url, parse_url, remove_secrets, show_url
from hpsearch.config.validation import check_tables, describe, did_you_mean
from hpsearch.errors import DefinitionError, UsageError

N_TRAINING_IMAGES = {"mnist": 60_000, "fashion-mnist": 60_000, "kmnist": 60_000, "digits": 1_437}


class Study(Table):
    """Its repr and its pickle do not have the passwords in the URL of the storage."""

    name: str = Field("", pattern=r"^[A-Za-z0-9][\w.-]*$", max_length=100, description="default: the file's stem")
    storage: str = Field("", description="SQLAlchemy URL; default: sqlite:///<name>.db beside the file")
    artifacts: str = Field("artifacts", description="folder or URL of what trials leave behind, in <artifacts>/<name>/")
    seed: int = Field(0, ge=0, lt=2**63)

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        for name, value in super().__repr_args__():
            yield name, show_url(value) if name == "storage" and value else value

    def __getstate__(self) -> dict[Any, Any]:
        state = super().__getstate__()
        values = state["__dict__"]
        if values["storage"]:
            state["__dict__"] = values | {"storage": remove_secrets(values["storage"])}
        return state


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


def load_definition(path: Path | str, *, storage: str | None = None, artifacts: str | None = None) -> StudyDefinition:
    """The definition in a study file, with its defaults, its storage and its artifacts resolved.

    `path` may be the bare name of a file in `studies/`. The storage is the argument, else HPSEARCH_STORAGE, else the
    file's, and so are the artifacts, with HPSEARCH_ARTIFACTS; relative paths in the file are relative to it, others to
    the current folder. Raises `DefinitionError` with one line for each mistake.
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
    place = artifacts or os.environ.get("HPSEARCH_ARTIFACTS")
    try:
        place = _resolve_artifacts(Path() if place else file.parent, place or definition.study.artifacts)
    except UsageError as error:
        raise DefinitionError(str(file), [f"study.artifacts: {error}"]) from None
    study = definition.study.model_dump() | {"name": name, "storage": url, "artifacts": place}
    try:
        resolved = Study.model_validate(study)
    except ValidationError as error:
        problem = f"{next(describe(error, StudyDefinition))} (from the file's name); set study.name in the file"
        raise DefinitionError(str(file), [f"study.{problem}"]) from error
    return definition.model_copy(update={"study": resolved})


def parse_definition(raw: Mapping[str, Any], source: str = "study") -> StudyDefinition:
    """The definition in the tables of a study file; raises `DefinitionError` with all mistakes."""
    try:
        definition = StudyDefinition.model_validate(raw)
        problems: list[str] = []
    except ValidationError as error:
        problems = list(describe(error, StudyDefinition))
    problems += [f"{path}: {message}" for path, message in check_tables(raw)]
    if problems:
        raise DefinitionError(source, list(dict.fromkeys(problems)))
    return definition


def evolve(definition: StudyDefinition, section: str, **values: Any) -> StudyDefinition:
    """The definition with some values of a section replaced, checked again; raises `UsageError`."""
    table = getattr(definition, section)
    try:
        changed = type(table).model_validate(table.model_dump() | values)
    except ValidationError as error:
        raise UsageError("; ".join(describe(error, StudyDefinition))) from error
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


def _resolve_artifacts(folder: Path, place: str) -> str:
    if not is_url(place):
        return str(folder.resolve() / place)
    scheme, _, rest = place.partition("://")
    if ":" in rest.rpartition("@")[0]:
        raise UsageError("a URL is printed, so it must not have a password; give it in the environment")
    if not rest.strip("/"):
        raise UsageError(f"{place} names no place")
    if scheme == "memory":
        raise UsageError("memory:// is of one process, and the others do not see it; use a folder or an object store")
    return place


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
