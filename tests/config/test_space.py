"""The search table becomes distributions, and a trial becomes hyperparameters."""

import math
from decimal import Decimal
from typing import Any

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.trial import FixedTrial
from pydantic import TypeAdapter

from hpsearch.config.space import AnyDimension, FloatRange, Range, suggest
from hpsearch.training.kinds import Hyperparameters

from ..conftest import make_definition


def space_of(search: dict[str, Any], **fixed: Any) -> Any:
    return make_definition(search=search, fixed=fixed).space


def test_a_trial_draws_what_is_searched_and_keeps_what_is_fixed() -> None:
    space = space_of({"width": {"int": [8, 32]}, "optimizer": {"choice": ["adam", "sgd"]}}, schedule="cosine")
    drawn: Any = suggest(FixedTrial({"width": 9, "optimizer": "sgd"}), space)
    assert (drawn.width, drawn.optimizer, drawn.schedule) == (9, "sgd", "cosine")
    assert drawn.label_smoothing == Hyperparameters().label_smoothing


def test_a_conditional_hyperparameter_is_drawn_only_where_its_condition_holds() -> None:
    space = space_of(
        {
            "momentum": {"float": [0.1, 0.9], "when": {"optimizer": ["sgd"]}},
            "optimizer": {"choice": ["adam", "sgd"]},
        }
    )
    assert list(space.dimensions) == ["optimizer", "momentum"]
    assert suggest(FixedTrial({"optimizer": "sgd", "momentum": 0.5}), space).momentum == 0.5
    assert suggest(FixedTrial({"optimizer": "adam"}), space).momentum == 0.0


def test_a_condition_may_name_a_fixed_value() -> None:
    space = space_of({"momentum": {"float": [0.1, 0.9], "when": {"optimizer": ["sgd"]}}}, optimizer="sgd")
    assert suggest(FixedTrial({"momentum": 0.5}), space).momentum == 0.5


@pytest.mark.parametrize("sampled", [0.1 + 2 * 0.1, 0.3, 0.3 - 1e-16])
def test_a_condition_on_a_value_of_a_step_holds_however_a_sampler_rounds_it(sampled: float) -> None:
    smoothing = {"float": [0.0, 0.2], "when": {"dropout": [0.3]}}
    space = space_of({"dropout": {"float": [0.1, 0.4], "step": 0.1}, "label_smoothing": smoothing})
    drawn: Any = suggest(FixedTrial({"dropout": sampled, "label_smoothing": 0.05}), space)
    assert (drawn.dropout, drawn.label_smoothing) == (sampled, 0.05)
    assert suggest(FixedTrial({"dropout": 0.2}), space).label_smoothing == 0.0


@given(
    seed=st.integers(0, 1000),
    low=st.decimals(0, "0.5", places=3),
    step=st.decimals("0.001", "0.2", places=3),
    n_steps=st.integers(1, 9),
)
def test_every_value_that_is_drawn_from_steps_is_a_value_that_one_can_write(
    seed: int, low: Decimal, step: Decimal, n_steps: int
) -> None:
    table = {"float": [float(low), float(low + n_steps * step)], "step": float(step)}
    dimension: Any = TypeAdapter(AnyDimension).validate_python(table)
    drawn = dimension.suggest(optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed)).ask(), "x")
    assert drawn in [dimension.snap(float(low + n * step)) for n in range(n_steps + 1)]
    assert dimension.snap(drawn) == drawn


def test_a_trial_of_an_older_version_keeps_the_hyperparameters_that_it_was_trained_with() -> None:
    smoothing = {"float": [0.1, 0.2], "when": {"dropout": [0.3]}}
    space = space_of({"dropout": {"float": [0.1, 0.4], "step": 0.1}, "label_smoothing": smoothing})
    assert space.read({"dropout": 0.1 + 2 * 0.1, "of another": 1}).label_smoothing == 0.0
    with pytest.raises(KeyError, match="dropout"):
        space.read({})


def test_a_stored_trial_gives_the_hyperparameters_that_it_was_run_with() -> None:
    space = space_of({"width": {"int": [8, 32]}, "lr": {"float": [1e-3, 1e-1], "log": True}})
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    trial = study.ask()
    drawn = suggest(trial, space)
    study.tell(trial, 0.5)
    assert suggest(study.trials[0], space) == space.read(study.trials[0].params) == drawn


@given(
    seed=st.integers(0, 1000),
    low=st.floats(1e-6, 0.1),
    ratio=st.floats(1.0, 1e3),
    log=st.booleans(),
)
def test_every_drawn_value_can_be_queued_again(seed: int, low: float, ratio: float, log: bool) -> None:
    space = space_of({"lr": {"float": [low, low * ratio], "log": log}})
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    assert space.dimensions["lr"].has(suggest(study.ask(), space).lr)


@pytest.mark.parametrize(
    ("table", "inside", "outside"),
    [
        ({"int": [2, 8], "step": 3}, [2, 5, 8], [3, 1, 9, 5.0, True, "5"]),
        ({"float": [0.1, 0.5]}, [0.1, 0.3], [0.0, 0.6, "0.3", None]),
        ({"choice": [1, 2]}, [1, 2], [3, True, "1"]),
    ],
)
def test_a_dimension_knows_its_values(table: dict[str, Any], inside: list[Any], outside: list[Any]) -> None:
    dimension: Any = TypeAdapter(AnyDimension).validate_python(table)
    assert all(dimension.has(value) for value in inside)
    assert not any(dimension.has(value) for value in outside)


@st.composite
def ranges(draw: Any) -> Range:
    """A range of any kind, perhaps of one value."""
    log, has_steps, is_int = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    low = draw(st.integers(1 if log else -50, 50)) if is_int else draw(st.floats(1e-6 if log else -10, 10))
    step = draw(st.integers(1, 9)) if is_int else draw(st.floats(1e-3, 5))
    extra = {"step": step} if has_steps and not log else {"log": log}
    length = draw(st.integers(0, 20)) * step if is_int or "step" in extra else draw(st.floats(0, 100))
    table = {"int" if is_int else "float": [low, low + length], **extra}
    dimension: Any = TypeAdapter(AnyDimension).validate_python(table)
    assert isinstance(dimension, Range)
    return dimension


@given(dimension=ranges(), place=st.floats(-0.5, 1.5))
def test_a_place_in_a_range_has_a_value_of_the_range_and_a_value_its_place(dimension: Range, place: float) -> None:
    low, high = dimension.values
    value = dimension.at(place)
    assert dimension.has(value)
    assert type(value) is type(low)
    assert 0 <= dimension.place(value) <= 1
    again = dimension.at(dimension.place(value))
    assert again == (pytest.approx(value, rel=1e-12, abs=1e-12) if dimension.is_continuous else value)
    assert (dimension.at(0.0), dimension.at(1.0)) == (low, high)
    if low == high:
        assert dimension.place(low) == 0.5
    elif isinstance(dimension, FloatRange) and dimension.step is None:
        assert (dimension.place(low), dimension.place(high)) == (0, 1)
    else:
        assert dimension.place(low) == pytest.approx(1 - dimension.place(high)) or dimension.log
    assert dimension.at(min(place + 0.1, 1.0)) >= value


def test_each_integer_has_a_part_of_the_same_length_or_logarithm() -> None:
    even: Any = TypeAdapter(AnyDimension).validate_python({"int": [1, 4]})
    assert [even.at((i + 0.5) / 8) for i in range(8)] == [1, 1, 2, 2, 3, 3, 4, 4]
    logarithmic: Any = TypeAdapter(AnyDimension).validate_python({"int": [1, 8], "log": True})
    drawn = [logarithmic.at((i + 0.5) / 1000) for i in range(1000)]
    assert drawn.count(1) / drawn.count(2) == pytest.approx(math.log(3) / math.log(5 / 3), rel=0.02)
    assert drawn.count(8) / drawn.count(2) == pytest.approx(math.log(17 / 15) / math.log(5 / 3), rel=0.02)
