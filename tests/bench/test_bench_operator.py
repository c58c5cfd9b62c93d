"""The operator's benchmark: what it writes, and that nothing incorrect is timed."""

import csv

import numpy as np
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
    assert [row["what"] for row in rows] == names * 3
    directions = ("forward", "backward", "forward+backward")
    assert [row["direction"] for row in rows] == [name for name in directions for _ in names]
    assert {row["commit"] for row in rows} and {row["torch"] for row in rows} == {torch.__version__}
    assert all(row["microseconds"] == row["of_copy"] == "" for row in rows)  # of a GPU only
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
        ("--values=odd", "values='odd' is not known: choose survivors or normal"),
        ("--k=0", "k=0, repeats=30: give at least one row"),
        ("--repeats=0", "repeats=0: give at least one row"),
    ],
)
def test_refused_arguments(argument, message):
    with pytest.raises(ConfigError, match=message):
        operator.main([argument])


def test_bytes_that_have_to_be_moved():
    h = torch.zeros(4, 32, dtype=torch.bfloat16)  # 256 bytes, and 16 of bits
    expected = {"forward": 3 * 256 + 16, "backward": 2 * 256 + 16, "forward+backward": 5 * 256 + 32}
    assert {name: operator._bytes(h, name, 0.0) for name in expected} == expected
    assert operator._bytes(h, "forward", 0.3) == 3 * 256 + 32


def test_share_of_a_copys_bandwidth():
    seconds = np.array([[4e-6, 1e-6], [4e-6, 2e-6], [4e-6, 1e-6]])
    slow, fast = operator._rows(seconds, ["slow", "fast"], n_bytes=800.0, bandwidth=1e9)
    assert (slow["microseconds"], slow["of_copy"]) == (4.0, 0.2)
    assert (fast["microseconds"], fast["of_copy"], fast["ratio"]) == (1.0, 0.8, 4.0)


def test_a_kernel_of_others_is_a_row_if_it_is_right(monkeypatch, capsys):
    def broken(x, k):
        raise ValueError("k is not a power of two\nand more")

    others = {
        "right": lambda x, k: torch.topk(x, k),
        "wrong": lambda x, k: torch.topk(x, k, largest=False),
        "broken": broken,
    }
    monkeypatch.setattr(operator, "peers", lambda: others)
    h, update = torch.randn(2, 8, 32).unbind()
    found = operator._peers_that_run(_PretendsToBeOnAGPU.of(h), update, 5)
    assert list(found) == ["right"]
    torch.testing.assert_close(found["right"](h, update, 5, 0.0), operator._mask(h, update, 5, 0.0))
    told = capsys.readouterr().err
    assert "wrong is left out: its values are not those of torch.topk" in told
    assert "broken is left out: ValueError: k is not a power of two\n" in told


class _PretendsToBeOnAGPU(torch.Tensor):
    @staticmethod
    def of(x: torch.Tensor) -> torch.Tensor:
        return x.as_subclass(_PretendsToBeOnAGPU)

    @property
    def is_cuda(self) -> bool:
        return True
