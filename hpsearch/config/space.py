"""The search table of a study file, what it suggests to an Optuna trial, and the hyperparameters drawn from it.

A hyperparameter has one home, a field of `Hyperparameters`, whose constraints check every value from anywhere.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Annotated, Any, Literal, Protocol, Self

from optuna.distributions import FloatDistribution
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator
from pydantic_core import PydanticCustomError

Scalar = bool | int | float | str
Problem = tuple[str, str]
Values = Mapping[str, Any]
PLANNED = {"optimizer": ("muon",)}


class Table(BaseModel):
    """A table of a study file: frozen, strict about types, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class Hyperparameters(Table):
    """What decides how a network is built and trained; every field can be searched or fixed."""

    depth: int = Field(2, ge=1, le=64, description="hidden layers of an MLP, blocks of a CNN")
    width: int = Field(128, ge=1, le=65_536, description="units of a hidden layer, channels of the first block")
    activation: Literal["relu", "gelu", "silu"] = "relu"
    dropout: float = Field(0.0, ge=0, lt=1)
    batch_norm: bool = True
    optimizer: Literal["adam", "adamw", "sgd", "rmsprop", "nadam"] = "adam"
    lr: float = Field(1e-3, gt=0, description="learning rate, the peak one of a schedule")
    weight_decay: float = Field(0.0, ge=0)
    momentum: float = Field(0.0, ge=0, lt=1, description="of sgd and rmsprop")
    batch_size: int = Field(128, ge=2, le=65_536, description="images; batch norm needs two")
    schedule: Literal["constant", "cosine", "onecycle"] = "constant"
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    augment: float = Field(0.0, ge=0, le=1, description="strength of random shift, rotation and scale")


class Suggests(Protocol):
    """Anything with Optuna's `suggest_*`: `Trial`, `FixedTrial` or `FrozenTrial`."""

    @property
    def number(self) -> int: ...

    @property
    def user_attrs(self) -> dict[str, Any]: ...

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int: ...

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float: ...

    def suggest_categorical(self, name: str, choices: Any) -> Any: ...


class Dimension(Table):
    """One searched hyperparameter; `when` names the values of others that make it part of a trial."""

    when: dict[str, list[Scalar]] = {}

    @property
    @abstractmethod
    def ends(self) -> list[Any]:
        """The values that must be valid for every value between them to be valid."""

    @abstractmethod
    def suggest(self, trial: Suggests, name: str) -> Scalar:
        """The value that the trial draws."""

    @abstractmethod
    def has(self, value: Any) -> bool:
        """Whether the dimension can take the value."""

    def is_active(self, values: Mapping[str, Any]) -> bool:
        return all(name in values and _is_among(values[name], allowed) for name, allowed in self.when.items())


class Range(Dimension):
    """All values between two ends, both included."""

    range: list[Any]
    log: bool = False
    step: Any

    @model_validator(mode="after")
    def _check_bounds(self) -> Self:
        low, high = self.range
        if low > high:
            raise PydanticCustomError("bounds", "low {low} > high {high}", {"low": low, "high": high})
        if self.log and low <= 0:
            raise PydanticCustomError("bounds", "a log range needs low > 0, but got low {low}", {"low": low})
        if self.log and "step" in self.model_fields_set:
            raise PydanticCustomError("bounds", "log and step exclude each other")
        rest = (high - low) % self.step if "step" in self.model_fields_set else 0
        if min(rest, self.step - rest if rest else 0) > 1e-9:
            context = {"low": low, "high": high, "step": self.step}
            raise PydanticCustomError("bounds", "step {step} does not divide the range from {low} to {high}", context)
        return self

    @property
    def ends(self) -> list[Any]:
        return self.range


class IntRange(Range):
    range: list[int] = Field(alias="int", min_length=2, max_length=2)
    step: int = Field(1, ge=1)

    def suggest(self, trial: Suggests, name: str) -> int:
        return trial.suggest_int(name, *self.range, log=self.log, step=self.step)

    def has(self, value: Any) -> bool:
        low, high = self.range
        is_int = isinstance(value, int) and not isinstance(value, bool)
        return is_int and low <= value <= high and (value - low) % self.step == 0


class FloatRange(Range):
    range: list[float] = Field(alias="float", min_length=2, max_length=2)
    step: float | None = Field(None, gt=0)

    def suggest(self, trial: Suggests, name: str) -> float:
        return trial.suggest_float(name, *self.range, log=self.log, step=self.step)

    def has(self, value: Any) -> bool:
        low, high = self.range
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and FloatDistribution(low, high, step=self.step)._contains(float(value))


class Choice(Dimension):
    choice: list[Scalar] = Field(min_length=1)

    @model_validator(mode="after")
    def _check_choices(self) -> Self:
        if len({(isinstance(value, bool), value) for value in self.choice}) < len(self.choice):
            raise PydanticCustomError("choices", "choices must differ, but got {choices}", {"choices": self.choice})
        return self

    @property
    def ends(self) -> list[Any]:
        return self.choice

    def suggest(self, trial: Suggests, name: str) -> Scalar:
        value: Scalar = trial.suggest_categorical(name, self.choice)
        return value

    def has(self, value: Any) -> bool:
        return _is_among(value, self.choice)


def _kind_of_dimension(value: Any) -> str | None:
    if isinstance(value, Dimension):
        return {IntRange: "int", FloatRange: "float", Choice: "choice"}.get(type(value))
    keys = [key for key in ("int", "float", "choice") if isinstance(value, Mapping) and key in value]
    return keys[0] if len(keys) == 1 else None


AnyDimension = Annotated[
    Annotated[IntRange, Tag("int")] | Annotated[FloatRange, Tag("float")] | Annotated[Choice, Tag("choice")],
    Discriminator(
        _kind_of_dimension,
        custom_error_type="dimension",
        custom_error_message="must be one of { int = [low, high] }, { float = [low, high] }, { choice = [...] }",
    ),
]


class SearchSpace:
    """The dimensions in the order in which they are suggested, each behind those that its `when` names."""

    def __init__(self, search: Mapping[str, Dimension], fixed: Mapping[str, Any]) -> None:
        self.fixed = dict(fixed)
        self.dimensions = {name: search[name] for name in _parents_first(search)}

    @property
    def is_conditional(self) -> bool:
        return any(dimension.when for dimension in self.dimensions.values())


def suggest(trial: Suggests, space: SearchSpace) -> Hyperparameters:
    """The hyperparameters of a trial: searched ones from the trial, the others fixed or at their defaults.

    A hyperparameter whose `when` does not hold is not suggested and keeps its default.
    """
    values = dict(space.fixed)
    for name, dimension in space.dimensions.items():
        if dimension.is_active(values):
            values[name] = dimension.suggest(trial, name)
    return Hyperparameters(**values)


def did_you_mean(name: object, valid: Iterable[str]) -> str:
    """A clause naming the closest valid name, if one is close, and all valid ones."""
    names = list(valid)
    close = get_close_matches(str(name), names, n=1)
    return (f"did you mean '{close[0]}'? " if close else "") + f"valid: {', '.join(names)}"


def explain(error: Any, valid: Callable[[tuple[Any, ...]], Iterable[str]]) -> str:
    """One sentence for an entry of pydantic's `errors()`, with its value; `valid` gives the names allowed at a path."""
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    if kind == "extra_forbidden":
        return f"unknown key; {did_you_mean(error['loc'][-1], valid(error['loc'][:-1]))}"
    if kind == "missing":
        return "is missing"
    if kind == "literal_error":
        names = context["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        planned = " is planned, but not built yet;" if value in PLANNED.get(error["loc"][-1], ()) else " is not valid;"
        return f"{value!r}{planned} {did_you_mean(value, names)}"
    if kind in ("bounds", "choices"):
        return str(error["msg"])
    if kind == "string_pattern_mismatch":
        return f"must match {context['pattern']}, but got {value!r}"
    if kind in ("dict_type", "model_type"):
        return f"must be a table, but got {value!r}"
    if kind in ("too_short", "too_long"):
        least, most = context.get("min_length"), context.get("max_length")
        return f"must have {f'at least {least}' if most is None else f'at most {most}'} entries, but got {value!r}"
    message = error["msg"].replace("Input should be ", "must be ").replace("Input should have ", "must have ")
    return f"{message}, but got {value!r}"


def check_values(path: str, values: Mapping[str, Any]) -> Iterator[Problem]:
    """The problems of values that should be hyperparameters, each with its path in the study file."""
    names = Hyperparameters.model_fields
    for name, value in values.items():
        if name not in names:
            yield f"{path}.{name}", f"unknown hyperparameter; {did_you_mean(name, names)}"
            continue
        try:
            Hyperparameters.model_validate({name: value})
        except ValidationError as error:
            yield f"{path}.{name}", explain(error.errors()[0], lambda _: names)


def check_space(search: Mapping[str, Dimension], fixed: Mapping[str, Any]) -> Iterator[Problem]:
    """The problems of a search table and the fixed values, and those between the two."""
    for name, dimension in search.items():
        problems = {problem: None for end in dimension.ends for problem in check_values("search", {name: end})}
        yield from problems
        for parent, allowed in dimension.when.items():
            yield from _check_condition(f"search.{name}.when.{parent}", parent, allowed, search, fixed)
    for name in sorted(search.keys() - set(_parents_first(search))):
        yield f"search.{name}.when", "depends on itself through other conditions"
    yield from check_values("fixed", fixed)
    for name in sorted(search.keys() & fixed.keys()):
        yield f"fixed.{name}", "is searched as well; remove it from [search] or from [fixed]"


def _check_condition(
    path: str, parent: str, allowed: list[Scalar], search: Mapping[str, Dimension], fixed: Mapping[str, Any]
) -> Iterator[Problem]:
    if parent not in search and parent not in fixed:
        yield path, f"is neither searched nor fixed; {did_you_mean(parent, [*search, *fixed])}"
        return
    if not allowed:
        yield path, "names no value"
    for value in allowed:
        if not (search[parent].has(value) if parent in search else _is_among(value, [fixed[parent]])):
            yield path, f"{parent} is never {value!r}"


def check_try(path: str, values: Values, search: Mapping[str, Dimension], fixed: Values) -> Iterator[Problem]:
    """The problems of a trial to try first: names that are not searched, values that cannot or would not be used."""
    known = {**fixed, **values}
    for name, value in values.items():
        if name not in search:
            yield f"{path}.{name}", f"is not searched; {did_you_mean(name, search)}"
            continue
        if problems := list(check_values(path, {name: value})):
            yield from problems
        elif not search[name].has(value):
            yield f"{path}.{name}", f"{value!r} is outside of what [search] gives: {search[name].ends}"
        for parent, allowed in search[name].when.items():
            if parent in known and not _is_among(known[parent], allowed):
                yield f"{path}.{name}", f"is not used where {parent} is {known[parent]!r}"


def _parents_first(search: Mapping[str, Dimension]) -> list[str]:
    ordered: list[str] = []
    for _ in search:  # one more name each time, if conditions do not go round in a circle
        for name, dimension in search.items():
            if name not in ordered and all(parent in ordered or parent not in search for parent in dimension.when):
                ordered.append(name)
                break
    return ordered


def _is_among(value: Any, allowed: Iterable[Any]) -> bool:
    return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in allowed)
