"""Reads a study file, reports all of its errors at once, fills in the defaults, and fingerprints it."""

import hashlib
import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomlkit
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import PydanticCustomError, PydanticKnownError
from tomlkit.items import InlineTable

from hpsearch.config.files import EXAMPLES, find_study_file, list_study_files
from hpsearch.config.signature import SignatureError, read_signature
from hpsearch.config.space import AnyDimension, SearchSpace, Table, TrainingHyperparameters
from hpsearch.config.urls import expand_home, is_url, parse_url, remove_secrets, show_url
from hpsearch.config.validation import (
    check_first,
    check_fixed,
    describe,
    did_you_mean,
    find_unused,
    raise_problems,
    read_search,
)
from hpsearch.errors import DefinitionError, UsageError
from hpsearch.plugins import DATA_SETS, NETWORKS, OwnCode, find

FOLDER, CODE = "folder of the study file", "codes"  # keys of the context beside the tables


def _check_name(registry: Mapping[str, str], name: Any) -> Any:
    if name not in list(registry):
        raise PydanticKnownError("literal_error", {"expected": " or ".join(map(repr, registry))})
    return name


def _check_share(value: Any) -> Any:
    if isinstance(value, float) and not 0 < value < 1:
        raise PydanticCustomError("share", "must be a number of images, such as 500, or a share of them, such as 0.15")
    return value


DataName = Annotated[str, BeforeValidator(partial(_check_name, DATA_SETS))]


def _check_size(value: Any) -> Any:
    sides = [value, value] if isinstance(value, int) else value
    is_pair = isinstance(sides, list | tuple) and len(sides) == 2
    if not is_pair or not all(type(side) is int and 0 < side <= 4096 for side in sides):
        raise PydanticCustomError("size", "must be a number of pixels up to 4096, or height and width: 64 or [48, 64]")
    return value if isinstance(value, int) else tuple(value)


Size = Annotated[int | tuple[int, int], BeforeValidator(_check_size)]
Share = Annotated[int | float, BeforeValidator(_check_share), Field(gt=0)]
Metric = Literal["accuracy", "balanced_accuracy"]
MAX_SHIFT = 4  # pixels
_OWN = ("folder", "file", "load")  # keys of [data], of which one names the user's own images


class Study(Table):
    """The [study] table; its repr and its pickle leave out passwords in the database URL."""

    name: str = Field("", pattern=r"^[A-Za-z0-9][\w.-]*$", max_length=100, description="default: the file's stem")
    storage: str = Field("", description="SQLAlchemy URL; default: sqlite:///<name>.db beside the file")
    artifacts: str = Field("artifacts", description="folder or URL for checkpoints and tracebacks, by study name")
    seed: int = Field(0, ge=0, lt=2**63)
    metric: Metric = Field("accuracy", description="what is maximized; balanced: the mean of the classes' recalls")

    @property
    def metric_title(self) -> str:
        """What messages call the metric."""
        return self.metric.replace("_", " ")

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        for name, value in super().__repr_args__():
            yield name, show_url(value) if name == "storage" and value else value

    def __getstate__(self) -> dict[Any, Any]:
        state = super().__getstate__()
        if self.storage:
            state["__dict__"] = state["__dict__"] | {"storage": remove_secrets(self.storage)}
        return state


class Budget(Table):
    """Limits for the whole study, across all workers and machines."""

    trials: int = Field(60, ge=1, description="number of finished (completed or pruned) trials")
    epochs: int = Field(10, ge=1, description="epochs of a trial that is not pruned")
    minutes: float | None = Field(None, gt=0, description="search time limit, without pauses")
    target: float | None = Field(None, gt=0, le=1, description="stop once a trial reaches this value of study.metric")
    patience: int | None = Field(
        None, ge=1, description="stop after this many finished trials without a gain beyond chance"
    )
    failures: int = Field(5, ge=1, description="stop after this many failed trials")


class NamesCode(Table):
    """A table that may name a function of the user's. Its source, `code`, travels with the definition."""

    _code: OwnCode | None = PrivateAttr(None)

    @property
    def code(self) -> OwnCode | None:
        return self._code

    def _read_code(self, key: str, path: str, info: ValidationInfo) -> None:
        """Read the source from the folder of the study file, unless the context of the validation has it."""
        context = info.context or {}
        known = {code.path: code for code in context.get(CODE, ())}
        try:
            self._code = known.get(path) or OwnCode.read(path, context.get(FOLDER, ""))
        except UsageError as error:
            raise_problems([((key,), str(error))])


class Data(NamesCode):
    """A built-in data set (`name`), or own images: a `folder`, a `file` of arrays, or a function to `load` them."""

    name: DataName | None = Field(None, json_schema_extra={"enum": [*DATA_SETS]}, description='default: "mnist"')
    folder: str | None = Field(None, min_length=1, description="folder with a subfolder of images for each class")
    file: str | None = Field(None, min_length=1, description=".npz file with x_train, y_train, x_test, y_test")
    load: str | None = Field(None, min_length=1, description='function that loads images: "my_data.py:load"')
    size: Size | None = Field(None, description="pixels, or height and width, of a folder's images")
    color: Literal["rgb", "grey"] | None = Field(None, description="of a folder's images; default: as the files are")
    test: Share | None = Field(None, description="images, or share of them, in the test set; default: 0.15")
    validation: Share | None = Field(None, description="images held out for validation; default: one sixth")
    train: int | None = Field(None, ge=1, description="train on this many images only; default: all")
    split_seed: int = Field(0, ge=0, lt=2**32)
    skip_unreadable: bool | None = Field(None, description="go on without the image files that cannot be read")

    @property
    def title(self) -> str:
        """What messages call the data set."""
        return self.name or self.load or Path(self.folder or self.file or "").name

    @model_validator(mode="after")
    def _resolve(self, info: ValidationInfo) -> Self:
        given = [key for key in ("name", *_OWN) if getattr(self, key) is not None]
        if len(given) > 1:
            raise PydanticCustomError("bounds", "{given} cannot be combined", {"given": " and ".join(given)})
        folder_only = ("size", "color", "skip_unreadable")
        useless = [] if self.folder else [key for key in folder_only if getattr(self, key) is not None]
        if useless:
            raise PydanticCustomError("bounds", "{keys}: only for a folder", {"keys": ", ".join(useless)})
        if self.load:
            self._read_code("load", self.load, info)
        if not given:
            object.__setattr__(self, "name", "mnist")
        if self.name is None:
            return self
        if self.test is not None:
            raise PydanticCustomError("bounds", "test: {name} has a test set of its own", {"name": self.name})
        n_images = find(DATA_SETS, self.name).n_train
        if self.validation is None or isinstance(self.validation, float):
            share = self.validation or 1 / 6
            object.__setattr__(self, "validation", int(n_images * share + 1e-9))
        wanted = (self.validation or 0) + (self.train or 1)
        if wanted > n_images:
            message = "{name} has only {n} training images, but train + validation need {wanted}"
            raise PydanticCustomError("bounds", message, {"n": n_images, "name": self.name, "wanted": wanted})
        return self


class Network(NamesCode):
    """A built-in kind of network, or a function of the user's that builds one."""

    kind: str = Field(
        "mlp",
        json_schema_extra={"anyOf": [{"enum": [*NETWORKS]}, {"pattern": ".:."}]},
        description="or a function of your own: nets.py:build, package.module:build",
    )

    @model_validator(mode="after")
    def _find(self, info: ValidationInfo) -> Self:
        if self.kind in NETWORKS:
            return self
        if ":" not in self.kind and not self.kind.endswith(".py"):
            hint = f"{did_you_mean(self.kind, NETWORKS)}, or a function of your own such as nets.py:build"
            raise_problems([(("kind",), f"{self.kind!r} is not valid; {hint}")])
        self._read_code("kind", self.kind, info)
        try:
            _ = self.hyperparameters
        except SignatureError as error:
            raise_problems((("kind",), problem) for problem in error.problems)
        return self

    @property
    def hyperparameters(self) -> type[TrainingHyperparameters]:
        """The table of the hyperparameters of the network and its training."""
        found: type[TrainingHyperparameters]
        found = read_signature(self.code) if self.code else find(NETWORKS, self.kind).hyperparameters
        return found

    @property
    def title(self) -> str:
        """What reports call it."""
        return f"network of {self.kind}" if self.code else str(find(NETWORKS, self.kind).title)


class Sampler(Table):
    kind: Literal["tpe", "random", "gp", "cmaes"] = "tpe"
    startup: int = Field(6, ge=1, description="trials before the sampler learns, at random or from the priors")
    prior: bool = Field(True, description="tpe begins with values that are likely to be good")


class Pruner(Table):
    kind: Literal["asha", "hyperband", "median", "none"] = "asha"


class Recovery(Table):
    heartbeat: int = Field(10, ge=1, description="seconds between heartbeats")
    grace: int = Field(60, ge=2, description="seconds without a heartbeat until a worker counts as dead")
    retries: int = Field(2, ge=0, description="retries of a trial whose worker was killed")
    checkpoint: float = Field(5.0, ge=0, description="minimum seconds between two checkpoints of a training")
    keep: int = Field(3, ge=0, description="number of best finished trials whose checkpoints are kept")

    @model_validator(mode="after")
    def _check_grace(self) -> Self:
        if self.grace <= self.heartbeat:
            message = "grace ({grace} s) must be greater than heartbeat ({heartbeat} s)"
            raise PydanticCustomError("bounds", message, self.model_dump(include={"heartbeat", "grace"}))
        return self


class Retrain(Table):
    epochs: int | None = Field(None, ge=1, description="default: budget.epochs")
    seeds: int = Field(1, ge=1, le=100, description="number of networks to train, with different seeds")
    export: Literal["first", "ensemble"] = Field(
        "first", description="the first of these networks, or all of them: the mean of their probabilities"
    )
    shift: int = Field(
        0,
        ge=0,
        le=MAX_SHIFT,
        description="pixels by which the exported model shifts each image up, down, left and right, to average its "
        "probabilities; 0: it reads the image alone",
    )
    examples: bool = Field(True, description="the exported folder has files that show some of the images")

    @model_validator(mode="after")
    def _check_ensemble(self) -> Self:
        if self.export == "ensemble" and self.seeds == 1:
            raise PydanticCustomError("bounds", 'export = "ensemble" needs several networks, such as seeds = 5')
        return self

    @property
    def n_members(self) -> int:
        """Return how many networks the exported model has."""
        return self.seeds if self.export == "ensemble" else 1


def _add_hyperparameters(schema: dict[str, Any]) -> None:
    """Give the [fixed] table the JSON Schema of the hyperparameters of all kinds of network."""
    schemas = [find(NETWORKS, kind).hyperparameters.model_json_schema() for kind in NETWORKS]
    properties = {name: value for each in schemas for name, value in each["properties"].items()}
    schema.update(schemas[0], properties=properties, additionalProperties=True)  # those of a function of the user's


class StudyDefinition(Table):
    """A validated study file with all defaults filled in: search space, data, budget and settings."""

    study: Study = Study()
    budget: Budget = Budget()
    data: Data = Data()
    network: Network = Network()
    search: Annotated[dict[str, AnyDimension], BeforeValidator(read_search)] = Field(min_length=1)
    fixed: Annotated[dict[str, Any], AfterValidator(check_fixed)] = Field({}, json_schema_extra=_add_hyperparameters)
    first: Annotated[list[dict[str, Any]], AfterValidator(check_first)] = Field([], alias="try")
    sampler: Sampler = Sampler()
    pruner: Pruner = Pruner()
    recovery: Recovery = Recovery()
    retrain: Retrain = Retrain()

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        """Validate the tables of a study file, each against the others. Raises `ValidationError`."""
        return super().model_validate(obj, **{"context": obj, **options})

    def __getstate__(self) -> dict[Any, Any]:
        state = super().__getstate__()
        tables = {name: table for name, table in state["__dict__"].items() if name != "space"}
        return state | {"__dict__": tables}  # the table of a network of the user's is made again from its source

    @cached_property
    def space(self) -> SearchSpace:
        return SearchSpace(self.search, self.fixed, self.network.hyperparameters)

    @property
    def codes(self) -> list[OwnCode]:
        """The functions of the user's that load the images and build the network."""
        return [table.code for table in (self.data, self.network) if table.code]

    @property
    def identity(self) -> dict[str, Any]:
        """Return the settings that must not change for trials to be comparable, as `section.key` to value.

        Budget, sampler with its priors, pruner, recovery, retrain and the location may change; the epochs of a trial
        may not, because trial values depend on them.
        """
        tables = self.to_tables()
        for table in tables["search"].values():
            table.pop("prior", None)
        identity = {"try": tables["try"], "study.seed": self.study.seed, "budget.epochs": self.budget.epochs}
        if self.study.metric != "accuracy":  # older versions knew no other
            identity["study.metric"] = self.study.metric
        for section in ("data", "network", "search", "fixed"):
            values = {f"{section}.{key}": value for key, value in tables[section].items()}
            for key in {"data.folder", "data.file"} & values.keys():
                values[key] = "."  # wherever they are: `check_data` compares the images
            values.pop("data.skip_unreadable", None)
            identity |= values or {section: {}}
        if self.network.code:
            identity["network.source"] = self.network.code.sha256
        return identity

    @property
    def fingerprint(self) -> str:
        """Return the SHA-256 of `identity`."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    def to_tables(self) -> dict[str, Any]:
        """Return the resolved study as plain tables, with the database password hidden."""
        tables = self.model_dump(by_alias=True, exclude_none=True)
        if self.study.storage:
            tables["study"]["storage"] = show_url(self.study.storage)
        tables["fixed"] = self.space.hyperparameters(**self.fixed).model_dump(include=set(self.fixed))
        tables["search"] = {
            name: table.model_dump(by_alias=True, exclude_defaults=True) for name, table in self.search.items()
        }
        return tables

    def to_toml(self, notes: Mapping[str, str] = {}) -> str:
        """Return the resolved study as the text of a study file, with notes on searched hyperparameters as comments."""
        tables = self.to_tables()
        tables["search"] = {name: _inline(table) for name, table in tables["search"].items()}
        for name, note in notes.items():
            tables["search"][name].comment(note)
        return tomlkit.dumps({key: table for key, table in tables.items() if table})


def load_definition(path: Path | str, *, storage: str | None = None, artifacts: str | None = None) -> StudyDefinition:
    """Load a study file and resolve its defaults, its storage and its artifacts.

    `path` may be a bare name: see `find_study_file`. The arguments override HPSEARCH_STORAGE and HPSEARCH_ARTIFACTS,
    which override the file. Relative paths in the file are relative to the file, others and those in an example to the
    current folder. Raises `DefinitionError` with one line per problem.
    """
    file = find_study_file(str(path))
    if file is None:
        hint = did_you_mean(Path(path).stem, [*list_study_files() | EXAMPLES])
        raise DefinitionError(str(path), [f"study file not found; {hint}"])
    folder = Path() if file in EXAMPLES.values() else file.parent
    try:
        raw = tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DefinitionError(str(file), [f"cannot read the file: {error.strerror}"]) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DefinitionError(str(file), [f"not valid TOML: {error}"]) from error
    definition = parse_definition(raw, str(file), folder=file.parent)
    name = definition.study.name or file.stem
    given = storage or os.environ.get("HPSEARCH_STORAGE")
    url = given or definition.study.storage or f"sqlite:///{name}.db"
    try:
        url = _relative_to(Path() if given else folder, url)
    except UsageError as error:
        raise error if given else DefinitionError(str(file), [f"study.storage: {error}"]) from error
    location = artifacts or os.environ.get("HPSEARCH_ARTIFACTS")
    try:
        location = resolve_artifacts(Path() if location else folder, location or definition.study.artifacts)
    except UsageError as error:
        raise DefinitionError(str(file), [f"study.artifacts: {error}"]) from None
    paths = {key: value for key in ("folder", "file") if (value := getattr(definition.data, key))}
    if paths:
        resolved = {key: str(folder.resolve() / expand_home(path)) for key, path in paths.items()}
        definition = evolve(definition, "data", **resolved)
    try:
        return evolve(definition, "study", name=name, storage=url, artifacts=location)
    except UsageError as error:
        problem = str(error).removeprefix("name: ")
        problem = f"the file name cannot serve as study name: {problem}; set study.name in the file"
        raise DefinitionError(str(file), [problem]) from error


def parse_definition(
    raw: Mapping[str, Any], source: str = "study", *, folder: Path | str = "", codes: Sequence[OwnCode] = ()
) -> StudyDefinition:
    """Validate the tables of a study file. Raises `DefinitionError` with all problems.

    Files of the user's with code are in the `folder`, except for those that were read already, `codes`.
    """
    try:
        return StudyDefinition.model_validate(raw, context={**raw, FOLDER: folder, CODE: codes})
    except ValidationError as error:
        raise DefinitionError(source, list(describe(error, StudyDefinition))) from error


def check_new(definition: StudyDefinition, source: str = "study") -> None:
    """Raise `DefinitionError` if something in the definition of a new study would have no effect: see `find_unused`."""
    problems = find_unused(definition.space, definition.first)
    if lines := [f"{'.'.join(map(str, path))}: {text}" for path, text in problems]:
        raise DefinitionError(source, lines)


def read_identity(identity: Mapping[str, Any], codes: Sequence[OwnCode] = ()) -> dict[str, Any]:
    """Return the stored identity of a study as this version writes it. Raises `DefinitionError` if it is not valid.

    Only the SHA-256 of the source of a network of the user's is stored; `codes` are the sources today.
    """
    tables: dict[str, Any] = {}
    for key, value in identity.items():
        section, _, name = key.partition(".")
        tables |= {section: tables.get(section, {}) | {name: value}} if name else {section: value}
    source = tables.get("network", {}).pop("source", None)
    return parse_definition(tables, codes=codes).identity | ({"network.source": source} if source else {})


def evolve(definition: StudyDefinition, section: str, **values: Any) -> StudyDefinition:
    """Return the definition with some values of a section replaced. Raises `UsageError` if they are invalid."""
    table = getattr(definition, section)
    try:
        codes = [table.code] if isinstance(table, NamesCode) and table.code else []
        changed = type(table).model_validate(table.model_dump() | values, context={CODE: codes})
    except ValidationError as error:
        raise UsageError("; ".join(describe(error, type(table)))) from error
    return definition.model_copy(update={section: changed})


def _relative_to(folder: Path, url: str) -> str:
    parsed = parse_url(url)
    if parsed.get_backend_name() != "sqlite":
        return url
    database = str(folder.resolve() / (parsed.database or ""))
    return parsed.set(database=database).render_as_string(hide_password=False)


def resolve_artifacts(folder: Path, location: str) -> str:
    """Return the URL or full path of an artifact store; a path is relative to the folder. Raises `UsageError`."""
    scheme, separator, rest = location.partition("://")
    if separator and not rest.strip("/"):
        raise UsageError(f"{location}: bucket or path missing")
    local = re.sub(r"^(file|local)://", "", location)
    if not is_url(local):
        return str(folder.resolve() / expand_home(local))
    if ":" in rest.rpartition("@")[0]:
        raise UsageError("logs show this URL, so it must not contain a password; set credentials in the environment")
    if scheme == "memory":
        raise UsageError("memory:// is not shared between processes; use a folder or an object store")
    return location


def _inline(table: Mapping[str, Any]) -> InlineTable:
    inline = tomlkit.inline_table()
    inline.update({key: _inline(value) if isinstance(value, Mapping) else value for key, value in table.items()})
    return inline
