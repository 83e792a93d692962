"""Finds the errors in a study file, and describes each with its location."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from difflib import get_close_matches
from functools import partial
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from hpsearch.config.space import AnyDimension, Dimension, Hyperparameters, Scalar, is_among, parents_first

Problem = tuple[str, str]
Values = Mapping[str, Any]
PLANNED = {"optimizer": ("muon",)}


def check_tables(raw: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield the problems of the search, fixed and try tables, as far as each can be parsed."""
    search: dict[str, Dimension] = {}
    for name, table in _table(raw, "search").items():
        with suppress(ValidationError):  # `describe` reports it
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


def describe(error: ValidationError, model: type[BaseModel]) -> Iterator[str]:
    """Yield one line `path: problem` for each entry of a pydantic error of the model."""
    for entry in error.errors():
        location = tuple(part for i, part in enumerate(entry["loc"]) if not _is_tag(entry["loc"], i))
        if location[2:3] == ("choice",) and len(location) == 5:
            if location[-1] != "str":
                continue  # the union of scalars has one entry for each of its types
            location, entry["msg"] = location[:-1], "must be a finite number, string or boolean"
        if location == ("study",) or location[:2] == ("study", "storage"):
            entry["input"] = type(entry["input"]).__name__  # it may contain a password
        yield f"{'.'.join(map(str, location))}: {explain(dict(entry, loc=location), partial(_names_at, model))}"


def _is_tag(location: tuple[Any, ...], index: int) -> bool:
    return location[0] == "search" and index == 2 and location[index] in ("int", "float", "choice")


def _names_at(root: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    if location[:1] == ("search",):
        return ["int", "float", "choice", "log", "step", "when"]
    model: Any = root
    for part in location:
        model = model.model_fields[part].annotation
    fields: dict[str, Any] = model.model_fields
    return [field.alias or name for name, field in fields.items()]


def did_you_mean(name: object, valid: Iterable[str]) -> str:
    """Return a hint with the closest valid name, if there is one, and all valid names."""
    names = list(valid)
    close = get_close_matches(str(name), names, n=1)
    return (f"did you mean '{close[0]}'? Valid" if close else "valid") + f" names: {', '.join(names)}"


def explain(error: Any, valid: Callable[[tuple[Any, ...]], Iterable[str]]) -> str:
    """Describe an entry of pydantic's `errors()` in one sentence; `valid` returns the names allowed at a path."""
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    if kind == "extra_forbidden":
        return f"unknown key; {did_you_mean(error['loc'][-1], valid(error['loc'][:-1]))}"
    if kind == "missing":
        return "required"
    if kind == "literal_error":
        names = context["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        state = "not supported yet" if value in PLANNED.get(error["loc"][-1], ()) else "not valid"
        return f"{value!r} is {state}; {did_you_mean(value, names)}"
    if kind in ("bounds", "choices"):
        return str(error["msg"])
    if kind == "string_pattern_mismatch":
        return f"may contain only letters, digits, _ . - and must start with a letter or digit; got {value!r}"
    if kind in ("dict_type", "model_type"):
        return f"expected a table ([section]), got {value!r}"
    if kind in ("too_short", "too_long"):
        is_range = error["loc"][-1] in ("int", "float")
        return f"expected {'exactly two values [low, high]' if is_range else 'at least one entry'}, got {value!r}"
    message = error["msg"].replace("Input should be ", "must be ").replace("Input should have ", "must have ")
    return f"{message}, but got {value!r}"


def check_values(path: str, values: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield the problems of hyperparameter values, each with its path in the study file."""
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
    """Yield the problems of a search table, of the fixed values, and of their combination."""
    for name, dimension in search.items():
        problems = {problem: None for end in dimension.ends for problem in check_values("search", {name: end})}
        yield from problems
        for parent, allowed in dimension.when.items():
            yield from _check_condition(f"search.{name}.when.{parent}", parent, allowed, search, fixed)
    for name in sorted(search.keys() - set(parents_first(search))):
        yield f"search.{name}.when", "circular `when` conditions"
    yield from check_values("fixed", fixed)
    for name in sorted(search.keys() & fixed.keys()):
        yield f"fixed.{name}", "is in both [search] and [fixed]; remove one"


def _check_condition(
    path: str, parent: str, allowed: list[Scalar], search: Mapping[str, Dimension], fixed: Mapping[str, Any]
) -> Iterator[Problem]:
    if parent not in search and parent not in fixed:
        yield path, f"'{parent}' is neither in [search] nor in [fixed]; {did_you_mean(parent, [*search, *fixed])}"
        return
    if not allowed:
        yield path, "lists no values"
    for value in allowed:
        if not (search[parent].has(value) if parent in search else is_among(value, [fixed[parent]])):
            yield path, f"{parent} can never be {value!r} in this search"


def check_try(path: str, values: Values, search: Mapping[str, Dimension], fixed: Values) -> Iterator[Problem]:
    """Yield the problems of a trial to try first: unknown names, invalid values, and values without effect."""
    known = {**fixed, **values}
    for name, value in values.items():
        if name not in search:
            yield f"{path}.{name}", f"is not in [search]; {did_you_mean(name, search)}"
            continue
        if problems := list(check_values(path, {name: value})):
            yield from problems
        elif not search[name].has(value):
            yield f"{path}.{name}", f"{value!r} is outside the search range {search[name].ends}"
        for parent, allowed in search[name].when.items():
            if parent in known and not is_among(known[parent], allowed):
                yield f"{path}.{name}", f"has no effect when {parent} = {known[parent]!r}"
