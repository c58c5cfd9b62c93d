"""The chosen host is the only one that is loaded, where one of the two is Meta Lingua itself.

Both roots and an unrelated package called `lingua` are on the path. tests/test_host_isolation.py
has many more cases, between hosts of a few lines.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lingua_topk.host import EMBEDDED_ROOT
from tests.whence import assert_only

ROOT = Path(__file__).resolve().parents[2]
HOME = os.environ.get("LINGUA_HOME", "")
pytestmark = pytest.mark.skipif(not HOME, reason="LINGUA_HOME names no checkout of Meta Lingua")

AT_THE_TOP = """
import sys

import apps.topk.train
import whence

if __name__ == "__main__":
    whence.main(*sys.argv[1:])
"""
# A worker of it begins with a function of the host, and has imported nothing of ours.
WHEN_RUN = """
import sys

if __name__ == "__main__":
    import whence

    whence.main(*sys.argv[1:])
"""


@pytest.fixture(scope="module")
def jobs(tmp_path_factory) -> Path:
    """A folder with the programs, and with an unrelated package called lingua."""
    folder = tmp_path_factory.mktemp("jobs")
    shutil.copy(ROOT / "tests/whence.py", folder)
    (folder / "at_the_top.py").write_text(AT_THE_TOP, encoding="utf-8")
    (folder / "when_run.py").write_text(WHEN_RUN, encoding="utf-8")
    (folder / "lingua").mkdir()
    for name in ("__init__", "data", "transformer", "stray"):
        (folder / "lingua" / f"{name}.py").touch()
    return folder


@pytest.fixture(scope="module")
def linked(tmp_path_factory) -> Path:
    """A checkout as `./setup.sh lingua` leaves it."""
    checkout = tmp_path_factory.mktemp("linked").resolve() / "checkout"
    shutil.copytree(HOME, checkout, ignore=shutil.ignore_patterns(".git", "topk", "lingua_topk"))
    for part in ("apps/topk", "lingua_topk"):
        (checkout / part).symlink_to(ROOT / part)
    return checkout


def reports(*words: str, cwd: Path, path: tuple[Path, ...], **choice: str) -> dict:
    """What a program reports, run with `path` before our root and `choice` in its environment."""
    unset = ("LINGUA_HOME", "LINGUA_TOPK_HOST", "PYTHONPATH")
    clean = {k: v for k, v in os.environ.items() if k not in unset}
    search = os.pathsep.join(map(str, (*path, ROOT)))
    done = subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env={**clean, "PYTHONPATH": search, **choice},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_from_our_root_it_is_the_checkout_of_lingua_home_alone(jobs):
    path = (jobs, EMBEDDED_ROOT, Path(HOME))
    found = reports("-m", "at_the_top", "spawn loader", cwd=ROOT, path=path, LINGUA_HOME=HOME)
    assert_only(Path(HOME).resolve(), ROOT, found)


def test_from_a_checkout_it_is_that_one_alone(jobs, linked):
    path = (jobs, EMBEDDED_ROOT, Path(HOME))
    found = reports("-m", "at_the_top", "forkserver pool", cwd=linked, path=path)
    assert found.keys() == {"first", "forkserver pool", "forkserver below"}
    assert_only(linked, ROOT, found)


def test_from_a_checkout_the_embedded_host_can_be_forced(jobs, linked):
    choice = {"LINGUA_TOPK_HOST": "embedded", "LINGUA_HOME": HOME}
    words = ("-m", "at_the_top", "spawn loader")
    found = reports(*words, cwd=linked, path=(jobs, linked, EMBEDDED_ROOT), **choice)
    assert_only(EMBEDDED_ROOT, ROOT, found)


def test_a_worker_that_begins_with_linguas_data_loader_has_the_right_one(jobs, linked):
    path = (ROOT, EMBEDDED_ROOT, jobs)
    script = str(jobs / "when_run.py")
    found = reports(script, "forkserver loader", cwd=linked, path=path)
    assert_only(linked, ROOT, found)
