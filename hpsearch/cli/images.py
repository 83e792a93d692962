"""`init NAME --images PATH`: looks at images of one's own, says what it saw, and writes a study file for them."""

import os
import re
import shlex
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hpsearch.config.definition import Study
from hpsearch.config.files import check_free, write_study_file
from hpsearch.config.validation import describe
from hpsearch.data.inventory import list_names, show_name
from hpsearch.errors import DataError, UsageError
from hpsearch.monitor.progress import Steps
from hpsearch.monitor.tables import tabulate
from hpsearch.monitor.text import count, echo, show
from hpsearch.search.draft import Images, choose_shares, choose_size, draft_study
from hpsearch.training.devices import count_cores

if TYPE_CHECKING:
    from hpsearch.data.image_folder import FolderSurvey
    from hpsearch.data.inventory import Inventory

_N_CLASSES = 12  # shown one by one
_N_KINDS = 5
_FEW = 50  # images of a side


def write_draft(name: str | None, path: Path) -> None:
    """Write a study file for a folder or .npz file of images to the current folder, and print what is in there.

    Raises `UsageError` if there is no such path or the name is not that of a new study, and `DataError` with all
    problems of the images.
    """
    if not os.path.lexists(path):
        raise UsageError(f"{show_name(str(path))}: no such folder or file of images")
    name = _choose_name(name, path)
    source = _locate(path)
    with Steps() as show_step:
        look_at = _look_at_file if path.suffix == ".npz" and not path.is_dir() else _look_at_folder
        images, table, problem = look_at(path, source, lambda *progress: show_step("reading images", *progress))
    show(table)
    if problem:
        raise DataError(problem)
    file = write_study_file(name, draft_study(name, images, count_cores()))
    for side, counts in images.counts.items():
        if side != "train" and (n := sum(counts.values())) < _FEW:
            echo(
                f"warning: only {count(n, f'{side} image')}: an accuracy on so few is uncertain; add images if you can"
            )
    command = shlex.quote(name)
    echo(f"wrote {file}; change it as you like, and check it with: hpsearch check {command}")
    echo(f"next: hpsearch run {command}")


def _choose_name(name: str | None, path: Path) -> str:
    """Return the name of the study: the one given, else that of the images."""
    chosen = path.absolute().name.removesuffix(".npz") if name is None else name.removesuffix(".toml")
    try:
        Study.model_validate({"name": chosen})
    except ValidationError as error:
        [problem] = describe(error, Study)
        valid = re.sub(r"[^A-Za-z0-9_.-]+", "-", chosen).strip("-_.")[:50] or "images"
        command = f"hpsearch init {valid} --images {shlex.quote(show_name(str(path)))}"
        problem = problem.removeprefix("name: ")
        raise UsageError(f"the name of a study {show_name(problem)}; try: {command}") from None
    check_free(chosen)
    return chosen


def _locate(path: Path) -> str:
    """Return the path of the images as a study file here names it: relative if it was given so, or is below."""
    here, place = Path.cwd(), Path(os.path.abspath(path))  # noqa: PTH100 - keeps links
    if here.is_relative_to(place.resolve()):
        raise UsageError(
            f"the current folder is in {show_name(str(place))}, whose subfolders are classes; type this elsewhere"
        )
    is_near = place.is_relative_to(here) or not path.is_absolute()
    source = os.path.relpath(place, here) if is_near else str(place)
    try:
        source.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{show_name(source)}: a study file cannot have a path that is not UTF-8; rename it") from None
    return source


def _look_at_folder(
    folder: Path, source: str, on_read: Callable[[int, int], None]
) -> tuple[Images, RenderableType, str]:
    """Return what a draft needs to know of a folder, what a user should, and the problems to be solved first."""
    from hpsearch.data.image_folder import report_problems, survey_folder, take_inventory

    survey = survey_folder(folder, on_read=on_read)
    shares = choose_shares(len(survey.images), survey.splits)
    inventory, problems = take_inventory(
        survey, test=shares.get("test"), validation=shares.get("validation"), split_seed=0
    )
    size = choose_size(survey.training_sizes)
    images = Images(
        ("folder", source),
        _count_images(inventory),
        (3 if survey.color == "rgb" else 1, *size),
        survey.splits,
        set(survey.sizes) == {size},
        [show_name(file.name) for file in survey.unreadable],
    )
    table = Group(_tabulate_classes(images), "", _describe_folder(survey))
    return images, table, report_problems(survey, problems, is_skipping=True) if problems else ""


def _look_at_file(file: Path, source: str, on_read: Callable[[int, int], None]) -> tuple[Images, RenderableType, str]:
    """Return the same as `_look_at_folder` of an .npz file. Raises `DataError` with its problems."""
    from hpsearch.data.arrays import open_file

    found = open_file(file, on_read=on_read)
    own_test = found.n_test if "test" not in found.inventory.sides else 0
    splits = ("train", "test") if own_test else ()
    n_images = len(found.inventory.names)
    if not own_test:  # the shares decide on the sides
        shares = choose_shares(n_images, splits)
        found = open_file(file, test=shares["test"], validation=shares["validation"])
    channels, height, width = found.image_shape
    images = Images(("file", source), _count_images(found.inventory), found.image_shape, splits)
    facts = {
        "sizes": f"{width}x{height}",
        "colors": f"{n_images:,} {'rgb' if channels == 3 else 'grey'}",
        "copies": f"{n:,}, each on the side of its original"
        if (n := n_images - len({*found.inventory.digests}))
        else "",
        "test part": f"{own_test:,}, not looked at before the final test" if own_test else "",
    }
    return images, Group(_tabulate_classes(images), "", _tabulate_facts(facts)), ""


def _count_images(inventory: "Inventory") -> dict[str, dict[str, int]]:
    """Return the numbers of images of each class, by side."""
    found, classes = (
        Counter(zip(inventory.sides, inventory.labels, strict=True)),
        list(enumerate(inventory.class_names)),
    )
    sides = [side for side in ("train", "validation", "test") if side == "train" or side in inventory.sides]
    return {side: {show_name(name): found[side, label] for label, name in classes} for side in sides}


def _tabulate_classes(images: Images) -> RenderableType:
    """Return a table of the numbers of images of the classes, by side; of many classes it has the first ones."""
    names = list(images.counts["train"])
    n_shown = len(names) if len(names) <= _N_CLASSES else _N_CLASSES - 1
    groups = {name: [name] for name in names[:n_shown]}
    if rest := names[n_shown:]:
        groups[f"{len(rest):,} more"] = rest
    groups[f"all {len(names):,} classes"] = names
    rows = []
    for title, members in groups.items():
        sizes = {side: sum(counts[name] for name in members) for side, counts in images.counts.items()}
        cells = {"images": sum(sizes.values())} | (sizes if len(sizes) > 1 else {})
        rows.append({"class": title} | {key: f"{n:,}" for key, n in cells.items()})
    return tabulate(rows, texts={"class"}, emphasized=len(rows) - 1)


def _describe_folder(survey: "FolderSurvey") -> RenderableType:
    """Return what a user should know of the files of a folder, a line each."""
    sizes = sorted(survey.sizes, key=lambda size: size[0] * size[1])
    shown = [f"{width}x{height}" for height, width in ([sizes[0], sizes[-1]] if len(sizes) > 1 else sizes)]
    spread = f" ({len(sizes):,} sizes, width x height)" if len(sizes) > 1 else ""
    lines = {
        "sizes": " to ".join(shown) + spread,
        "colors": ", ".join(f"{n:,} {color}" for color, n in survey.colors.most_common()),
        "splits": ", ".join(survey.splits) if survey.splits else "",
        "copies": f"{survey.n_copies:,}, each on the side of its original" if survey.n_copies else "",
        "in two splits": _count_names([" = ".join(group) for group in survey.leaks]),
        "in two classes": _count_names([" = ".join(group) for group in survey.conflicts]),
        "unreadable": _count_names([f"{file.name} ({file.look.problem})" for file in survey.unreadable]),
        "left out": ", ".join(f"{n:,} {kind}" for kind, n in Counter(survey.left_out).most_common(_N_KINDS)),
    }
    return _tabulate_facts(lines)


def _tabulate_facts(facts: Mapping[str, str]) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    for name, text in facts.items():
        if text:
            table.add_row(name, Text(show_name(text), overflow="fold"))
    return table


def _count_names(names: list[str]) -> str:
    return f"{len(names):,}: {list_names(names)}" if names else ""
