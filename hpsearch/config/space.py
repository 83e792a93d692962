"""The search space of a study file, and the hyperparameters that Optuna trials sample from it.

A hyperparameter is a field of a table, and the constraints of the field validate all of its values. Those of training
are here; a kind of network brings a table with its own.
"""

import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Protocol, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError


class Table(BaseModel):
    """A table of a study file: frozen, strictly typed, without unknown keys."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class TrainingHyperparameters(Table):
    """The hyperparameters of training. The table of a kind of network inherits them, so that it has all of a trial."""

    optimizer: Literal["adam", "adamw", "sgd", "rmsprop", "nadam"] = "adam"
    lr: float = Field(1e-3, gt=0, description="learning rate; the peak if a schedule is used")
    weight_decay: float = Field(0.0, ge=0)
    momentum: float = Field(0.0, ge=0, lt=1, description="for sgd and rmsprop")
    batch_size: int = Field(128, ge=2, le=65_536, description="images per batch; batch norm needs two")
    schedule: Literal["constant", "cosine", "onecycle"] = "constant"
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    ema: float = Field(0.0, ge=0, lt=1, description="decay per step of the averaged weights that are used; 0: none")
    augment: float = Field(0.0, ge=0, le=1, description="strength of random shift, rotation and scaling")
    shear: float = Field(0.0, ge=0, le=1, description="strength of random shear")
    flip: bool = Field(False, description="mirror half of the images left to right, at random")
    erase: float = Field(0.0, ge=0, le=1, description="strength of random erasing: a rectangle in each image")
    color_jitter: float = Field(0.0, ge=0, le=1, description="strength of random brightness, contrast and saturation")


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


def _check_scalar(value: Any) -> Any:
    if not isinstance(value, bool | int | float | str) or (isinstance(value, float) and not math.isfinite(value)):
        raise PydanticCustomError("scalar", "must be a finite number, string or boolean")
    return value


Scalar = Annotated[bool | int | float | str, BeforeValidator(_check_scalar)]


class Dimension(Table):
    """A searched hyperparameter, suggested only if the hyperparameters in `when` have one of the listed values.

    `values` are the choices, or the two ends of a range; if they are valid, so are all values in between. `prior` is
    the value that is likely to be good; None: the built-in one of the hyperparameter, if it has one; False: none.
    """

    when: dict[str, list[Scalar]] = {}
    prior: Scalar | None = Field(None, description="value that is likely to be good; false: no built-in one")
    values: list[Any]

    @abstractmethod
    def suggest(self, trial: Suggests, name: str) -> Scalar:
        """Return the value that the trial samples."""

    @abstractmethod
    def snap(self, value: Any) -> Scalar | None:
        """Return the value as the dimension has it, e.g. 0.3 as its third step; None if it has no such value."""

    def has(self, value: Any) -> bool:
        return self.snap(value) is not None

    @property
    def is_continuous(self) -> bool:
        return False


class Range(Dimension):
    """All values between two bounds, both inclusive."""

    log: bool = False
    step: Any

    @model_validator(mode="after")
    def _check_bounds(self) -> Self:
        low, high = self.values
        bounds = {"low": low, "high": high}
        if low > high:
            raise PydanticCustomError("bounds", "lower bound {low} is greater than upper bound {high}", bounds)
        if self.log and low <= 0:
            raise PydanticCustomError("bounds", "log = true needs a lower bound > 0, got {low}", bounds)
        if self.log and "step" in self.model_fields_set:
            raise PydanticCustomError("bounds", "log and step cannot be combined")
        if not self.has(high):
            message = "step {step} does not divide the range from {low} to {high}"
            raise PydanticCustomError("bounds", message, bounds | {"step": self.step})
        return self

    def place(self, value: float) -> float:
        """Return where a value is in the range, from 0 to 1, on a log scale with `log`.

        The ends of a continuous range are at 0 and 1. Each value of a step lies in the middle of its part of the range,
        and the only value of a range at 0.5.
        """
        if self.values[0] == self.values[1]:
            return 0.5
        low, high, position = (math.log(each) if self.log else each for each in (*self._ends, value))
        return (position - low) / (high - low)

    def at(self, place: float) -> Any:
        """Return the value at a place in the range, the one whose part it is: `at(place(value))` is the value."""
        if not 0 < place < 1:
            return self.values[place > 0]
        low, high = (math.log(each) if self.log else each for each in self._ends)
        value = low + place * (high - low)
        value = math.exp(value) if self.log else value
        low, high = self.values
        value = round((value - low) / self.step) * self.step + low if self.step else value
        return min(max(value, low), high)

    @property
    def _ends(self) -> tuple[float, float]:
        half = (self.step or 0) / 2
        return self.values[0] - half, self.values[1] + half

    def snap(self, value: Any) -> Any:
        low, high = self.values  # both int or both float
        if not isinstance(value, int | type(low)) or isinstance(value, bool) or not low <= value <= high:
            return None
        if not self.step:
            return type(low)(value)
        n_steps = (value - low) / self.step
        if abs(n_steps - round(n_steps)) >= 1e-8:  # as Optuna's FloatDistribution allows
            return None
        return min(round(n_steps) * self.step + low, high)  # the arithmetic of Optuna's samplers


class IntRange(Range):
    values: list[int] = Field(alias="int", min_length=2, max_length=2)
    step: int = Field(1, ge=1)

    def suggest(self, trial: Suggests, name: str) -> int:
        return trial.suggest_int(name, *self.values, log=self.log, step=self.step)


class FloatRange(Range):
    values: list[float] = Field(alias="float", min_length=2, max_length=2)
    step: float | None = Field(None, gt=0)

    @property
    def is_continuous(self) -> bool:
        return self.step is None and self.values[0] < self.values[1]

    def suggest(self, trial: Suggests, name: str) -> float:
        return trial.suggest_float(name, *self.values, log=self.log, step=self.step)


class Choice(Dimension):
    values: list[Scalar] = Field(alias="choice", min_length=1)

    @model_validator(mode="after")
    def _check_choices(self) -> Self:
        if len({(isinstance(value, bool), value) for value in self.values}) < len(self.values):
            raise PydanticCustomError("choices", "duplicate values in {choices}", {"choices": self.values})
        return self

    def suggest(self, trial: Suggests, name: str) -> Scalar:
        value: Scalar = trial.suggest_categorical(name, self.values)
        return value

    def snap(self, value: Any) -> Scalar | None:
        return next((choice for choice in self.values if is_among(value, [choice])), None)


_DIMENSIONS: dict[str, type[Dimension]] = {"int": IntRange, "float": FloatRange, "choice": Choice}


def _read_dimension(value: Any) -> Dimension:
    """Read the table of a dimension by the one key that says its kind, so that errors are about this kind only."""
    if isinstance(value, Dimension):
        return value
    keys = [key for key in _DIMENSIONS if isinstance(value, Mapping) and key in value]
    if len(keys) != 1:
        expected = "{ int = [low, high] }, { float = [low, high] } or { choice = [...] }"
        raise PydanticCustomError("dimension", f"expected a range or a choice: {expected}")
    return _DIMENSIONS[keys[0]].model_validate(value)


AnyDimension = Annotated[IntRange | FloatRange | Choice, BeforeValidator(_read_dimension)]


class SearchSpace:
    """The dimensions in the order of suggestion, each after those that its `when` names; circular ones are left out.

    `hyperparameters` is the table of all hyperparameters of a trial.
    """

    def __init__(
        self,
        search: Mapping[str, Dimension],
        fixed: Mapping[str, Any],
        hyperparameters: type[TrainingHyperparameters],
    ) -> None:
        self.fixed = dict(fixed)
        self.hyperparameters = hyperparameters
        self.dimensions: dict[str, Dimension] = {}
        for _ in search:  # each pass adds one name, unless conditions are circular
            for name, dimension in search.items():
                is_ready = all(parent in self.dimensions or parent not in search for parent in dimension.when)
                if name not in self.dimensions and is_ready:
                    self.dimensions[name] = dimension
                    break

    @property
    def is_conditional(self) -> bool:
        return any(dimension.when for dimension in self.dimensions.values())

    def is_active(self, name: str, values: Mapping[str, Any]) -> bool:
        """Return whether the `when` of a dimension holds for the values of the other hyperparameters."""
        conditions = self.dimensions[name].when.items()
        return all(parent in values and self.allows(parent, values[parent], allowed) for parent, allowed in conditions)

    def allows(self, name: str, value: Any, allowed: Iterable[Any]) -> bool:
        """Return whether a value of a hyperparameter is among the allowed ones; those of a step are equal if close."""
        return is_among(self.snap(name, value), [self.snap(name, other) for other in allowed])

    def snap(self, name: str, value: Any) -> Any:
        """Return a value of a hyperparameter as its dimension has it, or unchanged if none has it."""
        snapped = self.dimensions[name].snap(value) if name in self.dimensions else None
        return value if snapped is None else snapped

    def read(self, params: Mapping[str, Any]) -> TrainingHyperparameters:
        """Return the hyperparameters of a trial that ended with these parameters. Raises `KeyError` if one is missing.

        Unlike `suggest`, it ignores `when`, because older versions did not recognize 0.3 as the value of a step.
        """
        names = [name for name, dimension in self.dimensions.items() if name in params or not dimension.when]
        return self.hyperparameters(**{**self.fixed, **{name: params[name] for name in names}})


def suggest(trial: Suggests, space: SearchSpace) -> TrainingHyperparameters:
    """Sample the hyperparameters of a trial; those not searched are fixed or have their default.

    A hyperparameter whose `when` does not hold is not suggested and keeps its default.
    """
    values = dict(space.fixed)
    for name, dimension in space.dimensions.items():
        if space.is_active(name, values):
            values[name] = dimension.suggest(trial, name)
    return space.hyperparameters(**values)


def read_number(name: str, value: Any, hyperparameters: type[TrainingHyperparameters]) -> Any:
    """Return a valid value of a hyperparameter; a number as its field has it, so that 1 becomes 1.0 in a float."""
    read = getattr(hyperparameters.model_validate({name: value}), name)
    return read if isinstance(read, int | float) and read == value else value


def is_among(value: Any, allowed: Iterable[Any]) -> bool:
    """Return whether a value is among the allowed ones; unlike with `in`, `True` does not equal 1."""
    return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in allowed)
