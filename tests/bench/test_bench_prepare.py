"""The benchmark of prepare measures a run and keeps it when asked to."""

import csv
import json

import pytest

from apps.bench import prepare as bench
from lingua_topk.errors import DataError


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": f"number {number % 90}"}) + "\n" for number in range(100)]
    path.write_text("".join(lines))
    return path


def test_a_row(source, tmp_path, monkeypatch, capsys):
    results = tmp_path / "results" / "prepare.csv"
    monkeypatch.setattr(bench, "RESULTS", results)
    row = bench.measure(source=str(source), vocab_size=0)
    assert row["documents"] == 100
    assert row["documents_a_second"] > 0
    assert row["peak_mb"] > 0.9 * row["start_mb"] > 10
    assert "documents_a_second" in capsys.readouterr().out
    assert not results.exists()


def test_rows_are_appended(tmp_path):
    results = tmp_path / "results" / "prepare.csv"
    for documents in (1, 2):
        bench.append(results, {"date": "today", "documents": documents})
    with open(results, newline="") as file:
        assert [row["documents"] for row in csv.DictReader(file)] == ["1", "2"]


def test_a_run_that_fails(tmp_path):
    with pytest.raises(DataError, match="prepare failed: error: source='no/such' is neither"):
        bench.measure(source="no/such")
