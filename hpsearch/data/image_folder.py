"""A folder of the user's own images, with a subfolder for each class: what it holds, and its data set."""

import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

from hpsearch.data.inventory import Inventory, list_names, show_name
from hpsearch.data.own import DEFAULT_SHARE, OwnImages, divide, list_problems, name_class
from hpsearch.data.photos import SUFFIXES, Look
from hpsearch.data.tensors import OnRead, Pixels, check_space, look_at_files, read_photos
from hpsearch.errors import DataError

logger = logging.getLogger(__name__)
_warned: dict[Path, list[str]] = {}  # what was said of a folder: a command may open it several times

_SIDES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_HIDDEN = re.compile(r"\.|__MACOSX$|@eaDir$|Thumbs\.db$|desktop\.ini$", re.IGNORECASE)
# Pictures that are left out, which a user may not expect.
_OTHER_PICTURES = (".heic", ".heif", ".avif", ".jp2", ".jxl", ".psd", ".svg", ".dng", ".nef", ".cr2", ".arw", ".dcm")
_LARGEST_OWN = 64  # pixels of the longer side


class ImageFile(NamedTuple):
    """An image file: name relative to the folder, class, side of the user's own ("" without), and what is known."""

    name: str
    class_name: str
    side: str
    look: Look


@dataclass(frozen=True)
class FolderSurvey:
    """What a folder of images holds.

    `images` are in the order of the tensors. The files of `unreadable` look like images, and `look.problem` says what
    is wrong. `left_out` counts what is no image, by suffix or kind. `splits` are the sides that the folder has of its
    own, such as ("train", "test"). `problems` must be solved first: each is a line such as `class "rose": no images`.
    """

    folder: Path
    class_names: tuple[str, ...]
    images: tuple[ImageFile, ...]
    unreadable: tuple[ImageFile, ...]
    left_out: Mapping[str, int]
    splits: tuple[str, ...]
    problems: tuple[str, ...] = field(default=())

    @cached_property
    def counts(self) -> dict[str, list[int]]:
        """Numbers of images of each class, by split; those of a folder without splits under ""."""
        found = Counter((image.side, image.class_name) for image in self.images)
        return {side: [found[side, name] for name in self.class_names] for side in self.splits or ("",)}

    @cached_property
    def sizes(self) -> Counter[tuple[int, int]]:
        """Numbers of images by height and width."""
        return Counter((image.look.height, image.look.width) for image in self.images)

    @cached_property
    def colors(self) -> Counter[str]:
        """Numbers of images that are "grey" and "rgb"."""
        return Counter(image.look.color for image in self.images)

    @cached_property
    def n_copies(self) -> int:
        """How many images are copies of another one on the same side and in the same class."""
        return len(self.images) - len({(image.look.digest, image.side, image.class_name) for image in self.images})

    @cached_property
    def leaks(self) -> list[list[str]]:
        """Names of files that hold one image and are in different splits of the folder."""
        return [[image.name for image in group] for group in self._copies if len({each.side for each in group}) > 1]

    @cached_property
    def conflicts(self) -> list[list[str]]:
        """Names of files that hold one image and are in different classes."""
        return [[i.name for i in group] for group in self._copies if len({each.class_name for each in group}) > 1]

    @cached_property
    def _copies(self) -> list[list[ImageFile]]:
        groups: dict[str, list[ImageFile]] = defaultdict(list)
        for image in self.images:
            groups[image.look.digest].append(image)
        return [group for group in groups.values() if len(group) > 1]

    @property
    def size(self) -> tuple[int, int]:
        """The height and width to use by default: that of all images but test images if it is 64 or less, else 64."""
        height, width = next(iter(self.training_sizes), (_LARGEST_OWN, _LARGEST_OWN))
        is_own = len(self.training_sizes) == 1 and max(height, width) <= _LARGEST_OWN
        return (height, width) if is_own else (_LARGEST_OWN, _LARGEST_OWN)

    @property
    def color(self) -> str:
        """The colors to use by default: "grey" if all images but test images are, else "rgb"."""
        return "rgb" if any(image.look.color == "rgb" for image in self._not_test) else "grey"

    @cached_property
    def training_sizes(self) -> Counter[tuple[int, int]]:
        """How many images but test images have each height and width."""
        return Counter((image.look.height, image.look.width) for image in self._not_test)

    @property
    def _not_test(self) -> list[ImageFile]:
        return [image for image in self.images if image.side != "test"]


def survey_folder(
    folder: Path | str,
    *,
    on_read: OnRead = lambda n_done, n_total: None,
    on_listed: Callable[[int], None] = lambda n_files: None,
) -> FolderSurvey:
    """Look at all files of a folder. `on_read` gets the numbers of files read and of all.

    `on_listed` gets the number of image files, by their suffix, before any file is read; it may raise. Raises
    `DataError` if there is no such folder, or if it has fewer than two class folders.
    """
    folder = Path(folder).absolute()
    listing = _Listing(folder)
    splits, class_folders = _find_class_folders(listing, folder)
    class_names = sorted({show_name(path.name) for _, path in class_folders}, key=natural_key)
    if len(class_names) < 2:
        raise DataError(_explain_classes(listing, [path for _, path in class_folders]))
    found: list[tuple[str, str, str, str]] = []
    for side, path in class_folders:
        class_name, parent = show_name(path.name), path.relative_to(folder).as_posix()
        found += [(side, class_name, parent, name) for name in listing.walk(path)]
    ranks = {name: rank for rank, name in enumerate(class_names)}
    found.sort(key=lambda file: (natural_key(file[3]), ranks[file[1]], file[0], file[2]))
    names = [f"{parent}/{name}" for _, _, parent, name in found]
    on_listed(sum(Path(name).suffix.lower() in SUFFIXES for name in names))
    looks = look_at_files(folder, names, on_read)
    files = [ImageFile(n, file[1], file[0], look) for n, file, look in zip(names, found, looks, strict=True)]
    for file in files:
        if not file.look.is_image:
            listing.leave_out(file.name)
    survey = FolderSurvey(
        folder,
        tuple(class_names),
        tuple(file for file in files if file.look.color),
        tuple(file for file in files if file.look.problem),
        listing.left_out,
        splits,
    )
    return replace(survey, problems=(*listing.problems, *_find_empty_classes(survey)))


def open_folder(
    folder: Path | str,
    *,
    size: int | tuple[int, int] | None = None,
    color: str | None = None,
    test: float | None = None,
    validation: float | None = None,
    split_seed: int = 0,
    skip_unreadable: bool = False,
    on_read: OnRead = lambda n_done, n_total: None,
) -> OwnImages:
    """Return the data set of a folder of images, which has a subfolder for each class.

    Instead, the folder may have `train`, `test` and `val` with those inside. Sides that it does not have are chosen:
    `test` and `validation` are numbers or shares of the images. `size` is the height and width. `on_read` gets the
    numbers of files read and of all. Raises `DataError` with everything that is wrong, and warns of copies.
    """

    def check(n_files: int) -> None:
        if size:
            check_space(n_files, (3 if color == "rgb" else 1, *_pair(size)))

    survey = survey_folder(folder, on_read=on_read, on_listed=check)
    inventory, problems = take_inventory(survey, test=test, validation=validation, split_seed=split_seed)
    if not skip_unreadable:
        problems += [f"{show_name(file.name)}: {file.look.problem}" for file in survey.unreadable]
    if problems:
        raise DataError(report_problems(survey, problems, is_skipping=skip_unreadable))
    _warn(survey)
    height, width = _pair(size) if size else survey.size
    color = color or survey.color
    check_space(len(survey.images), (1 if color == "grey" else 3, height, width))
    return OwnImages.of(
        inventory,
        partial(_read_files, survey.folder, inventory, size=(height, width), color=color),
        title=show_name(survey.folder.name),
        folder=survey.folder,
        image_shape=(1 if color == "grey" else 3, height, width),
        validation=validation or DEFAULT_SHARE,
    )


def take_inventory(
    survey: FolderSurvey, *, test: float | None, validation: float | None, split_seed: int
) -> tuple[Inventory, list[str]]:
    """Return the images of a folder with their sides, and the problems that must be solved first."""
    labels = {name: label for label, name in enumerate(survey.class_names)}
    images, problems = survey.images, list(survey.problems)
    sides = [image.side or "train" for image in images]
    sizes = {} if "test" in survey.splits else {"test": test or DEFAULT_SHARE}
    n_needed = 1 + len({"test", "validation"} - set(survey.splits))
    if not {"test", "validation"} & set(survey.splits):
        sizes["validation"] = validation or DEFAULT_SHARE
    for side, size in (("test", test), ("validation", validation)):
        if side in survey.splits and size is not None:
            problems.append(f"data.{side} = {size:g}, but the folder has a {side} side of its own; remove one of them")
    pool = [row for row, side in enumerate(sides) if side == "train"]
    digests, pool_labels = [images[row].look.digest for row in pool], [labels[images[row].class_name] for row in pool]
    chosen, found = divide(digests, pool_labels, survey.class_names, sizes, n_needed, split_seed)
    problems += found
    if sizes and not problems:
        for row, side in zip(pool, chosen, strict=True):
            sides[row] = side
    names, all_digests = [image.name for image in images], [image.look.digest for image in images]
    all_labels = [labels[image.class_name] for image in images]
    return Inventory(names, all_digests, all_labels, sides, list(survey.class_names)), problems


def natural_key(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """Return a key that sorts names as a person does: a2 before a10."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    return [(0, int(part), "") if part[0] in "0123456789" else (1, 0, part) for part in parts], name


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _read_files(
    folder: Path, inventory: Inventory, rows: Sequence[int], *, size: tuple[int, int], color: str
) -> Iterator[Pixels]:
    files = [(folder / inventory.names[row], inventory.digests[row]) for row in rows]
    return read_photos(files, size=size, color=color)


class _Listing:
    """Lists folders, and collects what is left out and what goes wrong."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.left_out: Counter[str] = Counter()
        self.problems: list[str] = []

    def list_folder(self, folder: Path) -> tuple[list[str], list[str]]:
        """Return the names of the folders and files in a folder, links to such included."""
        folders, files = [], []
        try:
            with os.scandir(folder) as scanned:
                entries = sorted(scanned, key=lambda entry: entry.name)
        except OSError as error:
            self.problems.append(f"{self._name(folder)}: {error.strerror}")
            return [], []
        for entry in entries:
            if _HIDDEN.match(entry.name):
                self.left_out["hidden"] += 1
            elif _is(entry.is_dir):
                folders.append(entry.name)
            elif _is(entry.is_file) or entry.is_symlink():
                files.append(entry.name)
            else:
                self.left_out["not a file"] += 1
        return folders, files

    def walk(self, folder: Path) -> Iterator[str]:
        """Return the names of all files in a folder and below, relative to it; a link to a folder above is left out."""
        waiting = [("", frozenset((_identify(self.folder), _identify(folder.parent))))]
        while waiting:
            inside, above = waiting.pop()
            try:
                identity = _identify(folder / inside)
            except OSError as error:
                self.problems.append(f"{self._name(folder / inside)}: {error.strerror}")
                continue
            if identity in above:
                self.left_out["link to a folder above"] += 1
                continue
            folders, files = self.list_folder(folder / inside)
            yield from (f"{inside}{file}" for file in files)
            waiting += [(f"{inside}{each}/", above | {identity}) for each in folders]

    def leave_out(self, name: str) -> None:
        self.left_out[Path(name).suffix.lower() or "no suffix"] += 1

    def _name(self, path: Path) -> str:
        return show_name(str(path if path == self.folder else path.relative_to(self.folder)))


def _identify(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _is(check: Callable[[], bool]) -> bool:
    try:
        return check()
    except OSError:  # a link that leads to itself, or into a folder that may not be entered
        return False


def _find_class_folders(listing: _Listing, folder: Path) -> tuple[tuple[str, ...], list[tuple[str, Path]]]:
    """Return the splits of a folder, and the side and path of each class folder."""
    if not _is(folder.is_dir):
        if _is(folder.exists):
            raise DataError(f"{show_name(str(folder))} is a file, not a folder; unpack it if it is an archive")
        raise DataError(
            f"{show_name(str(folder))}: no such folder; give the one that has a subfolder of images for each class "
            "(if it has moved: in data.folder, or with --data)"
        )
    folders, files = listing.list_folder(folder)
    if listing.problems:
        raise DataError(listing.problems[0])
    sides = {name: _SIDES[name.casefold()] for name in folders if name.casefold() in _SIDES}
    inside = {name: listing.list_folder(folder / name) for name in sides}
    if not any(side == "train" and inside[name][0] for name, side in sides.items()):
        _leave_out_loose(listing, files)
        return (), [("", folder / name) for name in folders]
    listing.left_out.update(f"folder {show_name(name)}" for name in folders if name not in sides)
    found = []
    for name, side in sides.items():
        classes, loose = inside[name]
        _leave_out_loose(listing, [*files, *loose])
        files = []
        if list(sides.values()).count(side) > 1:
            listing.problems.append(f"{name}: there is another folder for the {side} side; keep one of them")
        if not classes:
            listing.problems.append(f"{name}: no class folders; sort its images into them, or move it elsewhere")
        found += [(side, folder / name / each) for each in classes]
    return tuple(side for side in ("train", "validation", "test") if side in sides.values()), found


def _leave_out_loose(listing: _Listing, files: Iterable[str]) -> None:
    for file in files:
        if Path(file).suffix.lower() in SUFFIXES:
            listing.left_out["image outside the class folders"] += 1
        else:
            listing.leave_out(file)


def _explain_classes(listing: _Listing, class_folders: Sequence[Path]) -> str:
    title = show_name(str(listing.folder))
    if not class_folders:
        return f"{title} has no class folders; sort the images into one subfolder a class"
    inner = class_folders[0]
    if len(listing.list_folder(inner)[0]) > 1:
        return f"{title} has a single folder, which has the class folders; name that one: {show_name(str(inner))}"
    return f"{title} has a single class, {show_name(inner.name)}; there must be two at least, one subfolder a class"


def _find_empty_classes(survey: FolderSurvey) -> list[str]:
    unreadable = Counter((file.side, file.class_name) for file in survey.unreadable)
    problems = []
    for side, counts in survey.counts.items():
        for name, n in zip(survey.class_names, counts, strict=True):
            if n == 0:
                where = f" on the {side} side" if side else ""
                kind = "readable images" if unreadable[side, name] else "images"
                problems.append(f"{name_class(name)}: no {kind}{where}; add some, or remove the class")
    return problems


def report_problems(survey: FolderSurvey, problems: Sequence[str], *, is_skipping: bool) -> str:
    """Return the message of an error that names the problems of a folder."""
    advice = "Replace or remove files that cannot be read, or set data.skip_unreadable = true to go on without."
    return list_problems(show_name(str(survey.folder)), problems, advice * bool(survey.unreadable and not is_skipping))


def _warn(survey: FolderSurvey) -> None:
    """Warn of what the user should know before a search uses the images, unless that was said of them before."""
    warnings = []
    if n := len(survey.unreadable):
        names = list_names([file.name for file in survey.unreadable])
        warnings.append(f"skipping {n:,} file{'s' * (n != 1)} that cannot be read: {names}")
    if others := {suffix: n for suffix, n in survey.left_out.items() if suffix in _OTHER_PICTURES}:
        found = ", ".join(f"{n:,} {suffix}" for suffix, n in others.items())
        warnings.append(f"left out {found} files; convert them to JPEG or PNG to use them")
    for groups, meaning in (
        (survey.leaks, "split, which makes results look better than they are"),
        (survey.conflicts, "class"),
    ):
        if groups:
            pairs = [" = ".join(group if len(group) <= 3 else [*group[:3], "..."]) for group in groups]
            subject = "1 image is" if len(groups) == 1 else f"{len(groups):,} images are"
            warnings.append(f"{subject} in more than one {meaning}: {list_names(pairs)}")
    if _warned.get(survey.folder) != warnings:
        _warned[survey.folder] = warnings
        for warning in warnings:
            logger.warning("%s: %s", show_name(survey.folder.name), warning)
