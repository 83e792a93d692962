"""Finds the problems of a search space, and describes every problem of a study file in a sentence with its location.

pydantic calls the functions for [search], [fixed] and [[try]] while it validates a study file. Its context is the file
as it was written, so that each table is checked against the others even if those have problems of their own.
"""

from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from itertools import chain
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError, ValidationInfo
from pydantic_core import InitErrorDetails, PydanticCustomError

from hpsearch.config.signature import UnknownHyperparameters, list_required
from hpsearch.config.space import (
    AnyDimension,
    Choice,
    Dimension,
    IntRange,
    Range,
    SearchSpace,
    TrainingHyperparameters,
    is_among,
    read_number,
)
from hpsearch.plugins import NETWORKS, find

Values = Mapping[str, Any]
Problem = tuple[tuple[int | str, ...], str]  # the path in a table, and a sentence
_DIMENSION: TypeAdapter[Dimension] = TypeAdapter(AnyDimension)
_DIMENSION_KEYS = ("int", "float", "choice", "log", "step", "when", "prior")


def read_search(tables: Any, info: ValidationInfo) -> Any:
    """Return the dimensions of [search]. Equal numbers become the same: 1 is 1.0 in a float, 0.3 the value of its step.

    Raises `ValidationError` with all of its problems.
    """
    if not isinstance(tables, Mapping):
        return tables  # pydantic says what is wrong
    search, problems = _read_dimensions(tables)
    space = _space(search, info)
    for name in tables:
        if name in search or name not in space.hyperparameters.model_fields:
            for value in search[name].values if name in search else [None]:
                problems += check_values({name: value}, space.hyperparameters)
    problems += _check_required(tables, space)
    for name, dimension in search.items():
        if name not in space.dimensions:
            problems.append(((name, "when"), "circular `when` conditions"))
        for parent, allowed in dimension.when.items():
            if parent in search or parent not in tables:  # any other has problems of its own
                sentences = _check_condition(parent, allowed, search, space.fixed)
                problems += [((name, "when", parent), sentence) for sentence in sentences]
        if problem := _check_prior(dimension):
            problems.append(((name, "prior"), problem))
    raise_problems(problems)
    return _write_alike(search, space)


def _check_required(tables: Values, space: SearchSpace) -> Iterator[Problem]:
    for name in list_required(space.hyperparameters):
        if name in space.dimensions and space.dimensions[name].when:
            yield (name, "when"), f"every trial needs {name}, which has no default in the network's function"
        elif name not in tables and name not in space.fixed:
            yield (name,), "has no default in the network's function; search it here, or set it in [fixed]"


def _write_alike(search: dict[str, Dimension], space: SearchSpace) -> dict[str, Dimension]:
    def read(name: str, value: Any) -> Any:
        return read_number(name, value, space.hyperparameters)

    for name, dimension in search.items():
        if isinstance(dimension, Choice):
            search[name] = dimension.model_copy(update={"values": [read(name, value) for value in dimension.values]})
    for name, dimension in search.items():
        when = {
            parent: [search[parent].snap(value) if parent in search else read(parent, value) for value in allowed]
            for parent, allowed in dimension.when.items()
        }
        prior = search[name].snap(dimension.prior)  # None if `false` is not among the choices
        prior = dimension.prior if prior is None else prior
        search[name] = search[name].model_copy(update={"when": when, "prior": prior})
    return search


def _check_prior(dimension: Dimension) -> str | None:
    prior, values = dimension.prior, dimension.values
    if prior is None or prior is False or dimension.has(prior):
        return None
    if not isinstance(dimension, Range):
        return f"{prior!r} is not among the choices {values}"
    if isinstance(prior, bool) or not isinstance(prior, int | type(values[0])):
        kind = "an integer" if isinstance(dimension, IntRange) else "a number"
        return f"must be {kind}, or false for no prior, but got {prior!r}"
    is_inside = values[0] <= prior <= values[1]
    problem = f"not a multiple of step {dimension.step} from {values[0]}" if is_inside else f"outside {values}"
    return f"{prior!r} is {problem}"


def _read_dimensions(tables: Values) -> tuple[dict[str, Dimension], list[Problem]]:
    search: dict[str, Dimension] = {}
    problems: list[Problem] = []
    for name, table in tables.items():
        try:
            search[name] = _DIMENSION.validate_python(table)
        except ValidationError as error:
            problems += [((name, *entry["loc"]), _explain(entry, _DIMENSION_KEYS)) for entry in error.errors()]
    return search, problems


def _check_condition(parent: str, allowed: list[Any], search: Mapping[str, Dimension], fixed: Values) -> Iterator[str]:
    if parent not in search and parent not in fixed:
        yield f"'{parent}' is neither in [search] nor in [fixed]; {did_you_mean(parent, [*search, *fixed])}"
        return
    if not allowed:
        yield "lists no values"
    for value in allowed:
        if not (search[parent].has(value) if parent in search else is_among(value, [fixed[parent]])):
            yield f"{parent} can never be {value!r} in this search"


def check_fixed(values: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
    """Return the values of [fixed] if they have no problems, else raise `ValidationError`."""
    problems = check_values(values, _space({}, info).hyperparameters)
    twice = [name for name in values if name in _written(info, "search")]
    raise_problems([*problems, *(((name,), "is in both [search] and [fixed]; remove one") for name in twice)])
    return values


def check_first(first: list[dict[str, Any]], info: ValidationInfo) -> list[dict[str, Any]]:
    """Return the tables of [[try]], completed by `complete_try`. Raises `ValidationError` with all their problems."""
    tables = _written(info, "search")
    search, _ = _read_dimensions(tables)
    space, unread = _space(search, info), tables.keys() - search.keys()
    problems = [
        ((i, *path), text)
        for i, values in enumerate(first)
        for path, text in chain(_check_known(values, space), _check_effect(values, space))
    ]
    raise_problems(problem for problem in problems if problem[0][1] not in unread)
    if "search" not in info.data:  # it has problems of its own
        return first
    space = _space(info.data["search"], info)
    return [complete_try(values, space) for values in first]


def _space(search: Mapping[str, Dimension], info: ValidationInfo) -> SearchSpace:
    network = info.data.get("network")
    if network is None:  # it has problems of its own
        is_own = ":" in str(_written(info, "network").get("kind"))
        default: type[TrainingHyperparameters] = find(NETWORKS, next(iter(NETWORKS))).hyperparameters
        return SearchSpace(search, _written(info, "fixed"), UnknownHyperparameters if is_own else default)
    return SearchSpace(search, _written(info, "fixed"), network.hyperparameters)


def _written(info: ValidationInfo, section: str) -> Values:
    table = (info.context or {}).get(section)
    return table if isinstance(table, Mapping) else {}


def raise_problems(problems: Iterable[Problem]) -> None:
    """Raise a `ValidationError` of all problems, if there are any."""
    details = [
        InitErrorDetails(type=PydanticCustomError("problem", "{text}", {"text": text}), loc=path, input=None)
        for path, text in dict.fromkeys(problems)
    ]
    if details:
        raise ValidationError.from_exception_data("study", details)


def check_values(values: Values, hyperparameters: type[TrainingHyperparameters]) -> list[Problem]:
    """Return the problems of hyperparameter values: unknown names and invalid values."""
    try:
        hyperparameters.model_validate(values)
    except ValidationError as error:
        names = hyperparameters.model_fields
        return [(entry["loc"], _explain(entry, names, "hyperparameter")) for entry in error.errors()]
    return []


def check_try(values: Values, space: SearchSpace) -> Iterator[Problem]:
    """Yield the problems of a trial to try: unknown names, invalid values, and values without effect."""
    yield from _check_known(values, space)
    yield from _check_effect(complete_try(values, space), space)


def find_unused(space: SearchSpace, first: Iterable[Values]) -> Iterator[Problem]:
    """Yield the conditions that practically never hold, and the values of the completed `first` without effect.

    Older versions started studies with them, so they are problems of new studies only.
    """
    for name, dimension in space.dimensions.items():
        for parent, allowed in dimension.when.items():
            if parent in space.dimensions and space.dimensions[parent].is_continuous:
                possible = [values[parent] for values in first if parent in values]
                for value in allowed:
                    if value not in possible:
                        sentence = f"{parent} is practically never {value!r}: its range is continuous"
                        yield ("search", name, "when", parent), f"{sentence}; give it a step or choices"
    for i, values in enumerate(first):
        yield from ((("try", i, *path), text) for path, text in _check_effect(values, space))


def _check_known(values: Values, space: SearchSpace) -> Iterator[Problem]:
    for name, value in values.items():
        dimension = space.dimensions.get(name)
        if dimension is None:
            yield (name,), f"is not in [search]; {did_you_mean(name, space.dimensions)}"
            continue
        if problems := check_values({name: value}, space.hyperparameters):
            yield from problems
        elif not dimension.has(value):
            yield (name,), f"{value!r} is outside the search range {dimension.values}"


def _check_effect(values: Values, space: SearchSpace) -> Iterator[Problem]:
    known = {**space.fixed, **values}
    for name, dimension in space.dimensions.items():
        for parent, allowed in dimension.when.items():
            if name in values and parent in known and not space.allows(parent, known[parent], allowed):
                yield (name,), f"has no effect when {parent} = {known[parent]!r}"


def complete_try(values: Values, space: SearchSpace) -> dict[str, Any]:
    """Return the values of a trial to try first as their dimensions have them, with those that their `when` needs.

    Of a hyperparameter that is not given, it is the first value that the `when` of all others allow.
    """
    complete = {name: space.snap(name, value) for name, value in values.items() if name in space.dimensions}
    for name in reversed(space.dimensions):
        conditions = [
            space.dimensions[child].when.get(name) for child in reversed(space.dimensions) if child in complete
        ]
        if name not in complete and (needed := [allowed for allowed in conditions if allowed]):
            fitting = (value for value in needed[0] if all(space.allows(name, value, allowed) for allowed in needed))
            complete[name] = space.snap(name, next(fitting, needed[0][0]))
    return complete


def describe(error: ValidationError, model: type[BaseModel]) -> Iterator[str]:
    """Yield one line `path: problem` for each entry of a pydantic error of the model."""
    for entry in error.errors():
        path = entry["loc"]
        if path == ("study",) or path[:2] == ("study", "storage"):
            entry["input"] = type(entry["input"]).__name__  # it may contain a password
        names = _names_at(model, path[:-1]) if entry["type"] == "extra_forbidden" else []
        yield f"{'.'.join(map(str, path))}: {_explain(entry, names)}"


def _names_at(model: Any, path: tuple[Any, ...]) -> list[str]:
    for part in path:
        model = model.model_fields[part].annotation
    return [field.alias or name for name, field in model.model_fields.items()]


def did_you_mean(name: object, valid: Iterable[str]) -> str:
    """Return a hint with the closest valid name, if there is one, and all valid names."""
    names = list(valid)
    close = get_close_matches(str(name), names, n=1)
    return (f"did you mean '{close[0]}'? Valid" if close else "valid") + f" names: {', '.join(names)}"


def _explain(entry: Any, names: Iterable[str], what: str = "key") -> str:
    """Describe an entry of pydantic's `errors()` in one sentence; `names` are valid where it was found."""
    kind, value, field = entry["type"], entry["input"], (entry["loc"] or ("",))[-1]
    match kind:
        case "problem" | "bounds" | "choices":
            return str(entry["msg"])
        case "extra_forbidden":
            return f"unknown {what}; {did_you_mean(field, names)}"
        case "missing":
            return "required"
        case "literal_error":
            valid = entry["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", ")
            return f"{value!r} is not valid; {did_you_mean(value, valid)}"
        case "string_pattern_mismatch":
            return f"may contain only letters, digits, _ . - and must start with a letter or digit; got {value!r}"
        case "dict_type" | "model_type":
            return f"expected a table ([section]), got {value!r}"
        case "too_short" | "too_long":
            is_range = field in ("int", "float")
            return f"expected {'exactly two values [low, high]' if is_range else 'at least one entry'}, got {value!r}"
    message = entry["msg"].replace("Input should be ", "must be ").replace("Input should have ", "must have ")
    return f"{message}, but got {value!r}"
