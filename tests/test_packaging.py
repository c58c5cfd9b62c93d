"""What a wheel holds, and that every dependency has a pin."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("apps", "lingua_topk")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def package_files():
    """Every file below the packages that belongs to them, relative to the root."""
    return {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy, without a network and without build isolation."""
    copy = tmp_path_factory.mktemp("wheel") / "project"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    for package in PACKAGES:
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("*.pyc"))
    program = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    built = subprocess.run(
        [sys.executable, "-c", program], cwd=copy, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    (path,) = (copy / "dist").glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_the_wheel_holds_every_file_of_the_packages(wheel):
    held = {name for name in wheel.namelist() if name.split("/")[0] in PACKAGES}
    assert held == package_files()
    for folder in ("", "lingua/", "apps/", "apps/main/"):
        assert f"lingua_topk/_host/{folder}__init__.py" in held


def test_the_wheel_says_what_it_is(wheel):
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    lines = wheel.read(name).decode().splitlines()
    version = re.search(
        r'^__version__ = "(.+)"$', (ROOT / "lingua_topk/__init__.py").read_text("utf-8"), re.M
    )
    assert f"Version: {version[1]}" in lines
    assert "License-Expression: BSD-3-Clause" in lines
    assert {f"Provides-Extra: {extra}" for extra in ("cuda", "dev", "lingua")} <= set(lines)


def pins(python):
    """The pinned requirements that apply on a version of Python, by name."""
    found = {}
    for line in (ROOT / ".pins" / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        pin = Requirement(line)
        if pin.marker is None or pin.marker.evaluate({"python_version": python}):
            assert pin.name not in found, f"{pin.name} is pinned twice for Python {python}"
            found[pin.name] = pin
    return found


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12"])
def test_every_dependency_is_pinned_within_its_range(python):
    pinned = pins(python)
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    for wanted in (Requirement(text) for group in groups for text in group):
        assert wanted.name in pinned, f"{wanted.name} has no pin for Python {python}"
        (pin,) = pinned[wanted.name].specifier
        assert pin.operator == "=="
        assert pin.version in wanted.specifier
