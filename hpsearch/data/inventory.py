"""The list of the user's own images that a study is about, and what differs between two such lists."""

import hashlib
import json
import unicodedata
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import NamedTuple, Self

from hpsearch.errors import DataError

N_DIGITS = 16  # hex digits of a digest
_N_NAMED = 3
_UNSHOWN = {"Cc", "Cs", "Zl", "Zp"}  # control characters, bytes that are not UTF-8, line ends


@dataclass(frozen=True)
class Inventory:
    """Images, in the order of the tensors: name, digest, label and side of each, and the names of the classes.

    A name is a file relative to the folder, or such as `x_train[17]`. A digest is the first 16 hex digits of the
    SHA-256 of the bytes of the file or array. A side is "train", "validation", "test", or "" where it is not known.
    """

    names: list[str]
    digests: list[str]
    labels: list[int]
    sides: list[str]
    class_names: list[str]

    @cached_property
    def sha256(self) -> str:
        """Digest of all but the names: renaming files without changing their order leaves the images as they are."""
        content = [self.digests, self.labels, self.sides, self.class_names]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @property
    def counts(self) -> list[int]:
        """The number of images of each class."""
        found = Counter(self.labels)
        return [found[label] for label in range(len(self.class_names))]

    def to_bytes(self) -> bytes:
        """Return the list as compressed JSON."""
        return zlib.compress(json.dumps(asdict(self)).encode())

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """Return the list that `to_bytes` wrote. Raises `DataError` if these are not such bytes."""
        try:
            return cls(**json.loads(zlib.decompress(content)))
        except (zlib.error, ValueError, TypeError) as error:
            raise DataError(f"the list of the study's images is damaged: {error}") from error

    def compare(self, older: "Inventory") -> list[str]:
        """Return a sentence for each kind of difference, such as `3 images added: rose/a.png, ...`.

        The list is empty if the images are the same, whatever the names of their files.
        """
        if self.sha256 == older.sha256:
            return []
        new, old = _list_rows(self), _list_rows(older)
        _, new, old = _match(new, old, lambda row: row)
        renamed, new, old = _match(new, old, lambda row: (row.digest, row.class_name, row.side))
        moved, new, old = _match(new, old, lambda row: row.digest)
        changed, new, old = _match(new, old, lambda row: row.name)
        relabelled, resided = defaultdict(list), defaultdict(list)
        for before, after in moved:
            if before.class_name != after.class_name:
                relabelled[f"{before.class_name} -> {after.class_name}"].append(after.name)
            else:
                resided[f"{before.side or 'the images'} to {after.side or 'the images'}"].append(after.name)
        come, gone = (
            [name for name in mine if name not in other]
            for mine, other in ((self.class_names, older.class_names), (older.class_names, self.class_names))
        )
        sentences = [
            _list("added", come, "class"),
            _list("removed", gone, "class"),
            _list("added", [row.name for row in new]),
            _list("removed", [row.name for row in old]),
            _list("with other content", [after.name for _, after in changed]),
            *(_list(f"relabelled: {classes}", names) for classes, names in relabelled.items()),
            *(_list(f"moved from {sides}", names) for sides, names in resided.items()),
            _list("renamed", [after.name for _, after in renamed]),
        ]
        return [sentence for sentence in sentences if sentence] or ["the images are in another order"]


class _Row(NamedTuple):
    name: str
    digest: str
    class_name: str
    side: str


def _list_rows(inventory: Inventory) -> list[_Row]:
    classes = [inventory.class_names[label] for label in inventory.labels]
    return [_Row(*row) for row in zip(inventory.names, inventory.digests, classes, inventory.sides, strict=True)]


def _match(
    new: Iterable[_Row], old: Iterable[_Row], key: Callable[[_Row], Hashable]
) -> tuple[list[tuple[_Row, _Row]], list[_Row], list[_Row]]:
    """Return pairs of an old and a new row with the same key, and the rows of both lists that have no partner."""
    waiting: dict[Hashable, list[_Row]] = defaultdict(list)
    for row in reversed(list(old)):
        waiting[key(row)].append(row)
    pairs, unmatched = [], []
    for row in new:
        if partners := waiting.get(key(row)):
            pairs.append((partners.pop(), row))
        else:
            unmatched.append(row)
    return pairs, unmatched, [row for rows in waiting.values() for row in reversed(rows)]


def _list(change: str, names: Sequence[str], noun: str = "image") -> str:
    if not names:
        return ""
    plural = "classes" if noun == "class" else f"{noun}s"
    return f"{len(names):,} {noun if len(names) == 1 else plural} {change}: {list_names(names)}"


def list_names(names: Sequence[str], n_named: int = _N_NAMED) -> str:
    """Return names in one line, the first few of them if there are many."""
    shown = ", ".join(map(show_name, names[:n_named]))
    return f"{shown}, ..." if len(names) > n_named else shown


def show_name(name: str) -> str:
    r"""Return the name of a file or folder as text of one line: a line end becomes `\n`, a byte `\udcff`."""
    return "".join(
        character.encode("unicode_escape").decode() if unicodedata.category(character) in _UNSHOWN else character
        for character in unicodedata.normalize("NFC", name)
    )
