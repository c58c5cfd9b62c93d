"""lingua_topk.host: which host is chosen, and that nothing else can take its place."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lingua_topk import host
from lingua_topk.errors import HostError
from lingua_topk.host import EMBEDDED_ROOT, Host

ROOT = Path(__file__).resolve().parents[1]


def make_checkout(root: Path) -> Path:
    """What counts as a checkout of Lingua, each module with its own path in `where`."""
    for name in ("lingua/__init__", "lingua/transformer", "apps/__init__", "apps/main/__init__"):
        path = root / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("where = __file__\n")
    (root / "apps/main/train.py").write_text("from lingua.transformer import where\n")
    return root.resolve()


def git(folder: Path, *command: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    done = subprocess.run(
        ["git", *identity, *command], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path):
    return make_checkout(tmp_path / "checkout")


@pytest.fixture
def elsewhere(tmp_path):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    return folder


EMBEDDED = Host("embedded", EMBEDDED_ROOT)


def test_without_a_checkout_it_is_the_embedded_host(elsewhere):
    for environ in ({}, {"LINGUA_TOPK_HOST": ""}, {"LINGUA_TOPK_HOST": "auto", "LINGUA_HOME": ""}):
        assert host.choose(environ, elsewhere) == EMBEDDED
    assert EMBEDDED.describe() == "embedded host"


@pytest.mark.parametrize("wanted", [{}, {"LINGUA_TOPK_HOST": "lingua"}])
def test_lingua_home_or_the_working_directory_names_a_checkout(checkout, elsewhere, wanted):
    expected = Host("lingua", checkout)
    assert host.choose({**wanted, "LINGUA_HOME": str(checkout)}, elsewhere) == expected
    assert host.choose(wanted, checkout) == expected
    assert host.choose({**wanted, "LINGUA_HOME": "../checkout"}, elsewhere) == expected
    assert expected.describe() == f"Meta Lingua at {checkout}, commit unknown"


def test_lingua_home_comes_before_the_working_directory(checkout, tmp_path):
    other = make_checkout(tmp_path / "other")
    assert host.choose({"LINGUA_HOME": str(checkout)}, other).root == checkout


def test_embedded_is_embedded_wherever_there_is_a_checkout(checkout):
    environ = {"LINGUA_TOPK_HOST": "embedded", "LINGUA_HOME": str(checkout)}
    assert host.choose(environ, checkout) == EMBEDDED
    assert host.choose({**environ, "LINGUA_HOME": "/nowhere"}, checkout) == EMBEDDED


def test_the_folder_of_the_embedded_host_is_no_checkout():
    assert host.choose({}, EMBEDDED_ROOT) == EMBEDDED
    with pytest.raises(HostError, match="is the embedded host, not a checkout"):
        host.choose({"LINGUA_HOME": str(EMBEDDED_ROOT)}, ROOT)


def test_a_commit_is_the_checkouts_own(checkout, elsewhere):
    environ = {"LINGUA_HOME": str(checkout)}
    git(checkout.parent, "init", "-q")
    git(checkout.parent, "commit", "-q", "--allow-empty", "-m", "another project around it")
    assert host.choose(environ, elsewhere).commit is None
    git(checkout, "init", "-q")
    git(checkout, "commit", "-q", "--allow-empty", "-m", "c")
    chosen = host.choose(environ, elsewhere)
    assert chosen.commit == git(checkout, "rev-parse", "HEAD")
    assert chosen.describe() == f"Meta Lingua at {checkout}, commit {chosen.commit}"


def test_an_unknown_choice_lists_the_allowed_ones(elsewhere):
    with pytest.raises(HostError, match=r"LINGUA_TOPK_HOST='meta' .* auto, lingua, embedded"):
        host.choose({"LINGUA_TOPK_HOST": "meta"}, elsewhere)


def test_forcing_lingua_without_one_says_what_was_looked_for_and_where(elsewhere):
    with pytest.raises(HostError) as caught:
        host.choose({"LINGUA_TOPK_HOST": "lingua"}, elsewhere)
    for part in (
        "LINGUA_TOPK_HOST=lingua",
        "LINGUA_HOME is not set",
        str(elsewhere),
        "lingua/transformer.py",
        "apps/main/train.py",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize("wanted", ["auto", "lingua"])
def test_a_wrong_lingua_home_is_an_error_that_says_what_is_missing(checkout, elsewhere, wanted):
    (checkout / "apps/main/train.py").unlink()
    for home, missing in (
        (str(checkout), "apps/main/train.py not found in"),
        (str(elsewhere), "lingua/transformer.py, apps/main/train.py not found in"),
        ("/nowhere", "lingua/transformer.py, apps/main/train.py not found in /nowhere"),
    ):
        with pytest.raises(HostError, match=missing) as caught:
            host.choose({"LINGUA_TOPK_HOST": wanted, "LINGUA_HOME": home}, checkout)
        assert f"LINGUA_HOME={home!r}" in str(caught.value)


def job(folder: Path, dump_dir: str) -> tuple[dict[str, str], Path]:
    """The environment and the working directory of a job that stool submitted from `folder`."""
    code = folder / dump_dir / "code"
    code.mkdir(parents=True)
    return {"LAUNCH_WITH": "SBATCH", "DUMP_DIR": dump_dir, "OLDPWD": str(folder)}, code


@pytest.mark.parametrize("absolute", [True, False])
def test_a_job_knows_where_it_was_submitted(tmp_path, elsewhere, absolute):
    environ, code = job(elsewhere, str(tmp_path / "run") if absolute else "runs/first")
    assert host.submitted_from(environ, code) == elsewhere
    assert host.submitted_from(environ, elsewhere) is None  # code was not copied, or left already
    for name in environ:
        assert host.submitted_from({**environ, name: ""}, code) is None


def test_in_a_job_lingua_home_is_relative_to_where_it_was_submitted(checkout, elsewhere):
    environ, code = job(elsewhere, "runs/first")
    assert host.choose({**environ, "LINGUA_HOME": "../checkout"}, code).root == checkout
    assert host.choose(environ, code) == EMBEDDED


def test_a_job_finds_the_checkout_that_was_copied(checkout):
    environ, code = job(checkout, "runs/first")
    assert host.choose(environ, make_checkout(code)).root == code


LEAVE = """
import os, subprocess
from lingua_topk import host
host.bind([])
host.leave_copied_code()
host.leave_copied_code()
print(os.getcwd(), host.bound().root, flush=True)
program = "from lingua_topk import host; print(host.choose().root)"
subprocess.run([sys.executable, "-c", program], check=True)
"""


def test_a_job_goes_back_and_its_children_keep_the_host(checkout):
    """The checkout that it was submitted from is not what the job runs on."""
    environ, code = job(checkout, "runs/first")
    make_checkout(code)
    done = python(LEAVE, code, **environ)
    assert done.stdout.split() == [str(checkout), str(code), str(code)], done.stderr


# The package without its `__init__`, which imports torch: `host` needs nothing of it.
WITHOUT_TORCH = f"""
import sys, types
sys.modules["lingua_topk"] = types.ModuleType("lingua_topk")
sys.modules["lingua_topk"].__path__ = [{str(ROOT / "lingua_topk")!r}]
"""


def python(program: str, folder: Path, *path: Path, **environ: str) -> subprocess.CompletedProcess:
    """Run a program with `path` on sys.path, before our root."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("LINGUA_") and k != "RANK"}
    search = os.pathsep.join(map(str, [*path, ROOT]))
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH + program],
        cwd=folder,
        env={**clean, "PYTHONPATH": search, **environ},
        capture_output=True,
        text=True,
        timeout=60,
    )


ORIGINS = """
import apps
from importlib.util import find_spec
for name in ("lingua", "lingua.transformer", "apps.main", "apps.main.train", "apps.topk", "apps"):
    print(find_spec(name).origin)
"""


def origins(*args, **environ) -> list[str]:
    done = python(ORIGINS, *args, **environ)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def expected_origins(root: Path) -> list[str]:
    of_host = (
        "lingua/__init__.py",
        "lingua/transformer.py",
        "apps/main/__init__.py",
        "apps/main/train.py",
    )
    ours = ("apps/topk/__init__.py", "apps/__init__.py")
    return [*(str(root / name) for name in of_host), *(str(ROOT / name) for name in ours)]


def test_what_is_imported_is_the_chosen_checkout_and_our_applications(checkout, elsewhere):
    found = origins(elsewhere, LINGUA_HOME=str(checkout))
    assert found == expected_origins(checkout)


def test_a_package_called_lingua_earlier_on_the_path_does_not_hide_the_host(checkout, elsewhere):
    (elsewhere / "lingua").mkdir()
    (elsewhere / "lingua/__init__.py").write_text("raise ImportError('the unrelated package')\n")
    assert origins(elsewhere, elsewhere) == expected_origins(EMBEDDED_ROOT)
    found = origins(elsewhere, elsewhere, LINGUA_HOME=str(checkout))
    assert found == expected_origins(checkout)


def test_the_embedded_host_is_not_mixed_with_a_checkout_on_the_path(checkout, elsewhere):
    program = f"sys.path.append({str(checkout)!r}); {ORIGINS.lstrip()}"
    done = python(program, elsewhere, LINGUA_TOPK_HOST="embedded", LINGUA_HOME=str(checkout))
    assert done.stdout.splitlines() == expected_origins(EMBEDDED_ROOT), done.stderr


def test_an_unrelated_lingua_that_is_imported_already_is_an_error(elsewhere):
    (elsewhere / "lingua.py").write_text("")
    done = python("import lingua, apps", elsewhere)
    assert done.returncode == 2
    assert "a package called lingua is already imported" in done.stderr
    assert "import apps before it" in done.stderr


def test_a_users_mistake_ends_the_import_in_one_line_on_the_first_process(elsewhere):
    program = "import apps"
    done = python(program, elsewhere, LINGUA_HOME="/nowhere")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: LINGUA_HOME='/nowhere' is not a checkout")
    done = python(program, elsewhere, LINGUA_HOME="/nowhere", RANK="1")
    assert (done.returncode, done.stderr) == (2, "")


def test_binding_again_changes_nothing_and_another_host_is_refused(checkout):
    import apps
    import lingua

    bound, path, module = host.bound(), list(apps.__path__), sys.modules["lingua"]
    assert bound == EMBEDDED
    assert host.bind(apps.__path__) == host.bind(apps.__path__, EMBEDDED) == bound
    with pytest.raises(HostError, match="already runs on the embedded host; Meta Lingua at"):
        host.bind(apps.__path__, Host("lingua", checkout))
    assert host.bound() is not None and host.bound() == bound
    assert list(apps.__path__) == path
    assert path.count(str(EMBEDDED_ROOT / "apps")) == 1
    assert sys.modules["lingua"] is module is lingua


def test_a_refused_binding_leaves_everything_as_it_was(checkout, monkeypatch):
    monkeypatch.setattr(host, "_bound", None)
    path = ["ours"]
    with pytest.raises(HostError, match="already imported from"):
        host.bind(path, Host("lingua", checkout))
    assert path == ["ours"]
    assert host.bound() is None


def test_a_host_reached_through_a_link_is_bound_twice_without_complaint(checkout, elsewhere):
    (checkout / "lingua").rename(elsewhere / "lingua")
    (checkout / "lingua").symlink_to(elsewhere / "lingua")
    program = (
        "import apps; from lingua_topk import host; host.bind(apps.__path__); print(host.bound())"
    )
    done = python(program, elsewhere, LINGUA_HOME=str(checkout))
    assert str(checkout) in done.stdout, done.stderr
