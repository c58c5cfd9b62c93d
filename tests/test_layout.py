"""The rooms of the repository and the directions in which they import, read off the code."""

import ast
import fnmatch
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

TOP_LEVEL = {
    "LICENSE",
    "README.md",
    "apps",
    "configs",
    "lingua_topk",
    "pyproject.toml",
    "setup.sh",
    "tests",
}

# A room of lingua_topk imports rooms of a lower rank only: ops <- nn <- patch <- what reads models.
RANK = {
    "errors": 0,
    "anneal": 1,
    "host": 1,
    "ops": 1,
    "stats": 1,
    "config": 2,
    "nn": 2,
    "patch": 3,
    "__init__": 4,
    "sparse": 5,
    "analysis": 5,
    "hf": 5,
    "report": 5,
    "steering": 5,
}
STANDARD_LIBRARY_ONLY = {"errors", "host"}
MAY_IMPORT_SAFETENSORS = {"analysis"}
MAY_IMPORT_ANYTHING = {"hf", "report"}
STANDARD = sys.stdlib_module_names


def imported_modules(source: str, package: str = "") -> set[str]:
    """The dotted names that a module's source imports, wherever in it; `package` holds the module.

    `from a import b` counts as `a.b`, since b may be a module. Relative imports are resolved.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            stem = ".".join(
                [*(above if node.level else []), *([node.module] if node.module else [])]
            )
            found |= {f"{stem}.{alias.name}" for alias in node.names}
    return found


def python_files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imports_of(path: Path) -> set[str]:
    package = ".".join(path.relative_to(ROOT).parts[:-1])
    return imported_modules(path.read_text(encoding="utf-8"), package)


def top(name: str) -> str:
    return name.partition(".")[0]


def plugin_files() -> list[Path]:
    """The files of lingua_topk without those of the embedded host."""
    return [path for path in python_files("lingua_topk") if "_host" not in path.parts]


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "lingua_topk").parts[0].removesuffix(".py")


def imported_room(name: str) -> str:
    """The room that an imported name of lingua_topk lies in."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in RANK else "__init__"


def test_the_reader_of_imports_sees_every_form():
    source = """
import a.b, c as d
from e import f
def late():
    from g.h import (i, j)
from . import k
from .l import m
from ..n import o
"""
    expected = {"a.b", "c", "e.f", "g.h.i", "g.h.j", "p.q.k", "p.q.l.m", "p.n.o"}
    assert imported_modules(source, "p.q") == expected


def test_top_level_is_kept():
    lines = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    ignored = [line.strip("/") for line in lines if line and not line.startswith("#")]
    present = {
        path.name
        for path in ROOT.iterdir()
        if not path.name.startswith(".")
        and not any(fnmatch.fnmatch(path.name, pattern) for pattern in ignored)
    }
    assert present == TOP_LEVEL


def test_every_room_has_a_rank():
    rooms = {room_of(path) for path in plugin_files()}
    assert rooms <= RANK.keys(), "give the new room its rank in this file"


@pytest.mark.parametrize("path", plugin_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms_import_downwards_only(path):
    room = room_of(path)
    rooms = {imported_room(name) for name in imports_of(path) if top(name) == "lingua_topk"}
    upwards = {other for other in rooms - {room} if RANK[other] >= RANK[room]}
    assert not upwards


def test_the_plugin_imports_torch_numpy_and_the_standard_library_only():
    """And Triton where the file says so; it is imported when a GPU's kernel is first used."""
    for path in plugin_files():
        room = room_of(path)
        if room in MAY_IMPORT_ANYTHING:
            continue
        allowed = {"lingua_topk"}
        if room not in STANDARD_LIBRARY_ONLY:
            allowed |= {"torch", "numpy"}
        if room in MAY_IMPORT_SAFETENSORS:
            allowed.add("safetensors")
        if path.name.startswith("triton_"):
            allowed.add("triton")
        foreign = {top(name) for name in imports_of(path)} - allowed - STANDARD
        assert not foreign, f"{path.relative_to(ROOT)} imports {foreign}"


def test_the_embedded_host_never_imports_the_plugin():
    hosted = [path for path in python_files("lingua_topk") if "_host" in path.parts]
    assert hosted
    for path in hosted:
        # Relative imports within the host are its own.
        names = {n for n in imports_of(path) if not n.startswith("lingua_topk._host.")}
        assert "lingua_topk" not in {top(name) for name in names}, path
        ours = {name for name in names if top(name) == "apps" and not name.startswith("apps.main")}
        assert not ours, f"{path} imports {ours}; a host has apps.main only"


def test_only_apps_and_tests_import_the_host():
    for path in plugin_files():
        tops = {top(name) for name in imports_of(path)}
        assert not tops & {"lingua", "apps"}, path


def test_importing_the_plugin_loads_neither_the_host_nor_what_the_applications_need():
    # * asks for each public name, which then imports what it needs.
    names = "{name.partition('.')[0] for name in sys.modules}"
    program = f"import sys; from lingua_topk import *; print(*sorted({names}))"
    loaded = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert "torch" in loaded
    unwanted = {"apps", "datasets", "fire", "lingua", "lm_eval", "omegaconf", "transformers"}
    assert not unwanted.intersection(loaded)
