"""Programs at the same time: their lines, their failures, their signals."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from apps.topk import side_by_side

ROOT = Path(__file__).resolve().parents[2]
SAYS = "import os, sys; print('one'); print('two'); print(os.environ['OMP_NUM_THREADS'])"
FAILS = "import sys, time; time.sleep(0.5); print('error: no', file=sys.stderr); sys.exit(2)"
WAITS = """
import signal, sys, time
def end(number, frame):
    print("saved", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
print("waiting", flush=True)
time.sleep(60)
"""


@pytest.fixture
def programs(tmp_path, monkeypatch):
    for name, text in {"says": SAYS, "fails": FAILS, "waits": WAITS}.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def test_lines_are_marked_and_cores_divided(programs, capfd):
    side_by_side.run({"a": ["says"], "longer": ["says"]})
    lines = capfd.readouterr().out.splitlines()
    share = max((os.cpu_count() or 1) // 2, 1)
    assert [line for line in lines if line.startswith("a ")] == [
        "a      | one", "a      | two", f"a      | {share}",
    ]  # fmt: skip
    assert [line.partition("| ")[2] for line in lines if line.startswith("longer")] == [
        "one", "two", str(share),
    ]  # fmt: skip


def test_one_that_fails_ends_the_others(programs, capfd):
    start = time.monotonic()
    with pytest.raises(SystemExit) as ended:
        side_by_side.run({"a": ["fails"], "b": ["waits"]})
    assert ended.value.code == 2 and time.monotonic() - start < 30
    said = capfd.readouterr()
    assert "a | error: no" in said.err and "b | saved" in said.out


def test_one_that_fails_can_leave_the_others_alone(programs, capfd):
    failed = side_by_side.statuses({"a": ["says"], "b": ["fails"], "c": ["says"]})
    assert failed == {"b": 2}
    assert capfd.readouterr().out.count("| two") == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_them(programs, number):
    """Ctrl-C goes to the whole group of the terminal, as here."""
    child = subprocess.Popen(
        [sys.executable, "-c", "from apps.topk import side_by_side as s; "
         "s.run({'a': ['waits'], 'b': ['waits']})"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ['PYTHONPATH']}"},
    )  # fmt: skip
    for _ in range(2):
        assert child.stdout.readline().endswith("| waiting\n")
    if number == signal.SIGTERM:
        child.send_signal(number)
    else:
        os.killpg(child.pid, number)
    rest, _ = child.communicate(timeout=60)
    if number == signal.SIGTERM:
        assert rest.count("saved") == 2 and child.returncode == 128 + signal.SIGTERM
    else:
        assert child.returncode != 0
        with pytest.raises(ProcessLookupError):  # none of its group is left
            os.killpg(child.pid, 0)
