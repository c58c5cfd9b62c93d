"""The operator's benchmark: what it writes, and that nothing incorrect is timed."""

import csv

import pytest
import torch

from apps.bench import operator
from lingua_topk.errors import ConfigError
from lingua_topk.ops import backends


def run(*arguments: str) -> None:
    operator.main(["--rows=8", "--width=32", "--k=5", "--repeats=2", *arguments])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_a_row_for_each_and_each_direction(monkeypatch, tmp_path, dtype, alpha):
    monkeypatch.setattr(operator, "RESULTS", tmp_path)
    run("--save", f"--dtype={dtype}", f"--alpha={alpha}")
    rows = list(csv.DictReader((tmp_path / "operator.csv").open(encoding="utf-8")))
    names = ["topk + mask", "topk + scatter", "plain", "cpu"]
    assert [row["what"] for row in rows] == names * 2
    assert [row["direction"] for row in rows] == ["forward"] * 4 + ["forward+backward"] * 4
    assert {row["commit"] for row in rows} and {row["torch"] for row in rows} == {torch.__version__}
    assert all(row["microseconds"] == "" for row in rows)  # of a GPU only
    assert all(float(row["ratio"]) > 0 for row in rows)
    assert {row["ratio"] for row in rows if row["what"] == "topk + mask"} == {"1.0"}


@pytest.mark.parametrize("wrong", ["y", "gradient"])
def test_a_backend_that_is_not_correct_is_not_reported(monkeypatch, tmp_path, wrong):
    right = backends.CPU.topk_sum

    def broken(h, update, k, alpha, activation):
        y = right(h, update, k, alpha, activation)
        return y * (1 + 1e-6) if wrong == "y" else y.detach() + 0 * (h + update)

    monkeypatch.setattr(operator, "RESULTS", tmp_path)
    monkeypatch.setattr(backends, "CPU", backends.Backend("cpu", backends.CPU.topk, broken))
    with pytest.raises(RuntimeError, match=r"backend cpu: .* is not the definition's"):
        run("--save")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--device=tpu", "device='tpu' is not known: choose cpu or cuda"),
        ("--dtype=int8", "dtype='int8' is not known"),
        ("--k=0", "k=0, repeats=30: give at least one row"),
        ("--repeats=0", "repeats=0: give at least one row"),
    ],
)
def test_refused_arguments(argument, message):
    with pytest.raises(ConfigError, match=message):
        operator.main([argument])
