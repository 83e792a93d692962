"""The mistakes in a study file, each with its place."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from hpsearch.config.space import (
    AnyDimension,
    Dimension,
    Hyperparameters,
    Problem,
    check_space,
    check_try,
    check_values,
    explain,
)


def check_tables(raw: Mapping[str, Any]) -> Iterator[Problem]:
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


def describe(error: ValidationError, model: type[BaseModel]) -> Iterator[str]:
    """Lines `path: what is wrong` for all entries of a pydantic error of the model."""
    for entry in error.errors():
        location = tuple(part for i, part in enumerate(entry["loc"]) if not _is_tag(entry["loc"], i))
        if location[2:3] == ("choice",) and len(location) == 5:
            if location[-1] != "str":
                continue  # the union of scalars complains once for each of its types
            location, entry["msg"] = location[:-1], "must be a finite number, string or boolean"
        if location == ("study",) or location[:2] == ("study", "storage"):
            entry["input"] = type(entry["input"]).__name__  # there may be a password in it
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
