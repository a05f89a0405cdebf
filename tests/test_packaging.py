"""The wheel holds recipes and published results, and works from any folder without the checkout."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import yaml

import reproduce

ROOT = Path(reproduce.__file__).resolve().parents[1]
PROJECT = ROOT / "pyproject.toml"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("hatchling") is None or not PROJECT.is_file(),
    reason="building a wheel needs hatchling and a checkout: pip install hatchling",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)],
        cwd=ROOT, check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    (file,) = out.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def w2vrep(unpacked, cwd, *arguments):
    code = (
        "import reproduce, sys; print(reproduce.__file__); from reproduce.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=cwd, env={**os.environ, "PYTHONPATH": str(unpacked)}, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    where, _, out = done.stdout.partition("\n")
    assert Path(where).is_relative_to(unpacked), "the checkout was imported, not the wheel"
    assert (done.returncode, done.stderr) == (0, "")
    return out


def relative(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_the_wheel_holds_what_the_checkout_has(unpacked):
    shipped = unpacked / "reproduce" / "_shipped"
    for name in ("recipes", "results/published"):
        there = relative(ROOT / name)
        assert there
        assert relative(shipped / name) == there
        for file in there:
            assert (shipped / name / file).read_bytes() == (ROOT / name / file).read_bytes()
    sources = {f for f in relative(ROOT / "reproduce") if "__pycache__" not in f}
    assert sources <= relative(unpacked / "reproduce")


def test_the_wheel_holds_nothing_else(unpacked):
    assert {p.name for p in unpacked.iterdir()} == {
        "reproduce",
        f"w2vrep-{reproduce.__version__}.dist-info",
    }


def test_metadata(unpacked):
    (info,) = unpacked.glob("*.dist-info")
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    metadata = Parser().parsestr((info / "METADATA").read_text(encoding="utf-8"))
    assert metadata["Version"] == reproduce.__version__ == project["version"]
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    required = [r for r in metadata.get_all("Requires-Dist") if "extra ==" not in r]
    assert len(required) == len(project["dependencies"])
    assert not any("<" in r for r in required if r.startswith("torch"))  # open upwards
    text = (info / "entry_points.txt").read_text(encoding="utf-8")
    assert "w2vrep = reproduce.cli:main" in text
    assert (info / "licenses" / "LICENSE").is_file()


def test_recipes_work_from_another_folder(unpacked, tmp_path):
    listed = w2vrep(unpacked, tmp_path, "ls")
    assert [line.split()[0] for line in listed.splitlines()] == [
        "as-run", "as-written", "corrected", "demo", "mini", "smoke"
    ]  # fmt: skip
    assert "good" in w2vrep(unpacked, tmp_path, "check", "corrected+mini")
    w2vrep(unpacked, tmp_path, "cp", "smoke", ".")
    assert (tmp_path / "smoke.yaml").read_bytes() == (ROOT / "recipes" / "smoke.yaml").read_bytes()


def test_published_results_are_found_from_another_folder(unpacked, tmp_path):
    code = "from reproduce.shipped import shipped; print(shipped('results', 'published'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(unpacked)}, capture_output=True,
        text=True, timeout=120, check=True,
    )  # fmt: skip
    found = Path(done.stdout.strip())
    assert found == unpacked / "reproduce" / "_shipped" / "results" / "published"
    assert (found / "data" / "table1_pretrain.csv").is_file()


# -------------------------------------------------------------------------------- image, citation


def instructions() -> list[list[str]]:
    """The Dockerfile's, continued lines joined, comments left out."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [line.split(maxsplit=1) for line in lines]


def test_what_the_image_copies_is_enough_to_build_the_wheel(wheel, tmp_path):
    """Docker itself isn't needed: the same files in an empty folder make the same wheel."""
    for kind, rest in instructions():
        if kind == "COPY":
            *sources, target = rest.split()
            for source in sources:
                place = tmp_path / target / (source if target.endswith("/") else "")
                if (ROOT / source).is_dir():
                    skip = shutil.ignore_patterns("__pycache__")
                    shutil.copytree(ROOT / source, place, ignore=skip)
                else:
                    place.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(ROOT / source, place)
    out = tmp_path / "out"
    build = ["-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    subprocess.run([sys.executable, *build], cwd=tmp_path, check=True, capture_output=True)
    (built,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as ours, zipfile.ZipFile(built) as image:
        assert set(image.namelist()) == set(ours.namelist())


def test_the_image_runs_the_command_and_installs_what_there_is(unpacked):
    done = dict(instructions())
    assert json.loads(done["ENTRYPOINT"]) == ["w2vrep"]
    assert json.loads(done["CMD"]) == ["--help"]
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    installs = [rest for kind, rest in instructions() if kind == "RUN"]
    extras = re.findall(r"'\.\[(\w+)\]'", " ".join(installs))
    assert extras == ["tensorboard"]
    assert set(extras) <= project["optional-dependencies"].keys()
    for command in installs:
        subprocess.run(["sh", "-n", "-c", command], check=True)


def test_the_citation_names_the_study_and_this_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == reproduce.__version__
    assert {"cff-version", "message", "title", "authors", "license"} <= cited.keys()
    study = cited["references"][0]
    assert study["title"].startswith("Boosting wav2vec2 Performance in Low-Resource")
    assert [author["family-names"] for author in study["authors"]] == ["Fonseka", "Thayasivam"]
