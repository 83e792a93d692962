"""A wheel has all that the package needs, its documentation, and the way from an example or images to a prediction."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

from tests.shapes import write_shapes

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT / "hpsearch", source / "hpsearch", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", source)
    pip("wheel", "--no-build-isolation", "-w", folder, source)
    [built] = folder.glob("*.whl")
    return built


def pip(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "pip", *map(str, arguments), "-q", "--no-deps"], check=True)


def test_a_wheel_has_every_room_template_and_page(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("hpsearch/")}
    files = [file for file in (ROOT / "hpsearch").rglob("*") if file.is_file() and file.suffix != ".pyc"]
    assert packed == {str(file.relative_to(ROOT)) for file in files}


def test_the_description_of_a_wheel_links_to_nothing_and_names_folders_that_it_has(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        [metadata] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        message, names = message_from_bytes(archive.read(metadata)), archive.namelist()
    text = str(message.get_payload())
    assert not re.search(r"\]\(|://", text)
    assert {"hpsearch/README.md", "hpsearch/docs/study-file.md"} <= {*names}
    assert "in the folders `hpsearch` and `hpsearch/docs`" in text


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("command", "shortened"),
    [
        ("hpsearch init digits", ("trials = 30", "epochs = 15", "epochs = 30")),
        ("hpsearch init shapes --images shapes", ("trials  = 30", "epochs  = 100", "epochs   = 200")),
    ],
    ids=["example", "images"],
)
def test_from_a_wheel_each_command_says_the_next_up_to_a_prediction(
    wheel: Path, tmp_path: Path, command: str, shortened: tuple[str, str, str]
) -> None:
    installed, here = tmp_path / "installed", tmp_path / "here"
    write_shapes(here / "shapes", 60, size=16)
    pip("install", "--target", installed, wheel)
    paths = {"PYTHONPATH": str(installed), "PATH": f"{installed / 'bin'}:{os.environ['PATH']}"}
    paths |= {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    program = [sys.executable, "-c", "import hpsearch; print(hpsearch.__file__)"]
    assert subprocess.check_output(program, cwd=here, env=os.environ | paths, text=True).startswith(str(installed))
    name, told = command.split()[2], ""
    for verb in ("init", "run", "export", "predict"):
        if verb != "init":
            [command] = re.findall(rf"(?:next: +|  \|  )(hpsearch {verb} .*?)(?:  \|  |\n)", told)
        process = subprocess.run(
            ["bash", "-c", command], cwd=here, env=os.environ | paths, capture_output=True, text=True, check=False
        )
        assert process.returncode == 0, process.stderr
        told = process.stderr
        if verb == "init":
            text = (here / f"{name}.toml").read_text()
            for line, n in zip(shortened, (2, 2, 4), strict=True):
                assert text.count(line) == 1
                text = text.replace(line, f"{line.partition('=')[0]}= {n}")
            (here / f"{name}.toml").write_text(text)
    assert re.fullmatch(rf"models/{name}/example.png(  \w+ (0\.\d{{4}}|>0\.9999|<0\.0001)){{3}}\n", process.stdout)
