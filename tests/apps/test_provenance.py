"""Which source a result says that it was made with."""

import subprocess

import pytest

from apps.topk import provenance


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    (tmp_path / "apps").mkdir()
    (tmp_path / "apps/one.py").write_text("1\n")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", "apps")
    git(tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "-m", "one")
    return tmp_path


def git(folder, *words):
    return subprocess.run(
        ["git", "-C", folder, *words], check=True, capture_output=True, text=True
    ).stdout.strip()


def commit():
    return provenance.provenance()["commit"]


def test_the_commit_is_named(root):
    assert commit() == git(root, "rev-parse", "HEAD")
    (root / "notes.txt").write_text("what is not code does not count\n")
    assert not commit().endswith("-dirty")


@pytest.mark.parametrize("name", ["one.py", "two.py"])
def test_code_that_is_not_in_the_commit_is_told(root, name):
    """A changed file, and a new one."""
    (root / "apps" / name).write_text("2\n")
    assert commit() == git(root, "rev-parse", "HEAD") + "-dirty"


def test_without_git_there_is_none(root):
    (root / ".git").rename(root / "elsewhere")
    assert commit() is None


def test_a_copy_says_what_it_was_copied_from(root):
    (root / ".commit").write_text("abc\n")
    assert commit() == "abc"
