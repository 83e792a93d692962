"""What a study file names: data sets, kinds of network, and functions of the user's.

A name stands for the Python path of an object. Checking a study file imports it, so its module imports torch only in
functions that need it. A function of the user's (`OwnCode`) is only read then; it runs where it is needed.
"""

import ast
import hashlib
import importlib.abc
import importlib.util
import linecache
import os
import sys
import threading
import tokenize
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, Self, cast

from hpsearch.errors import OwnCodeError, UsageError

DATA_SETS = {
    "mnist": "hpsearch.data.sets:MNIST",
    "fashion-mnist": "hpsearch.data.sets:FASHION_MNIST",
    "kmnist": "hpsearch.data.sets:KMNIST",
    "digits": "hpsearch.data.sets:DIGITS",
}
NETWORKS = {"mlp": "hpsearch.training.kinds:MLP", "cnn": "hpsearch.training.kinds:CNN"}
_loading = threading.RLock()  # the threads of Optuna's `n_jobs` share the modules


def find(registry: Mapping[str, str], name: str) -> Any:
    """Import the `DataSet` that a name in `DATA_SETS` stands for, or the `NetworkKind` that one in `NETWORKS` does."""
    module, _, attribute = registry[name].partition(":")
    return getattr(import_module(module), attribute)


@dataclass(frozen=True)
class OwnCode:
    """A function of the user's, and the source of its file, read without running it.

    `path` is what the study file says: "nets.py:build", a file beside the study file, or "package.module:build", which
    must be installed wherever a worker runs. The source of a file beside the study file travels with the study, so that
    workers in other processes and on other machines need no file.
    """

    path: str
    file: str = field(compare=False)  # absolute
    source: str = field(repr=False)

    @classmethod
    def read(cls, path: str, folder: Path | str = "") -> Self:
        """Read the source that a path names; `folder` is that of the study file. Raises `UsageError`."""
        place, _, function = path.rpartition(":")
        if not place or not function.isidentifier():
            raise UsageError(f"{path!r} names no function; write nets.py:build or package.module:build")
        file = _find_file(place, Path(folder))
        try:
            with tokenize.open(file) as stream:
                source = stream.read()
        except OSError as error:
            raise UsageError(f"cannot read {file}: {error.strerror}") from error
        except (SyntaxError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read {file}: {error}") from error
        code = cls(path, str(file), source)
        code.find_function()
        return code

    @property
    def name(self) -> str:
        """The name of the file, for messages."""
        return Path(self.file).name

    @property
    def function(self) -> str:
        return self.path.rpartition(":")[2]

    @property
    def is_file(self) -> bool:
        """Whether the path names a file beside the study file, and not an installed module."""
        return _names_file(self.path.rpartition(":")[0])

    @property
    def sha256(self) -> str:
        """The SHA-256 of the source, whatever its line ends and encoding."""
        return hashlib.sha256(self.source.encode()).hexdigest()

    def find_function(self) -> ast.FunctionDef:
        """Return the definition of the function in the source. Raises `UsageError` if there is none."""
        try:
            tree = ast.parse(self.source)
        except (SyntaxError, ValueError, RecursionError) as error:
            line = f":{error.lineno}" if isinstance(error, SyntaxError) else ""
            raise UsageError(f"{self.name}{line}: {getattr(error, 'msg', error)}") from error
        functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
        if self.function not in functions:
            close = get_close_matches(self.function, functions, n=1)
            hint = f"did you mean '{close[0]}'? Its" if close else "its"
            names = ", ".join(functions) or "none"
            raise UsageError(f"{self.name} has no function '{self.function}'; {hint} top-level functions: {names}")
        return functions[self.function]

    def load(self) -> Callable[..., Any]:
        """Run the file, once in a process, and return the function. Raises `OwnCodeError`."""
        with _loading:
            module = self._load_file() if self.is_file else self._load_module()
        function = getattr(module, self.function, None)
        if not callable(function):
            raise OwnCodeError(f"{self.path}: '{self.function}' is no function after {self.name} has run")
        return cast(Callable[..., Any], function)

    def _load_file(self) -> ModuleType:
        name = f"{Path(self.file).stem}_{hashlib.sha256((self.file + self.source).encode()).hexdigest()[:12]}"
        if name in sys.modules:
            return sys.modules[name]
        spec = importlib.util.spec_from_loader(name, _SourceLoader(self), origin=self.file)
        module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]  # there is a loader, so no None
        module.__file__ = self.file
        # Tracebacks and `inspect` then show this source even if the file has changed or is not on this machine.
        linecache.cache[self.file] = (len(self.source), None, self.source.splitlines(keepends=True), self.file)
        sys.modules[name] = module
        try:
            cast(_SourceLoader, module.__loader__).exec_module(module)
        except BaseException as error:
            del sys.modules[name]
            if not isinstance(error, Exception):
                raise
            raise OwnCodeError(self._explain_import(error)) from error
        return module

    def _load_module(self) -> ModuleType:
        try:
            module = import_module(self.path.rpartition(":")[0])
        except Exception as error:
            raise OwnCodeError(self._explain_import(error)) from error
        if OwnCode.read(self.path).sha256 != self.sha256:
            raise OwnCodeError(f"{module.__file__} is not the {self.name} that the study was started with")
        return module

    def _explain_import(self, error: Exception) -> str:
        sibling = (getattr(error, "name", None) or "").partition(".")[0]
        beside = Path(self.file).parent / sibling
        is_relative = isinstance(error, ImportError) and "relative import" in str(error)
        if self.is_file and (is_relative or (sibling and (beside.is_dir() or beside.with_suffix(".py").is_file()))):
            return (
                f"{self.locate(error)}; of the files beside the study file, only {self.name} goes to the workers. "
                "Put all code in it, or install a package and name package.module:" + self.function
            )
        advice = "; install it wherever workers run" if isinstance(error, ModuleNotFoundError) else ""
        return self.locate(error) + advice

    def find_line(self, error: BaseException) -> int | None:
        """Return the last line of the file that an error passed, or None if it came from elsewhere."""
        if isinstance(error, SyntaxError) and error.filename == self.file:
            return error.lineno
        lines = [
            line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == self.file
        ]
        return lines[-1] if lines else None

    def locate(self, error: BaseException) -> str:
        """Return an error with the last line of the file that it passed: "nets.py:12: ValueError: ..."."""
        line, message = self.find_line(error), " ".join(str(error).split())
        place = f"{self.name}:{line}" if line else self.path
        return f"{place}: {type(error).__name__}{f': {message}' if message else ''}"


class _SourceLoader(importlib.abc.ExecutionLoader):
    """Runs the source that an `OwnCode` carries, and gives it to `inspect`."""

    def __init__(self, code: OwnCode) -> None:
        self.code = code

    def get_filename(self, fullname: str) -> str:
        return self.code.file

    def get_source(self, fullname: str) -> str:
        return self.code.source


def _names_file(place: str) -> bool:
    return place.endswith(".py") or "/" in place or "\\" in place


def _find_file(place: str, folder: Path) -> Path:
    """Return the file of a module, or the file at a path that is relative to the folder. Raises `UsageError`."""
    if _names_file(place):
        file = folder.resolve() / os.path.expanduser(place)  # noqa: PTH111 - the other raises if there is no such home
        if not file.is_file():
            names = sorted(path.name for path in file.parent.glob("*.py"))
            close = get_close_matches(file.name, names, n=1)
            hint = f"did you mean '{close[0]}'? A" if close else "a"
            copy = f"started study has a copy in its artifacts: source/{file.name}"
            raise UsageError(f"{file} not found; {hint} {copy}")
        return file
    spec = _find_spec(place)
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        beside = f"{place.replace('.', '/')}.py"
        hint = (
            f"for {beside} beside the study file, write {beside}:..." if (folder / beside).is_file() else "install it"
        )
        raise UsageError(f"no module '{place}' with Python source is installed; {hint}")
    return Path(spec.origin)


def _find_spec(module: str) -> ModuleSpec | None:
    """Return where a module is. Unlike `importlib.util.find_spec`, this imports none of its packages."""
    package, _, _ = module.rpartition(".")
    parent = _find_spec(package) if package else None
    if package and (parent is None or parent.submodule_search_locations is None):
        return None
    places = parent.submodule_search_locations if parent else None
    found = (finder.find_spec(module, places) for finder in sys.meta_path)
    return next(filter(None, found), None)
