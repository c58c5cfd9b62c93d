"""Two programs that want to write one folder: the second is refused, and changes nothing."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from types import SimpleNamespace

import pytest

import apps.main.train as host
from apps.topk import analyze, cli, lingua_host, trace
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


def test_checkpoints_within_a_run_are_not_given_to_another(tmp_path):
    def take(stack, run, checkpoints):
        for field, folder in _lock.folders_of_run(str(tmp_path / run), str(tmp_path / checkpoints)):
            stack.enter_context(held(folder, field))

    with ExitStack() as first:
        take(first, "a", "a/checkpoints")
        for run, checkpoints, field in (
            ("b", "a/checkpoints", "checkpoint.path"),
            ("a/checkpoints/c", "a/checkpoints", "checkpoint.path"),
            ("a", "b", "dump_dir"),
        ):
            with ExitStack() as second, pytest.raises(_lock.ConfigError, match=f"{field}=.* is"):
                take(second, run, checkpoints)
        with ExitStack() as second:
            take(second, "b", "b")  # in one folder with all else
    assert not list(tmp_path.iterdir())


def test_without_locks_it_is_said_and_gone_on(corpus, tmp_path, monkeypatch):
    def no_locks(descriptor, flags):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert start(corpus, tmp_path / "run", "steps=1") == 0
    log = (tmp_path / "run/train.log").read_text(encoding="utf-8")
    assert "cannot be locked (No locks available): that no other program writes there" in log


def link(path, target):
    target.write_text("mine", encoding="utf-8")
    path.symlink_to(target)


@pytest.mark.parametrize("make", [
    link,
    lambda path, target: path.symlink_to(target),  # which is not there
    lambda path, target: os.mkfifo(path),
    lambda path, target: path.mkdir(),
    lambda path, target: path.write_text("mine", encoding="utf-8"),
], ids=["link", "link to nothing", "pipe", "folder", "file"])  # fmt: skip
def test_what_somebody_else_has_put_in_its_place_is_left_alone(tmp_path, make):
    (tmp_path / "out").mkdir()
    path, target = tmp_path / "out" / _lock.NAME, tmp_path / "target"
    make(path, target)

    def state():
        read = {one: one.read_text(encoding="utf-8") for one in (path, target) if one.is_file()}
        return path.lstat(), target.exists(), read

    before = state()
    with held(tmp_path / "out", "out") as note:
        assert "/out cannot be locked (" in note
    after = state()
    assert after[0].st_mode == before[0].st_mode and after[0].st_ino == before[0].st_ino
    assert after[1:] == before[1:]


@pytest.mark.parametrize("folder", ["file", "file/run", "loop"])
def test_of_a_folder_that_cannot_be_written_the_writer_tells(tmp_path, folder):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with held(tmp_path / folder, "out") as note:
        assert note is None
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


def test_an_error_within_came_of_nothing_else(tmp_path):
    (tmp_path / _lock.NAME).mkdir()
    with pytest.raises(ZeroDivisionError) as raised, held(tmp_path, "out"):
        raise ZeroDivisionError
    assert raised.value.__context__ is None


@pytest.mark.parametrize("job, restarts, gone_after, waits", [
    ("7", "1", 60, True),  # what a node that failed has left
    ("7", "1", None, True),  # it never goes
    ("7", "0", 60, False), ("8", "1", 60, False), ("7", "", 60, False), ("7", "x", 60, False),
])  # fmt: skip
def test_a_job_that_was_started_again_waits_for_its_own_lock(
    tmp_path, monkeypatch, caplog, job, restarts, gone_after, waits
):
    path = tmp_path / _lock.NAME
    path.write_text(json.dumps({"process": 1, "machine": "node", "job": "7"}), encoding="utf-8")
    monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    dead = os.open(path, os.O_RDWR)
    fcntl.flock(dead, fcntl.LOCK_EX)
    now, slept = [1000.0], []

    def sleep(seconds):
        now[0] += seconds
        slept.append(seconds)
        if gone_after is not None and sum(slept) >= gone_after:
            fcntl.flock(dead, fcntl.LOCK_UN)

    monkeypatch.setattr(_lock, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    try:
        if waits and gone_after:
            with held(tmp_path, "dump_dir") as note:
                assert note is None
            assert gone_after <= sum(slept) <= gone_after + _lock.PAUSE
        else:
            with (
                pytest.raises(_lock.ConfigError, match=r"\(process 1 on node of SLURM job 7\)"),
                held(tmp_path, "dump_dir"),
            ):
                pass
            assert sum(slept) == (_lock.PATIENCE if waits else 0)
    finally:
        os.close(dead)
    assert caplog.text.count("waiting for at most 180 s") == waits


@pytest.mark.parametrize("run, restarts, waits", [
    ("mine", "1", True), ("mine", "0", False), ("another", "1", False), ("none", "1", False),
])  # fmt: skip
def test_so_does_what_torchrun_started_again(tmp_path, monkeypatch, run, restarts, waits):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none" if run == "none" else "mine")
    with held(tmp_path, "dump_dir"):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", run)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
        assert _lock._is_of_earlier_start(tmp_path / _lock.NAME) is waits


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
    monkeypatch.setattr(
        host, "dump_config", lambda *args, **kwargs: written.append(args), raising=False
    )
    args = TopKTrainArgs(dump_dir=str(tmp_path / "run"))
    with install(args) as module:
        module.dump_config({}, tmp_path / "run/config.yaml")
        assert (tmp_path / "run" / _lock.NAME).exists() and len(written) == 1
    assert not (tmp_path / "run").exists()
    other(tmp_path / "run")
    with install(args) as module, pytest.raises(_lock.ConfigError, match=r"dump_dir=.* is being"):
        module.dump_config({}, tmp_path / "run/config.yaml")
    assert len(written) == 1
    args = TopKTrainArgs(dump_dir=str(tmp_path / "new"))
    args.checkpoint.path = str(tmp_path / "run")  # not in the dump_dir
    with install(args) as module, pytest.raises(_lock.ConfigError, match=r"checkpoint\.path=.* is"):
        module.dump_config({}, tmp_path / "new/config.yaml")
    assert len(written) == 1 and not (tmp_path / "new").exists()


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
    tracing = ["--ckpts", str(trained), "--out", f"{tmp_path}/out", "--device", "cpu"]
    other(tmp_path / "out")
    for field, program in (
        ("dump_dir", lambda: eval_module.launch_eval(args)),
        ("out", lambda: analyze.main([*analysis, "--tokens", "500", "--quiet"])),
        ("out", lambda: trace.main([*tracing, "--tokens", "500"])),
    ):
        capfd.readouterr()
        assert status_of(program) == 2
        (line,) = errors(capfd.readouterr().err)
        assert f"{field}={tmp_path}/out is being written by another program" in line
        assert [path.name for path in (tmp_path / "out").iterdir()] == [_lock.NAME]
