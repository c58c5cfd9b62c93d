"""gathered and its Triton kernels beside the dense product, in all dtypes.

test_gathered_interpreted, below, runs this file again under Triton's interpreter.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from lingua_topk.errors import ConfigError
from lingua_topk.ops import gathered as gathered_module
from lingua_topk.ops.gathered import (
    DTYPES,
    GATE,
    gathered,
    gathered_definition,
    gathered_gate,
    gathered_gate_definition,
    pays_off,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_CUDA = torch.cuda.is_available()
NAN, INF = float("nan"), float("inf")
TOLERANCES = {
    torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9,
}  # fmt: skip
# D, O, components that are not zero.
SIZES = ((1, 1, 1), (37, 5, 4), (64, 130, 64), (300, 96, 70))


def case(width, n_outputs, k, dtype, device="cpu"):
    """x [8, D] with rows of any number of components, a NaN and an infinite one; W [D, O]."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, width, generator=generator, dtype=torch.float64)
    kept = torch.rand(8, width, generator=generator).argsort(dim=-1) < k
    x = torch.where(kept, x, 0.0)
    x[1] = 0.0
    x[2] = -0.0
    x[3] = torch.randn(width, generator=generator, dtype=torch.float64)
    x[4, width // 2], x[5, width - 1] = NAN, INF
    x[6, 1:] = 0.0
    weight = torch.randn(width, n_outputs, generator=generator, dtype=torch.float64) / width**0.5
    return x.to(device, dtype), weight.to(device, dtype)


def gate_case(width, n_outputs, k, dtype, device="cpu"):
    """gate [8, F] as x above, x [8, D], w3 [F, D], w2 [F, O]."""
    gate, w2 = case(width, n_outputs, k, dtype, device)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 29, generator=generator, dtype=torch.float64)
    w3 = torch.randn(width, 29, generator=generator, dtype=torch.float64) / 29**0.5
    return gate, x.to(device, dtype), w3.to(device, dtype), w2


def close(actual: Tensor, x: Tensor, weight: Tensor) -> None:
    """The dense product in float64, rounded: whatever the dtype, the sum is taken wide."""
    assert actual.dtype == x.dtype
    close_to(actual, gathered_definition(x.double(), weight.double()), size_of(x, weight))


def gate_close(actual: Tensor, gate: Tensor, x: Tensor, w3: Tensor, w2: Tensor) -> None:
    wide = [one.double() for one in (gate, x, w3, w2)]
    assert actual.dtype == gate.dtype
    up = size_of(x, w3.t())
    size = size_of(gate.nan_to_num(0, 0, 0).abs() * up, w2)
    close_to(actual, gathered_gate_definition(*wide), 4 * size)  # rounded thrice


def size_of(x: Tensor, weight: Tensor) -> Tensor:
    """What the rounding of a sum is relative to."""
    return x.double().nan_to_num(0, 0, 0).abs() @ weight.double().abs()


def close_to(actual: Tensor, expected: Tensor, size: Tensor) -> None:
    error = (actual.double() - expected).abs()
    finite = expected.isfinite()
    assert torch.equal(actual.isfinite(), finite)
    torch.testing.assert_close(
        actual.double()[~finite], expected[~finite], rtol=0, atol=0, equal_nan=True
    )
    assert (error <= TOLERANCES[actual.dtype] * (size + 1e-6))[finite].all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_it_is_the_dense_product(size, dtype):
    x, weight = case(*size, dtype)
    close(gathered(x, weight), x, weight)
    for row in x:
        close(gathered(row[None], weight), row[None], weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_gate_is_the_dense_product(size, dtype):
    gate, x, w3, w2 = gate_case(*size, dtype)
    gate_close(gathered_gate(gate, x, w3, w2), gate, x, w3, w2)
    for one, row in zip(gate, x, strict=True):
        gate_close(gathered_gate(one[None], row[None], w3, w2), one[None], row[None], w3, w2)


def test_shapes_of_gates():
    gate, x, w3, w2 = gate_case(37, 5, 4, torch.float64)
    y = gathered_gate(gate, x, w3, w2)
    assert y[4].isnan().all() and not y[1:3].any()
    assert gathered_gate(gate[:0], x[:0], w3, w2).shape == (0, 5)
    many = gathered_gate(gate[:4].view(2, 2, 37), x[:4].view(2, 2, 29), w3, w2)
    assert torch.equal(many, y[:4].view(2, 2, 5))
    assert torch.equal(gathered_gate(gate[3], x[3], w3, w2), y[3])
    for wrong in ((gate[:4], x, w3, w2), (gate, x, w3[:5], w2), (gate, x, w3, w2.float())):
        with pytest.raises(ConfigError, match=r"gathered|one floating dtype"):
            gathered_gate(*wrong)


def test_shapes():
    x, weight = case(37, 5, 4, torch.float64)
    y = gathered(x, weight)
    assert y[4].isnan().all() and not y[1:3].any()
    assert gathered(x[:0], weight).shape == (0, 5)
    x, y = x[:4], y[:4]
    assert torch.equal(gathered(x.view(2, 2, 37), weight), y.view(2, 2, 5))
    assert torch.equal(gathered(x[3], weight), y[3])
    assert torch.equal(gathered(x.t().contiguous().t(), weight), y)


def test_only_the_rows_that_are_met_are_read():
    x, weight = torch.zeros(2, 8), torch.full((8, 3), NAN)
    x[0, 2], x[1, 5] = 1.0, 2.0
    weight[[2, 5]] = 1.0
    assert gathered(x, weight).tolist() == [[1.0] * 3, [2.0] * 3]


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.ones(2, 3), torch.ones(4, 3), r"x \(2, 3\) and weight \(4, 3\)"),
        (torch.ones(()), torch.ones(1, 3), r"takes \[..., D\] and \[D, O\]"),
        (torch.ones(2, 3), torch.ones(3, 3).double(), "in one floating dtype"),
        (torch.ones(2, 3).long(), torch.ones(3, 3).long(), "in one floating dtype"),
        (torch.ones(2, 3).requires_grad_(), torch.ones(3, 3), "no gradient"),
    ],
)
def test_what_cannot_be(x, weight, message):
    with pytest.raises(ConfigError, match=message) as error:
        gathered(x, weight)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("rows", "width", "found", "expected"),
    [
        (1, 1024, 256, True),
        (1, 1024, 257, False),  # more than a quarter of W
        (4, 1024, 256, True),
        (5, 1024, 205, False),  # more rows of W than there are
        (32, 2048, 64, True),
        (33, 2048, 64, False),
        (1, 128, 4, False),  # small
        (1, 256, 4, True),
    ],
)
def test_where_it_pays(rows, width, found, expected):
    x = torch.zeros(rows, 1, width)
    x[..., :found] = 1.0  # in each row
    assert pays_off(x, 3 * width, 64) is expected
    assert not pays_off(x.to("meta"), 3 * width, 64)  # where nothing gathers


@pytest.mark.parametrize(
    ("rows", "width", "k", "expected"),
    [(1, 1024, 512, True), (1, 1024, 513, False), (16, 2048, 64, True), (17, 2048, 64, False)],
)
def test_where_it_pays_on_a_gpu(monkeypatch, rows, width, k, expected):
    """By what k says: nothing is counted, which would wait for the GPU."""
    monkeypatch.setattr(gathered_module, "_HAS_TRITON", True)
    x = SimpleNamespace(
        shape=(rows, 1, width), numel=lambda: rows * width, dtype=torch.bfloat16, is_cuda=True,
        device=torch.device("cuda"),
    )  # fmt: skip
    assert pays_off(x, 3 * width, k) is expected
    monkeypatch.setattr(gathered_module, "_HAS_TRITON", False)
    assert not pays_off(x, 3 * width, k)


@pytest.mark.parametrize(
    ("rows", "width", "found", "expected"),
    [(1, 4096, 256, True), (1, 4096, 257, False), (17, 4096, 256, False), (1, 1024, 4, False)],
)
def test_where_a_gate_pays(rows, width, found, expected):
    x = torch.zeros(rows, width)
    x[..., :found] = 1.0
    assert pays_off(x, 512, 64, GATE) is expected


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="runs within it")
@pytest.mark.skipif(not find_spec("triton"), reason="no package triton")
def test_gathered_interpreted():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, str(Path(__file__)), "-k", "kernel"],
        env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


# The kernels, on a GPU or under the interpreter.

DEVICE = "cpu" if INTERPRETED else "cuda"
on_device = pytest.mark.skipif(not INTERPRETED and not HAS_CUDA, reason="needs a CUDA device")


def on_kernels(monkeypatch, x, weight):
    triton_gathered = pytest.importorskip("lingua_topk.ops.triton_gathered")
    monkeypatch.setattr(gathered_module, "_of_rows", lambda x: triton_gathered.gathered_triton)
    return gathered(x, weight)


@pytest.mark.parametrize("size", [(37, 5, 4), (130, 70, 66)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.gpu
@on_device
def test_the_kernels_are_the_dense_product(monkeypatch, size, dtype):
    if INTERPRETED and dtype == torch.bfloat16:
        TOLERANCES[dtype] = 2**-6  # the interpreter rounds down
    x, weight = case(*size, dtype, DEVICE)
    close(on_kernels(monkeypatch, x, weight), x, weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.gpu
@on_device
def test_the_kernels_of_a_gate_are_the_dense_product(monkeypatch, dtype):
    triton_gathered = pytest.importorskip("lingua_topk.ops.triton_gathered")
    monkeypatch.setattr(triton_gathered, "PROGRAMS", 3)
    monkeypatch.setattr(triton_gathered, "LARGEST_PIECE", 16)
    if INTERPRETED and dtype == torch.bfloat16:
        TOLERANCES[dtype] = 2**-6
    gate, x, w3, w2 = gate_case(21, 5, 4, dtype, DEVICE)
    gate_close(triton_gathered.gathered_gate_triton(gate, x, w3, w2), gate, x, w3, w2)


@pytest.mark.gpu
@on_device
def test_the_kernels_go_through_wide_rows_in_pieces(monkeypatch):
    triton_gathered = pytest.importorskip("lingua_topk.ops.triton_gathered")
    monkeypatch.setattr(triton_gathered, "LARGEST_PIECE", 64)
    x, weight = case(150, 33, 80, torch.float32, DEVICE)
    close(on_kernels(monkeypatch, x, weight), x, weight)
    assert on_kernels(monkeypatch, x[:0], weight).shape == (0, 33)
