"""The chosen host is the only one that is loaded: whatever is on the path, in workers too.

What binds is a copy of ours. The hosts, and the strangers that have the names of their packages,
are a few lines each: a process starts in no time, and one that took the wrong package would not
notice. Every run tells, from the first process and from its workers, where each module of a host
came from.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from textwrap import indent

import pytest

from lingua_topk.host import EMBEDDED_ROOT
from tests.whence import ONES_OWN, assert_only

ROOT = Path(__file__).resolve().parents[1]
WHENCE = ROOT / "tests/whence.py"

BINDING = (
    "lingua_topk/host.py",
    "lingua_topk/errors.py",
    "apps/__init__.py",
    "apps/topk/__init__.py",
)
# Without torch, and without what Meta Lingua would need.
STAND_INS = {
    "lingua_topk/__init__.py": "",
    "apps/topk/lingua_host.py": "def supply_missing_or_exit(): pass\ndef is_lingua(): pass\n",
    "apps/topk/train.py": "import apps.main.train\nimport lingua.data\n",
}

# As in a host, the first thing that the new process looks up is a function of this module.
DATA = """
from contextlib import contextmanager
from multiprocessing import Pipe, Process

import lingua.transformer


def feed_buffer(pipe, iterator_builder):
    with iterator_builder() as items:
        for item in items:
            pipe.send(item)


@contextmanager
def async_iterator(buffer_size, iterator_builder):
    reader, writer = Pipe(duplex=False)
    process = Process(target=feed_buffer, args=(writer, iterator_builder))
    process.start()
    writer.close()  # so that the end of a worker that fails is an EOFError here
    try:
        yield iter(reader.recv, None)
    finally:
        process.kill()
        process.join()
"""

WORKERS = [f"{method} {kind}" for method in ("spawn", "forkserver") for kind in ("loader", "pool")]
PROCESSES = {"first", "spawn below", "forkserver below", *WORKERS}

AT_THE_TOP = """
import os
import sys

import apps.topk.train
import whence

if __name__ == "__main__":
    folder, *workers = sys.argv[1:]
    os.chdir(folder)
    whence.main(*workers)
"""
WHEN_RUN = f"""
if __name__ == "__main__":
{indent(AT_THE_TOP, "    ")}
"""

# As setuptools writes it for `pip install --editable`: last of all finders, modules right
# below the packages included.
EDITABLE = """
import sys
from importlib.machinery import PathFinder


class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        parent, _, _ = name.rpartition(".")
        if name in ("apps", "lingua_topk"):
            return PathFinder.find_spec(name, [{root!r}])
        if parent in ("apps", "lingua_topk"):
            return PathFinder.find_spec(name, [{root!r} + "/" + parent])


sys.meta_path.append(Finder)
"""


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def write_host(root: Path, kind: str) -> Path:
    """What a host must have; and in each of its packages one module that no other kind has."""
    files = {
        "lingua/__init__.py": "",
        "lingua/transformer.py": "",
        "lingua/data.py": DATA,
        "apps/__init__.py": "",
        "apps/main/__init__.py": "",
        "apps/main/transformer.py": "import lingua.transformer\n",
        "apps/main/train.py": "import apps.main.transformer\nimport lingua.data\n",
        **{f"{own.replace('.', '/')}.py": "" for own in ONES_OWN[kind]},
    }
    write(root, files)
    return root


def write_ours(root: Path) -> None:
    for name in BINDING:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    write(root, {**STAND_INS, "apps/topk/program.py": AT_THE_TOP})
    write_host(root / "lingua_topk/_host", "embedded")


def write_strangers(root: Path) -> None:
    """What has a host's name and is none: a package, one without __init__, a module; and `apps`."""
    for form in ("package", "namespace"):
        shutil.move(write_host(root / "stray", "stray") / "lingua", root / form / "lingua")
    (root / "namespace/lingua/__init__.py").unlink()
    write(root / "module", {"lingua.py": ""})
    shutil.move(root / "stray/apps", root / "apps/apps")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Our root, two checkouts that it is linked into, strangers, and a folder for other work."""
    root = tmp_path_factory.mktemp("world").resolve()
    write_ours(root / "ours")
    write_strangers(root)
    for name in ("checkout", "another"):
        write_host(root / name, "lingua")
        for part in ("apps/topk", "lingua_topk"):
            (root / name / part).symlink_to(root / "ours" / part)
    write(root / "elsewhere", {"at_the_top.py": AT_THE_TOP, "when_run.py": WHEN_RUN})
    write(root / "elsewhere/job", {"__init__.py": "", "at_the_top.py": AT_THE_TOP})
    write(root / "tools", {"whence.py": WHENCE.read_text(encoding="utf-8")})
    return root


@pytest.fixture(scope="module")
def interpreter(world) -> Path:
    """A Python as ./setup.sh leaves it, where somebody has installed another `lingua` as well."""
    command = [sys.executable, "-m", "venv", "--without-pip", world / "venv"]
    subprocess.run(command, check=True, timeout=60)
    (packages,) = (world / "venv").glob("lib/python*/site-packages")
    shutil.copytree(world / "package/lingua", packages / "lingua")
    write(packages, {"ours_editable.py": EDITABLE.format(root=str(world / "ours"))})
    roots = f"{world / 'ours'}\n{folder_of(world, 'embedded')}\n"
    write(packages, {"ours.pth": f"import ours_editable\n{roots}"})
    return world / "venv/bin/python"


def folder_of(world: Path, name: str) -> Path:
    return world / ("ours/lingua_topk/_host" if name == "embedded" else name)


# The ways to choose a host: the environment, and the host that is then expected.
CHOICES = {
    "nothing": ({}, "embedded"),
    "forced": ({"LINGUA_TOPK_HOST": "embedded", "LINGUA_HOME": "checkout"}, "embedded"),
    "home": ({"LINGUA_HOME": "checkout"}, "checkout"),
    "another": ({"LINGUA_TOPK_HOST": "lingua", "LINGUA_HOME": "another"}, "another"),
    "folder": ({}, "checkout"),
}

MODULE = ("-m", "apps.topk.program")


@pytest.fixture
def run(world, interpreter):
    """Runs a program with `path`, names of folders of `world`, on PYTHONPATH.

    words: of the command line; those for the program follow, `then` being the folder that it
    changes to.
    """

    def run(
        *words: str, choice: str, cwd: str, path: str = "", then: str = "."
    ) -> subprocess.CompletedProcess:
        environ = dict(CHOICES[choice][0])
        if "LINGUA_HOME" in environ:
            home = world / environ["LINGUA_HOME"]
            environ["LINGUA_HOME"] = os.path.relpath(home, folder_of(world, cwd))
        return subprocess.run(
            [interpreter, *words, world / then if then != "." else then, *WORKERS],
            cwd=folder_of(world, cwd),
            env=environment(
                *(folder_of(world, name) for name in [*path.split(), "tools"]), **environ
            ),
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


def environment(*path: Path, **variables: str) -> dict[str, str]:
    """That of the tests, without what chooses a host or changes Python."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("LINGUA_", "PYTHON"))}
    clean.pop("RANK", None)
    return {**clean, "PYTHONPATH": os.pathsep.join(map(str, path)), **variables}


def reports_of(done: subprocess.CompletedProcess) -> dict:
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture
def check(world, run):
    """Runs, and expects that all that is loaded is what `choice`, one of CHOICES, leads to."""

    def check(*words: str, choice: str, **where) -> None:
        reports = reports_of(run(*words, choice=choice, **where))
        assert reports.keys() == PROCESSES
        assert_only(folder_of(world, CHOICES[choice][1]), world / "ours", reports)

    return check


BOTH_ROOTS = "package checkout embedded"


@pytest.mark.parametrize(
    ("choice", "cwd"),
    [
        *(("nothing", cwd) for cwd in ("ours", "embedded", "elsewhere")),
        *(("forced", cwd) for cwd in ("ours", "checkout", "embedded")),
        *(("home", cwd) for cwd in ("ours", "checkout", "embedded")),
        ("folder", "checkout"),
        ("another", "checkout"),
    ],
)
def test_the_chosen_host_is_the_only_one_from_every_folder(check, choice, cwd):
    check(*MODULE, choice=choice, cwd=cwd, path=BOTH_ROOTS)


@pytest.mark.parametrize("choice", ["forced", "home"])
@pytest.mark.parametrize(
    "path",
    [
        "",
        "embedded checkout module",
        "module ours embedded checkout apps",
        "namespace checkout embedded apps",
    ],
)
def test_what_else_is_on_the_path_and_where_changes_nothing(check, choice, path):
    check(*MODULE, choice=choice, cwd="elsewhere", path=path)


STARTS = {
    "a module elsewhere": ("-m", "job.at_the_top"),
    "a script": ("at_the_top.py",),
    # In these two a worker's first import is that of what it has to do.
    "a script that imports when run": ("when_run.py",),
    "a command": ("-c", AT_THE_TOP),
}


@pytest.mark.parametrize("choice", ["forced", "home"])
@pytest.mark.parametrize("start", STARTS)
def test_workers_follow_however_the_program_was_started(check, choice, start):
    check(*STARTS[start], choice=choice, cwd="elsewhere", path=BOTH_ROOTS)


@pytest.mark.parametrize(
    ("choice", "cwd", "then"),
    [
        ("folder", "checkout", "elsewhere"),
        ("nothing", "elsewhere", "checkout"),
        ("home", "elsewhere", "ours/apps"),  # where the relative LINGUA_HOME is something else
    ],
)
def test_workers_follow_into_another_folder(check, choice, cwd, then):
    check(*MODULE, choice=choice, cwd=cwd, then=then)


def test_one_folder_of_packages_can_hold_both_us_and_an_unrelated_lingua(world, run):
    """As pip installs them; -S leaves out what is installed in the interpreter."""
    shutil.copytree(world / "ours", world / "packages")
    shutil.copytree(world / "package/lingua", world / "packages/lingua")
    path = "packages checkout package"
    reports = reports_of(run("-S", *MODULE, choice="forced", cwd="elsewhere", path=path))
    assert reports.keys() == PROCESSES
    assert_only(world / "packages/lingua_topk/_host", world / "packages", reports)


@pytest.mark.parametrize("first", ["embedded", "apps"])
def test_apps_of_another_in_front_of_ours_is_an_error_and_nothing_runs(run, first):
    """Nothing of ours is there to find; -S leaves out what would find it all the same."""
    done = run("-S", *MODULE, choice="home", cwd="elsewhere", path=f"{first} ours")
    assert (done.returncode, done.stdout) == (1, "")
    assert "No module named 'apps.topk'" in done.stderr


def test_the_trainer_and_its_data_loader_are_of_the_embedded_host_alone(tmp_path):
    """The real ones, from the least favourable folder: a checkout that ours is linked into."""
    write_host(tmp_path / "package", "stray")
    write_host(tmp_path / "checkout", "lingua")
    for part in ("apps/topk", "lingua_topk"):
        (tmp_path / "checkout" / part).symlink_to(ROOT / part)
    write(tmp_path / "job", {"job.py": AT_THE_TOP, "whence.py": WHENCE.read_text("utf-8")})
    path = (tmp_path / "package", tmp_path / "checkout", tmp_path / "job", ROOT)
    choice = {"LINGUA_TOPK_HOST": "embedded", "LINGUA_HOME": str(tmp_path / "checkout")}
    done = subprocess.run(
        [sys.executable, "-m", "job", ".", "forkserver loader"],
        cwd=tmp_path / "checkout",
        env=environment(*path, **choice),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert_only(EMBEDDED_ROOT, ROOT, reports_of(done))
