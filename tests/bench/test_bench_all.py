"""All benchmarks in one: red tests and failures stop what they concern, and nothing else."""

import importlib
import inspect
import time
from pathlib import Path

import pytest

from apps.bench import all as bench
from apps.topk.provenance import ROOT
from lingua_topk.errors import ConfigError


@pytest.fixture
def ran(monkeypatch, tmp_path):
    """Replaces jobs and tests by small ones; the names of what ran, in order."""
    log = tmp_path / "log"
    red, green = tmp_path / "test_red.py", tmp_path / "test_green.py"
    red.write_text("def test(): assert False\n")
    green.write_text("def test(): pass\n")
    tests = {"operator": (str(red),), "training": (str(green),), "decoding": (), "startup": ()}
    monkeypatch.setattr(bench, "TESTS", tests)

    def job(part: str, name: str, then: str, limit_s: float = 60.0) -> bench.Job:
        code = f"import sys, time; print(*sys.argv[1:], '{name}', file=open({str(log)!r}, 'a'))"
        return bench.Job(part, ("-c", f"{code}; {then}", name), limit_s)

    chosen = [
        job("operator", "not to run", "0"), job("training", "good", "0"),
        job("training", "bad", "sys.exit(3)"), job("decoding", "slow", "time.sleep(60)", 2.0),
        job("startup", "last", "0"),
    ]  # fmt: skip
    monkeypatch.setattr(bench, "jobs", lambda device: chosen)
    return lambda: log.read_text(encoding="utf-8").split("\n")[:-1] if log.exists() else []


def test_the_others_go_on_after_a_failure_and_all_are_listed(ran, capsys):
    failed = bench.measure()
    assert ran() == ["good good", "bad bad", "slow slow", "last last"]
    ends = [line.rpartition(": ")[2] for line in failed]
    assert ends == ["exit status 1", "exit status 1", "exit status 3", "stopped after 2 s"]
    assert failed[0].startswith("tests of operator")
    assert failed[1].endswith("not measured, its tests: exit status 1")
    told = capsys.readouterr().out
    assert "[5/5]" in told and told.index("[5/5]") < told.index("outcome")


@pytest.mark.parametrize("failed", [[], ["training: exit status 3"]])
def test_the_exit_status(monkeypatch, failed):
    monkeypatch.setattr(bench, "_run_all", lambda *_: [(one, one, 1.0) for one in failed])
    if not failed:
        return bench.main([])
    with pytest.raises(SystemExit) as ended:
        bench.main([])
    assert ended.value.code == 1


def test_a_part_alone_and_its_rows_saved(ran):
    assert bench.measure(part="startup", save=True) == []
    assert ran() == ["last --save last"]


def test_what_does_not_fit_into_the_budget_is_left_out(ran):
    failed = bench.measure(part="startup", budget_s=bench.LEAST_SECONDS / 2)
    assert [line.endswith("left out: no time left") for line in failed] == [True]
    assert ran() == []


def test_what_a_stopped_program_has_started_ends_with_it(tmp_path):
    mark = tmp_path / "alive"
    child = f"import time; time.sleep(4); open({str(mark)!r}, 'w')"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert bench._run(("-c", code), 1.5, float("inf")) == "stopped after 2 s"
    time.sleep(4)
    assert not mark.exists()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_programs_know_their_flags(device):
    jobs = bench.jobs(device)
    assert list(dict.fromkeys(job.part for job in jobs)) == list(bench.TESTS)
    for job in jobs:
        flag, module, *arguments = job.arguments
        assert flag == "-m" and module == f"apps.bench.{job.part}"
        if not Path(ROOT, "apps", "bench", f"{job.part}.py").exists():
            continue
        known = inspect.signature(importlib.import_module(module).measure).parameters
        assert {name.removeprefix("--") for name in arguments[::2]} <= set(known)
        assert "save" in known
        values = dict(zip(arguments[::2], arguments[1::2], strict=True))
        assert Path(ROOT, values.get("--config", "")).exists()
    assert all(Path(ROOT, path).exists() for paths in bench.TESTS.values() for path in paths)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--device=tpu", "device='tpu' is not known: choose cpu or cuda"),
        ("--part=operators", "part: 'operators' is not known: choose of operator, training"),
        ("--budget_s=-1", "budget_s=-1 is too small: give seconds, or 0 for no limit"),
    ],
)
def test_refused_arguments(argument, message):
    with pytest.raises(ConfigError, match=message):
        bench.main([argument])
