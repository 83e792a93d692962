"""The search space of a study file, and the hyperparameters that Optuna trials sample from it.

Each hyperparameter is a field of `Hyperparameters`; the constraints of that field validate all of its values.
"""

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Protocol, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

Scalar = bool | int | float | str


class Table(BaseModel):
    """A table of a study file: frozen, strictly typed, without unknown keys."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class Hyperparameters(Table):
    """The hyperparameters of a network and its training; each can be searched or fixed."""

    depth: int = Field(2, ge=1, le=64, description="number of hidden layers (MLP) or blocks (CNN)")
    width: int = Field(128, ge=1, le=65_536, description="units per layer (MLP) or channels of the first block (CNN)")
    activation: Literal["relu", "gelu", "silu"] = "relu"
    dropout: float = Field(0.0, ge=0, lt=1)
    batch_norm: bool = True
    optimizer: Literal["adam", "adamw", "sgd", "rmsprop", "nadam"] = "adam"
    lr: float = Field(1e-3, gt=0, description="learning rate; the peak if a schedule is used")
    weight_decay: float = Field(0.0, ge=0)
    momentum: float = Field(0.0, ge=0, lt=1, description="for sgd and rmsprop")
    batch_size: int = Field(128, ge=2, le=65_536, description="images per batch; batch norm needs two")
    schedule: Literal["constant", "cosine", "onecycle"] = "constant"
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    augment: float = Field(0.0, ge=0, le=1, description="strength of random shift, rotation and scaling")


class Suggests(Protocol):
    """Anything with Optuna's `suggest_*` methods: `Trial`, `FixedTrial` or `FrozenTrial`."""

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
    """A searched hyperparameter, suggested only if the hyperparameters in `when` have one of the listed values."""

    when: dict[str, list[Scalar]] = {}

    @property
    @abstractmethod
    def ends(self) -> list[Any]:
        """Return the values to validate; if they are valid, so are all values in between."""

    @abstractmethod
    def suggest(self, trial: Suggests, name: str) -> Scalar:
        """Return the value that the trial samples."""

    @abstractmethod
    def has(self, value: Any) -> bool:
        """Return whether the dimension contains the value."""

    def is_active(self, values: Mapping[str, Any]) -> bool:
        return all(name in values and is_among(values[name], allowed) for name, allowed in self.when.items())


class Range(Dimension):
    """All values between two bounds, both inclusive."""

    range: list[Any]
    log: bool = False
    step: Any

    @model_validator(mode="after")
    def _check_bounds(self) -> Self:
        low, high = self.range
        bounds = {"low": low, "high": high}
        if low > high:
            raise PydanticCustomError("bounds", "lower bound {low} is greater than upper bound {high}", bounds)
        if self.log and low <= 0:
            raise PydanticCustomError("bounds", "log = true needs a lower bound > 0, got {low}", bounds)
        if self.log and "step" in self.model_fields_set:
            raise PydanticCustomError("bounds", "log and step cannot be combined")
        rest = (high - low) % self.step if "step" in self.model_fields_set else 0
        if min(rest, self.step - rest if rest else 0) > 1e-9:
            message = "step {step} does not divide the range from {low} to {high}"
            raise PydanticCustomError("bounds", message, bounds | {"step": self.step})
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
        if not is_number or not low <= value <= high:
            return False
        steps = (value - low) / self.step if self.step else 0.0
        return bool(abs(steps - round(steps)) < 1e-8)  # as Optuna's FloatDistribution allows


class Choice(Dimension):
    choice: list[Scalar] = Field(min_length=1)

    @model_validator(mode="after")
    def _check_choices(self) -> Self:
        if len({(isinstance(value, bool), value) for value in self.choice}) < len(self.choice):
            raise PydanticCustomError("choices", "duplicate values in {choices}", {"choices": self.choice})
        return self

    @property
    def ends(self) -> list[Any]:
        return self.choice

    def suggest(self, trial: Suggests, name: str) -> Scalar:
        value: Scalar = trial.suggest_categorical(name, self.choice)
        return value

    def has(self, value: Any) -> bool:
        return is_among(value, self.choice)


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
        custom_error_message="expected a range or a choice: { int = [low, high] }, { float = [low, high] } or "
        "{ choice = [...] }",
    ),
]


class SearchSpace:
    """The dimensions in the order of suggestion, each after those that its `when` names."""

    def __init__(self, search: Mapping[str, Dimension], fixed: Mapping[str, Any]) -> None:
        self.fixed = dict(fixed)
        self.dimensions = {name: search[name] for name in parents_first(search)}

    @property
    def is_conditional(self) -> bool:
        return any(dimension.when for dimension in self.dimensions.values())


def suggest(trial: Suggests, space: SearchSpace) -> Hyperparameters:
    """Sample the hyperparameters of a trial; those not searched are fixed or have their default.

    A hyperparameter whose `when` does not hold is not suggested and keeps its default.
    """
    values = dict(space.fixed)
    for name, dimension in space.dimensions.items():
        if dimension.is_active(values):
            values[name] = dimension.suggest(trial, name)
    return Hyperparameters(**values)


def parents_first(search: Mapping[str, Dimension]) -> list[str]:
    """Return the names of the dimensions, each after those that its `when` names; circular ones are left out."""
    ordered: list[str] = []
    for _ in search:  # each pass adds one name, unless conditions are circular
        for name, dimension in search.items():
            if name not in ordered and all(parent in ordered or parent not in search for parent in dimension.when):
                ordered.append(name)
                break
    return ordered


def is_among(value: Any, allowed: Iterable[Any]) -> bool:
    """Return whether a value is among the allowed ones; unlike with `in`, `True` does not equal 1."""
    return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in allowed)
