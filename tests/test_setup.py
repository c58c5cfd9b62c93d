"""setup.sh and .ci/run, with stand-ins for Python: nothing is installed, nothing is fetched.

The script runs in a copy of what it reads; the stand-in writes down how it was called, one line
a call, arguments between bars.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("python3", "python3.12", "python3.11", "python3.10")

STAND_IN = r"""#!/usr/bin/env bash
case "$1 $2" in
  "-c import sys"*) echo "VERSION"; exit ;;
  "-c import torch") exit 1 ;;
  "-c "*) exit 0 ;;
esac
{ printf '%s|' "$PWD" "$@"; echo; } >>"$CALLS"
case "$1 $2" in
  "-m venv")
    mkdir -p "$4/bin" && rm -f "$4"/.installed-*
    cp "$0" "$4/bin/python" && echo "VIRTUAL_ENV='$4'" >"$4/bin/activate"
    ;;
  "-m pip")
    if [[ "$*" == *"${FAIL_ON:-nothing}"* ]]; then echo "ERROR: the index is on fire"; exit 1; fi
    ;;
  "-m pytest" | "-m apps.topk.quickstart") exit "${STATUS:-0}" ;;
esac
"""


def executable(path, text):
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)


class Copy:
    """A copy of setup.sh and what it reads, in a folder with a space, and the stand-ins."""

    def __init__(self, tmp_path):
        self.root = tmp_path / "a project"
        self.elsewhere = tmp_path / "elsewhere"
        self.calls_file = tmp_path / "calls"
        self.bin = tmp_path / "bin"
        for folder in (self.root / ".pins", self.elsewhere, self.bin):
            folder.mkdir(parents=True)
        for name in ("setup.sh", "pyproject.toml", ".pins/constraints.txt"):
            shutil.copy(ROOT / name, self.root / name)
        for name in NAMES:
            self.stand_in(name, "3.11")

    def stand_in(self, name, version):
        executable(self.bin / name, STAND_IN.replace("VERSION", version))
        return str(self.bin / name)

    def run(self, *arguments, cwd=None, **variables):
        environment = {
            "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}",
            "CALLS": str(self.calls_file),
            **variables,
        }
        return subprocess.run(
            [self.root / "setup.sh", *arguments],
            cwd=cwd or self.root,
            env=environment,
            capture_output=True,
            text=True,
        )

    def calls(self):
        """What the stand-ins were called with since the last look: (folder, arguments)."""
        text = self.calls_file.read_text(encoding="utf-8") if self.calls_file.exists() else ""
        self.calls_file.unlink(missing_ok=True)
        return [(line.split("|")[0], line.split("|")[1:-1]) for line in text.splitlines()]

    def installed(self):
        """The arguments of the `pip install` calls since the last look."""
        return [words[3:] for _, words in self.calls() if words[:3] == ["-m", "pip", "install"]]


@pytest.fixture
def copy(tmp_path):
    return Copy(tmp_path)


def assert_refused(result, *said):
    assert result.returncode == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    for words in said:
        assert words in result.stderr


@pytest.mark.parametrize("word", ["help", "--help", "-h"])
def test_help_names_the_commands_and_installs_nothing(copy, word):
    result = copy.run(word, cwd=copy.elsewhere)
    assert result.returncode == 0
    for named in ("quickstart", "test", "PYTHON", "LINGUA_TOPK_TORCH_INDEX"):
        assert named in result.stdout
    assert not copy.calls()


def test_an_unknown_command_is_refused(copy):
    assert_refused(copy.run("quickstrat", cwd=copy.elsewhere), "'quickstrat'", "help")
    assert not copy.calls()


@pytest.mark.parametrize("version", ["3.9", "3.13", "2.7"])
def test_a_python_out_of_range_is_refused(copy, version):
    wrong = copy.stand_in("wrong", version)
    assert_refused(copy.run(PYTHON=wrong), f"PYTHON={wrong}", version, "3.10, 3.11 or 3.12")
    assert not (copy.root / ".venv").exists()


def test_a_python_that_does_not_run_is_refused(copy):
    assert_refused(copy.run(PYTHON="/nowhere/python"), "PYTHON=/nowhere/python", "3.10")


def test_no_fitting_python_is_one_line(copy):
    for name in NAMES:
        copy.stand_in(name, "3.13")
    assert_refused(copy.run("test"), "no Python 3.10, 3.11 or 3.12 found", "PYTHON")


def test_the_first_fitting_python_is_taken(copy):
    copy.stand_in("python3", "3.13")
    copy.stand_in("python3.12", "")
    assert "Python 3.11" in copy.run().stdout


def test_a_first_run_installs_and_a_second_does_not(copy):
    result = copy.run(cwd=copy.elsewhere)
    assert result.returncode == 0, result.stderr
    installed = copy.installed()
    assert [words[-1] for words in installed] == ["setuptools", "torch", ".[dev]"]
    for words in installed:
        assert words[words.index("--constraint") + 1] == ".pins/constraints.txt"
    assert copy.run().returncode == 0
    assert not copy.calls()


@pytest.mark.parametrize("changed", ["pyproject.toml", ".pins/constraints.txt"])
def test_a_change_of_what_is_wanted_installs_again(copy, changed):
    copy.run()
    copy.calls()
    with (copy.root / changed).open("a", encoding="utf-8") as file:
        file.write("# changed\n")
    copy.run()
    assert [words[-1] for words in copy.installed()][-1] == ".[dev]"
    copy.run()
    assert not copy.calls()


def test_a_venv_that_was_moved_is_made_anew(copy):
    copy.run()
    copy.calls()
    copy.root = copy.root.rename(copy.root.with_name("moved"))
    assert copy.run().returncode == 0
    assert copy.calls()[0][1] == ["-m", "venv", "--clear", str(copy.root / ".venv")]


def test_a_linked_venv_is_never_emptied(copy):
    (copy.root / ".venv").symlink_to(copy.elsewhere)
    assert_refused(copy.run(), ".venv is a link")
    assert not copy.calls()


def test_a_failed_installation_shows_why_and_is_taken_up_again(copy):
    failed = copy.run("test", FAIL_ON="--editable")
    assert failed.returncode == 2
    assert "the index is on fire" in failed.stderr
    assert "pip failed" in failed.stderr.splitlines()[-1]
    assert ["-m", "pytest"] not in [words[:2] for _, words in copy.calls()]
    assert copy.run().returncode == 0
    assert copy.installed()[-1][-1] == ".[dev]"


def test_the_venv_keeps_its_python_unless_another_is_asked_for(copy):
    copy.run()
    copy.calls()
    for name in NAMES:
        copy.stand_in(name, "3.12")
    assert copy.run().returncode == 0
    assert not copy.calls()
    replaced = copy.run(PYTHON="python3.12")
    assert "Python 3.12 in place of Python 3.11" in replaced.stdout
    assert copy.calls()[0][1][:3] == ["-m", "venv", "--clear"]


def test_the_torch_index_serves_torch_alone(copy):
    copy.run(LINGUA_TOPK_TORCH_INDEX="https://example.org/cpu")
    with_index = [words for words in copy.installed() if "--index-url" in words]
    assert [words[-4:] for words in with_index] == [
        ["--index-url", "https://example.org/cpu", "--no-deps", "torch"]
    ]


@pytest.mark.parametrize(
    ("command", "module"), [("test", "pytest"), ("quickstart", "apps.topk.quickstart")]
)
def test_a_command_runs_from_the_root_with_its_arguments_and_status(copy, command, module):
    result = copy.run(command, "steps=2", "a b", cwd=copy.elsewhere, STATUS="7")
    assert result.returncode == 7
    folder, words = copy.calls()[-1]
    assert folder == str(copy.root)
    assert words[:2] == ["-m", module]
    assert words[-2:] == ["steps=2", "a b"]


def checkout(folder):
    """What is recognised as a checkout of Meta Lingua."""
    for mark in ("lingua/transformer.py", "apps/main/train.py"):
        (folder / mark).parent.mkdir(parents=True)
        (folder / mark).touch()
    return folder


def test_lingua_links_our_folder_into_a_checkout_and_installs_what_it_imports(copy):
    lingua = checkout(copy.elsewhere / "a checkout")
    for _ in range(2):  # the second time all is there
        result = copy.run("lingua", "a checkout", cwd=copy.elsewhere)
        assert result.returncode == 0, result.stderr
        assert f"LINGUA_HOME={lingua}" in result.stdout
        for part in ("apps/topk", "lingua_topk"):
            assert (lingua / part).readlink() == copy.root / part
    assert [words[-1] for words in copy.installed()] == ["setuptools", "torch", ".[lingua]"]


@pytest.mark.parametrize("arguments", [[], ["nowhere"], ["a", "b"]])
def test_lingua_without_one_folder_is_refused(copy, arguments):
    assert_refused(copy.run("lingua", *arguments, cwd=copy.elsewhere), "./setup.sh lingua DIR")


def test_what_is_no_checkout_is_refused_before_anything_is_installed(copy):
    assert_refused(copy.run("lingua", str(copy.elsewhere)), "it has no lingua/transformer.py")
    assert not copy.calls()


@pytest.mark.parametrize("part", ["apps/topk", "lingua_topk"])
@pytest.mark.parametrize("kind", ["folder", "link"])
def test_what_is_in_the_place_of_a_link_stays(copy, kind, part):
    place = checkout(copy.elsewhere / "checkout") / part
    place.mkdir() if kind == "folder" else place.symlink_to("/nowhere")
    assert_refused(copy.run("lingua", str(copy.elsewhere / "checkout")), "is there already")
    assert not copy.calls()


def test_ci_runs_the_test_command_and_passes_its_status_on(tmp_path):
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci" / "run")
    executable(tmp_path / "setup.sh", '#!/usr/bin/env bash\necho "$PWD $*"\nexit 5\n')
    (tmp_path / "bin").mkdir()
    executable(tmp_path / "bin" / "chromium", "#!/bin/sh\n")  # or it would install a browser
    result = subprocess.run(
        ["bash", tmp_path / ".ci" / "run"], cwd="/", capture_output=True, text=True,
        env={**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"},
    )  # fmt: skip
    assert result.stdout.split() == [str(tmp_path), "test"]
    assert result.returncode == 5
