"""Two programs that want to write one folder: the second is refused, and changes nothing."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time

import pytest

import apps.main.train as host
from apps.topk import analyze, cli, lingua_host
from apps.topk import eval as eval_module
from apps.topk.model import TopKTrainArgs
from apps.topk.seam import install
from lingua_topk._host.lingua import _lock
from lingua_topk._host.lingua._lock import held
from tests.faults.runs import errors, start, status_of

HOLD = """
import sys, time
from pathlib import Path
from lingua_topk._host.lingua._lock import held
with held(Path(sys.argv[1]), "dump_dir"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def other():
    """Call it with a folder for another process that holds it."""
    started = []

    def hold(folder):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in started:
        process.kill()
        process.wait()


def contents(folder):
    """Everything in it, but what the first has written there."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_second_start_is_refused_until_the_first_has_ended(corpus, tmp_path, other, capfd):
    folder = tmp_path / "run"
    assert start(corpus, folder, "steps=1") == 0
    first = other(folder)
    before = contents(folder)
    for steps in (1, 2):  # a run that is finished, and one that is not
        capfd.readouterr()
        assert start(corpus, folder, f"steps={steps}") == 2
        (line,) = errors(capfd.readouterr().err)
        assert f"dump_dir={folder} is being written by another program (process {first.pid} on" in (
            line
        )
        assert "wait for its end or stop it, or give another folder" in line
    assert contents(folder) == before
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert (folder / _lock.NAME).exists()  # what it left is no lock
    assert start(corpus, folder, "steps=2") == 0
    assert not (folder / _lock.NAME).exists()


def test_checkpoints_elsewhere_are_one_runs_too(corpus, tmp_path, other, capfd):
    other(tmp_path / "checkpoints")
    elsewhere = f"checkpoint.path={tmp_path}/checkpoints"
    assert start(corpus, tmp_path / "run", "steps=1", elsewhere) == 2
    (line,) = errors(capfd.readouterr().err)
    assert line.startswith(f"error: checkpoint.path={tmp_path}/checkpoints is being written by")
    assert not (tmp_path / "run").exists()


def test_without_locks_it_is_said_and_gone_on(corpus, tmp_path, monkeypatch):
    def no_locks(descriptor, flags):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert start(corpus, tmp_path / "run", "steps=1") == 0
    log = (tmp_path / "run/train.log").read_text(encoding="utf-8")
    assert "cannot be locked (No locks available): that no other program writes there" in log


def test_a_lock_is_given_back_by_an_error_and_a_new_folder_with_it(tmp_path):
    with pytest.raises(ZeroDivisionError), held(tmp_path / "a/b", "out"):
        assert (tmp_path / "a/b" / _lock.NAME).is_file()
        raise ZeroDivisionError
    assert not (tmp_path / "a/b").exists()
    (tmp_path / "a/b").mkdir()
    with held(tmp_path / "a/b", "out"):
        pass
    assert (tmp_path / "a/b").is_dir() and not list((tmp_path / "a/b").iterdir())


def test_a_child_does_not_hold_what_its_parent_holds(tmp_path):
    """A data loader that outlives a killed run would refuse the next one."""
    reader, writer = os.pipe()
    parent = os.fork()
    if not parent:
        with held(tmp_path, "out"):
            child = os.fork()
            if not child:
                time.sleep(600)
            os.write(writer, str(child).encode())
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(parent, 0)
    child = int(os.read(reader, 20))
    try:
        with held(tmp_path, "out") as note:
            assert note is None
    finally:
        os.kill(child, signal.SIGKILL)


def test_many_that_come_and_go_are_never_two_at_once(tmp_path):
    """Each removes its file at its end, and the next may have opened it just before."""
    (tmp_path / "folder").mkdir()
    children = []
    for _ in range(4):
        child = os.fork()
        if not child:
            os._exit(_come_and_go(tmp_path))
        children.append(child)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert statuses == [0, 0, 0, 0]


def _come_and_go(root):
    until = time.monotonic() + 1
    while time.monotonic() < until:
        try:
            with held(root / "folder", "out"):
                os.close(os.open(root / "inside", os.O_CREAT | os.O_EXCL))  # fails for a second one
                os.unlink(root / "inside")
        except _lock.ConfigError:
            continue
        except FileExistsError:
            return 1
    return 0


def test_in_linguas_loop_the_first_write_takes_the_folder(tmp_path, other, monkeypatch):
    written = []
    monkeypatch.setattr(lingua_host, "is_lingua", lambda: True)
    monkeypatch.setattr(host, "dump_config", lambda *args, **kwargs: written.append(args))
    args = TopKTrainArgs(dump_dir=str(tmp_path / "run"))
    with install(args) as module:
        module.dump_config({}, tmp_path / "run/config.yaml")
        assert (tmp_path / "run" / _lock.NAME).exists() and len(written) == 1
    assert not (tmp_path / "run").exists()
    other(tmp_path / "run")
    with install(args) as module, pytest.raises(_lock.ConfigError, match=r"dump_dir=.* is being"):
        module.dump_config({}, tmp_path / "run/config.yaml")
    assert len(written) == 1


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert start(corpus, folder) == 0
    return folder


def test_other_programs_are_refused_too(trained, tmp_path, other, capfd):
    """Before they write anything."""
    checkpoint = trained / "checkpoints/0000000004"
    config = tmp_path / "eval.yaml"
    config.write_text("validation: {context: 8}\n", encoding="utf-8")
    evaluation = ["config=" + str(config), f"ckpt_dir={checkpoint}", f"dump_dir={tmp_path}/out"]
    args = cli.merge(eval_module.EvalArgs, (cli.dot_list(evaluation[1:]), "here"))
    analysis = ["--ckpt", str(checkpoint), "--out", f"{tmp_path}/out", "--device", "cpu"]
    other(tmp_path / "out")
    for field, program in (
        ("dump_dir", lambda: eval_module.launch_eval(args)),
        ("out", lambda: analyze.main([*analysis, "--tokens", "500", "--quiet"])),
    ):
        capfd.readouterr()
        assert status_of(program) == 2
        (line,) = errors(capfd.readouterr().err)
        assert f"{field}={tmp_path}/out is being written by another program" in line
        assert [path.name for path in (tmp_path / "out").iterdir()] == [_lock.NAME]
