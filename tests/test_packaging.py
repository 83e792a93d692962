"""A wheel has all that the package needs, its documentation, and the way from a folder of images to a prediction."""

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
def test_from_a_wheel_and_a_folder_of_images_each_command_says_the_next_up_to_a_prediction(
    wheel: Path, tmp_path: Path
) -> None:
    installed, here = tmp_path / "installed", tmp_path / "here"
    write_shapes(here / "shapes", 60, size=16)
    pip("install", "--target", installed, wheel)
    paths = {"PYTHONPATH": str(installed), "PATH": f"{installed / 'bin'}:{os.environ['PATH']}"}
    paths |= {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    program = [sys.executable, "-c", "import hpsearch; print(hpsearch.__file__)"]
    assert subprocess.check_output(program, cwd=here, env=os.environ | paths, text=True).startswith(str(installed))
    command, told = "hpsearch init shapes --images shapes", ""
    for verb in ("init", "run", "export", "predict"):
        if verb != "init":
            [command] = re.findall(rf"(?:next: +|  \|  )(hpsearch {verb} .*?)(?:  \|  |\n)", told)
        process = subprocess.run(
            ["bash", "-c", command], cwd=here, env=os.environ | paths, capture_output=True, text=True, check=False
        )
        assert process.returncode == 0, process.stderr
        told = process.stderr
        if verb == "init":
            text = (here / "shapes.toml").read_text()
            for key, n in (("trials  = 30", 2), ("epochs  = 100", 2), ("epochs   = 200", 4)):
                assert text.count(key) == 1
                text = text.replace(key, f"{key.partition('=')[0]}= {n}")
            (here / "shapes.toml").write_text(text)
    assert re.fullmatch(r"models/shapes/example.png(  \w+ 0\.\d{4}){3}\n", process.stdout)
