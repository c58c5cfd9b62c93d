"""lingua._loss: losses of libraries are the plain one, gradients included, on two processes too.

Run by tests/processes.py this file is the program of the two processes; see `two_processes`.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from apps.main.transformer import LMTransformer, LMTransformerArgs, build_fsdp_grouping_plan
from lingua import _loss
from lingua.distributed import (
    DistributedArgs,
    get_device_mesh,
    get_global_rank,
    parallelize_model,
    setup_torch_distributed,
)
from lingua.errors import ConfigError
from tests import processes

CPU = torch.device("cpu")
HAS_TORCHS = hasattr(F, "linear_cross_entropy")
needs_torchs = pytest.mark.skipif(not HAS_TORCHS, reason="this torch has no linear_cross_entropy")


def small_model(loss: str, tied: bool) -> LMTransformer:
    args = LMTransformerArgs(
        dim=20, n_layers=2, n_heads=2, vocab_size=17, multiple_of=3, max_seqlen=16,
        weight_tying=tied,
    )  # fmt: skip
    model = LMTransformer(args).double()
    model.output.loss = loss
    torch.manual_seed(3)
    model.init_weights()
    return model


def batch() -> tuple[Tensor, Tensor]:
    ids = torch.randint(17, (4, 17), generator=torch.Generator().manual_seed(1))
    return ids[:, :-1], ids[:, 1:].clone()


def loss_and_gradients(model: nn.Module, ids: Tensor, target: Tensor) -> dict[str, Tensor]:
    loss = model(ids, target)
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    whole = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in found.items()}
    return {"loss": loss.detach(), **whole}


def assert_alike(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-12, msg=name)


@needs_torchs
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_torchs_loss_and_gradients_are_the_plain_ones(tied, compiled):
    ids, target = batch()
    target[1, 3:7] = -100
    model = small_model("torch", tied)
    called = torch.compile(model, backend="eager") if compiled else model
    expected = loss_and_gradients(small_model("plain", tied), ids, target)
    loss = called(ids, target)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert_alike({"loss": loss.detach(), **gradients}, expected)


def test_the_plain_loss_is_that_of_the_logits():
    ids, target = batch()
    target[0, 0] = -100
    model = small_model("plain", tied=False)
    logits = model(ids)  # [B, S, V]
    expected = F.cross_entropy(logits.flatten(0, 1), target.flatten())
    torch.testing.assert_close(model(ids, target), expected, rtol=0, atol=1e-12)


@needs_torchs
def test_a_loss_of_half_precision_is_float32():
    h, weight = torch.randn(6, 8).half(), torch.randn(11, 8).half()
    target = torch.tensor([1, 2, -100, 3, 4, 10])
    loss = _loss.linear_cross_entropy("torch", h, weight, target)
    assert loss.dtype == torch.float32
    expected = F.cross_entropy(F.linear(h.double(), weight.double()), target)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    ("value", "loss"), [(None, "plain"), ("", "plain"), ("auto", "plain"), ("torch", "torch")]
)
def test_the_variable_chooses_when_the_model_is_made(monkeypatch, value, loss):
    monkeypatch.delenv(_loss.VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(_loss.VARIABLE, value)
    for tied in (False, True):
        args = LMTransformerArgs(dim=8, n_layers=1, n_heads=1, vocab_size=5, weight_tying=tied)
        assert LMTransformer(args).output.loss == loss


def test_an_unknown_loss_is_refused_before_anything_is_computed(monkeypatch):
    monkeypatch.setenv(_loss.VARIABLE, "fused")
    message = r"LINGUA_TOPK_LOSS='fused' is not known: choose one of auto, plain, torch, liger, cce"
    with pytest.raises(ConfigError, match=message):
        LMTransformer(LMTransformerArgs(dim=8, n_layers=1, n_heads=1, vocab_size=5))


@pytest.mark.parametrize(
    ("name", "dtype", "reason"),
    [
        ("liger", torch.float32, "it needs CUDA, and the model is on cpu"),
        ("cce", torch.bfloat16, "it needs CUDA, and the model is on cpu"),
        pytest.param("torch", torch.bfloat16, "it rounds the loss to bf16", marks=needs_torchs),
    ],
)
def test_a_loss_that_cannot_run_is_refused(name, dtype, reason):
    h, weight, target = torch.randn(2, 4).to(dtype), torch.randn(3, 4).to(dtype), torch.arange(2)
    with pytest.raises(ConfigError, match=f"LINGUA_TOPK_LOSS={name} cannot run: {reason}"):
        _loss.linear_cross_entropy(name, h, weight, target)


@pytest.mark.parametrize("tied", [False, True])
def test_the_model_runs_the_loss_that_was_chosen(tied):
    with pytest.raises(ConfigError, match="LINGUA_TOPK_LOSS=liger cannot run: it needs CUDA"):
        small_model("liger", tied)(*batch())


def test_what_cannot_run_on_cuda_is_known_without_it():
    cuda = torch.device("cuda")
    assert "half precision" in _loss.why_not("cce", cuda, torch.float32)
    for name, package in (("liger", "liger_kernel"), ("cce", "cut_cross_entropy")):
        reason = _loss.why_not(name, cuda, torch.bfloat16)
        assert reason is None or package in reason


def test_ligers_loss_under_tritons_interpreter():
    """Its kernels on this CPU, in a process that is told so before triton is imported."""
    pytest.importorskip("liger_kernel", reason="liger_kernel is not installed")
    done = subprocess.run(
        [sys.executable, "-c", "from tests.host.test_loss import check_liger; check_liger()"],
        cwd=processes.ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


def check_liger() -> None:
    torch.manual_seed(0)
    target = torch.tensor([1, 2, -100, 3, 4, 10])
    h, weight = torch.randn(6, 8), torch.randn(11, 8)
    found, expected = (
        (loss, *torch.autograd.grad(loss, (a, b)))
        for loss, a, b in (
            (f(a, b, target), a, b)
            for f, a, b in (
                (function, h.clone().requires_grad_(), weight.clone().requires_grad_())
                for function in (_loss._by_liger, lambda a, b, t: F.cross_entropy(a @ b.T, t))
            )
        )
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


# --- two processes ---


def program(folder: Path) -> None:
    setup_torch_distributed(DistributedArgs())
    args = DistributedArgs(dp_shard=2, fsdp_type="full_shard", model_dtype="fp64")
    results = {}
    for tied in (False, True):
        model = small_model("torch", tied)
        parallelize_model(
            model, get_device_mesh(args), model_args(model), args,
            fsdp_grouping_plan=build_fsdp_grouping_plan(model_args(model)),
        )  # fmt: skip
        ids, target = (x.chunk(2)[get_global_rank()] for x in batch())
        results[tied] = loss_and_gradients(model, ids, target)
    torch.save(results, folder / f"{get_global_rank()}.pt")
    dist.destroy_process_group()


def model_args(model: LMTransformer) -> LMTransformerArgs:
    return LMTransformerArgs(n_layers=len(model.layers))


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> list[dict]:
    """The results of both, by rank."""
    return processes.results(2, "tests.host.test_loss", tmp_path_factory.mktemp("two_processes"))


@needs_torchs
@pytest.mark.parametrize("tied", [False, True])
def test_two_processes_that_share_the_weight_have_the_loss_of_one(two_processes, tied):
    expected = loss_and_gradients(small_model("plain", tied), *batch())
    losses = [results[tied].pop("loss") for results in two_processes]
    torch.testing.assert_close(sum(losses) / 2, expected.pop("loss"), rtol=0, atol=1e-12)
    for results in two_processes:
        assert_alike(results[tied], expected)


if __name__ == "__main__":
    program(Path(sys.argv[1]))
