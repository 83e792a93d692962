"""The hyperparameters of a network of the user's: the keyword arguments of its function, read from the source."""

import ast
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError, create_model

from hpsearch.config.space import Table, TrainingHyperparameters
from hpsearch.plugins import OwnCode

_TYPES: dict[str, Any] = {"int": int, "float": float, "str": str, "bool": bool}
_ALLOWED = "int, float, str, bool or Literal[...] of such values"


class OwnHyperparameters(TrainingHyperparameters):
    """The hyperparameters of a network of the user's and of its training."""

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of the function that builds the network."""
        return self.model_dump(exclude={*TrainingHyperparameters.model_fields})


class UnknownHyperparameters(TrainingHyperparameters, extra="allow"):
    """Any hyperparameters: those of a function with problems are unknown, and then none is a mistake."""


class SignatureError(Exception):
    """A function cannot build a network; `problems` holds a sentence for each reason."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("; ".join(problems))


@cache
def read_signature(code: OwnCode) -> type[OwnHyperparameters]:
    """Return the table of hyperparameters of `build(image_shape, n_classes, *, depth: int, width: int = 64, ...)`.

    Types and defaults are those of the keyword arguments. Raises `SignatureError` with all problems.
    """
    function = code.find_function()
    problems = list(_check_positional(function))
    fields: dict[str, Any] = {}
    for argument, default in zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True):
        try:
            fields[argument.arg] = _read_argument(argument, default)
        except ValueError as error:
            problems.append(f"{code.name}:{argument.lineno}: {argument.arg} {error}")
    if problems:
        raise SignatureError(problems)
    return create_model("OwnHyperparameters", __base__=OwnHyperparameters, __module__=__name__, **fields)


def list_required(hyperparameters: type[TrainingHyperparameters]) -> list[str]:
    """Return the names of the hyperparameters that have no default."""
    return [name for name, each in hyperparameters.model_fields.items() if each.default is None]


def _check_positional(function: ast.FunctionDef) -> Iterator[str]:
    arguments = function.args
    positional = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    if len(positional) < 2:
        yield f"{function.name} must take image_shape and n_classes, and the hyperparameters after *"
    if len(positional) > 2:
        extra = ", ".join(positional[2:])
        yield f"{function.name} must take {extra} by name: {function.name}(image_shape, n_classes, *, {extra})"
    for star, argument in (("*", arguments.vararg), ("**", arguments.kwarg)):
        if argument:
            yield f"{function.name} takes {star}{argument.arg}; name each hyperparameter instead"


def _read_argument(argument: ast.arg, default: ast.expr | None) -> tuple[Any, Any]:
    """Return the type and the default of a keyword argument as a field of pydantic. Raises `ValueError`."""
    if argument.arg in TrainingHyperparameters.model_fields:
        raise ValueError("is a hyperparameter of training already; give it another name")
    if argument.arg.startswith(("_", "model_")) or hasattr(OwnHyperparameters, argument.arg):
        raise ValueError("cannot be the name of a hyperparameter; give it another one")
    value = None if default is None else _read_default(default)
    if argument.annotation:
        kind = _read_type(argument.annotation)
    elif default is None:
        raise ValueError(f"has neither a type nor a default; its type must be {_ALLOWED}")
    elif type(value) in _TYPES.values():
        kind = type(value)
    else:
        raise ValueError(f"has the default {value!r}, but needs one that is {_ALLOWED}")
    if default is None:
        return kind, None  # never used: a study file must search or fix it
    try:
        return kind, TypeAdapter(kind, config=Table.model_config).validate_python(value)
    except ValidationError as error:
        wanted = ast.unparse(argument.annotation or default)
        raise ValueError(f"has the default {value!r}, which is no {wanted}") from error


def _read_default(default: ast.expr) -> Any:
    try:
        return ast.literal_eval(default)
    except ValueError as error:
        raise ValueError(f"has the default {ast.unparse(default)}, which must be a plain value such as 64") from error


def _read_type(annotation: ast.expr) -> Any:
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):  # a quoted one
        with suppress(SyntaxError):
            annotation = ast.parse(annotation.value, mode="eval").body
    text = ast.unparse(annotation)
    if text in _TYPES:
        return _TYPES[text]
    if isinstance(annotation, ast.Subscript) and text.partition("[")[0] in ("Literal", "typing.Literal"):
        values = _read_default(annotation.slice)
        values = values if isinstance(values, tuple) else (values,)
        if all(type(value) in _TYPES.values() for value in values):
            return Literal[values]
    raise ValueError(f"has the type {text}; it must be {_ALLOWED}")
