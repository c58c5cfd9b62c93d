"""The benchmark of starting: what it starts, and what it writes."""

import csv

import pytest

from apps.bench import startup
from lingua_topk.errors import ConfigError, DataError


@pytest.fixture
def results(monkeypatch, tmp_path):
    monkeypatch.setattr(startup, "RESULTS", tmp_path)
    return tmp_path


def commands(apps: str = "") -> dict[str, list[str]]:
    """Commands that start fast: without torch, and an application that answers at once."""
    assert apps == "export"
    return {
        startup.BASE: ["-c", "pass"],
        "import lingua_topk": ["-c", "import lingua_topk.errors"],
        "export --help": ["-c", "print('usage')"],
    }


def test_a_row_for_each(monkeypatch, results):
    monkeypatch.setattr(startup, "_commands", commands)
    startup.main(["--repeats=2", "--apps=export", "--save"])
    rows = list(csv.DictReader((results / "startup.csv").open(encoding="utf-8")))
    assert [row["what"] for row in rows] == [*commands("export")]
    assert float(rows[0]["over_torch"]) == 0 and float(rows[0]["time_ratio"]) == 1
    assert all(float(row["seconds"]) > 0 and row["repeats"] == "2" for row in rows)


def test_the_first_turn_is_not_counted_and_the_base_is_that_of_the_turn(monkeypatch, results):
    found = iter([100.0, 100.0, 1.0, 3.0, 2.0, 5.0, 1.0, 3.5])
    monkeypatch.setattr(startup, "_commands", lambda apps: {"import torch": [], "x": []})
    monkeypatch.setattr(startup, "_seconds", lambda command: next(found))
    row = startup.measure(repeats=3)[1]
    assert (row["seconds"], row["over_torch"], row["time_ratio"]) == (3.5, 2.5, 3.0)
    assert (row["over_torch_p10"], row["over_torch_p90"]) == (2.1, 2.9)


def test_every_application_is_started():
    assert {"train", "eval", "steer", "prepare", "quickstart"} <= set(startup.applications())
    assert "cli" not in startup.applications()
    assert startup._commands("")["train --help"] == ["-m", "apps.topk.train", "--help"]


def test_what_fails_is_not_timed():
    with pytest.raises(DataError, match=r"python -c 1/0 failed: .*ZeroDivisionError"):
        startup._seconds(["-c", "1/0"])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--repeats=0", "repeats=0 is too small: give at least 1"),
        ("--apps=trian", "apps: 'trian' is not known: choose of analyze,"),
    ],
)
def test_refused_arguments(argument, message):
    with pytest.raises(ConfigError, match=message):
        startup.main([argument])
