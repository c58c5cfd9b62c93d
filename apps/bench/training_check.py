"""What must hold before a time of training is reported: small runs, compared loss by loss."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apps.bench.training_variants import (
    ANNEALED,
    Trained,
    Variant,
    batches,
    build,
    build_llama,
    small,
)
from apps.topk.checkpoint import DTYPES
from apps.topk.model import TopKTrainArgs
from lingua_topk import topk_handle
from lingua_topk.errors import ConfigError
from lingua_topk.ops import backends

STEPS = 10
# How far losses may be apart where nothing but the order of sums differs.
EXACT = 1e-9
TOLERANCE = {"fp64": 1e-7, "fp32": 1e-5, "bf16": 2e-2, "fp16": 2e-2}
# (T_k - T_k+1) / |T_k| below which rounding can swap what is kept.
NEAR_TIE = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 1e-2}
# In the first of the timed steps, and in all of them: of thousands of rows some nearly tie.
FIRST = {"fp64": 1e-5, "fp32": 1e-4, "bf16": 2e-2, "fp16": 2e-2}
APART = {"fp64": 1e-5, "fp32": 2e-2, "bf16": 1e-1, "fp16": 1e-1}


def check_small_runs(args: TopKTrainArgs, device: torch.device, with_llama: bool) -> None:
    """RuntimeError unless small runs have the losses that they must have.

    In float64 every backend of the operator has those of the definition, and transformers'
    Llama those of the vanilla twin. In the dtype of `args`, they may differ from where a
    selection nearly tied.
    """
    given = args.distributed.model_dtype
    for dtype in dict.fromkeys(("fp64", given)):
        for alpha in (0.0, ANNEALED):
            _check_backends(small(args, dtype), dtype, device, alpha)
    if with_llama:
        _check_llama(small(args, "fp64"), device)


def _check_backends(args: TopKTrainArgs, dtype: str, device: torch.device, alpha: float) -> None:
    plain = build(args, Variant("plain", True, alpha, "plain"), device)
    expected, gaps = _losses(plain, args, device)
    for name in runnable(device, dtype):
        losses, _ = _losses(build(args, Variant(name, True, alpha, name), device), args, device)
        tolerance = EXACT if dtype == "fp64" else TOLERANCE[dtype]
        for step, (one, other) in enumerate(zip(losses, expected, strict=True)):
            near_tie = min(gaps[: step + 1]) < NEAR_TIE.get(dtype, 0)
            if not abs(one - other) <= tolerance and not near_tie:
                raise RuntimeError(
                    f"backend {name}, {dtype}, alpha={alpha}: the loss of step {step} of a small"
                    f" run is {one}, by the definition {other}; no time is reported of what is"
                    " not correct"
                )


def runnable(device: torch.device, dtype: str) -> list[str]:
    """The backends besides the definition that can run there."""
    x = torch.zeros(1, 64, device=device, dtype=DTYPES[dtype])
    found = []
    for name in ("cpu", "triton"):
        try:
            with backends.use(name):
                backends.backend_of(x)
        except ConfigError:
            continue
        found.append(name)
    return found


def _check_llama(args: TopKTrainArgs, device: torch.device) -> None:
    ours = build(args, Variant("vanilla", False), device)
    llama = build_llama(args, ours, device)
    _keep_float64(llama)
    pairs = zip(*(_losses(one, args, device)[0] for one in (ours, llama)), strict=True)
    for step, (one, other) in enumerate(pairs):
        if not abs(one - other) <= TOLERANCE["fp64"]:
            raise RuntimeError(
                f"vanilla: the loss of step {step} of a small run is {one}, that of transformers'"
                f" Llama {other}; no time is reported of what is not correct"
            )


def _keep_float64(llama: Trained) -> None:
    """Llama's norms and its loss compute in float32 whatever their input."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    from lingua_topk.hf.modeling_topk_lm import TopKLMRMSNorm

    for name, module in list(llama.model.named_modules()):
        if isinstance(module, LlamaRMSNorm):
            norm = TopKLMRMSNorm(len(module.weight), module.variance_epsilon)
            norm.weight = module.weight
            llama.model.set_submodule(name, norm)
    llama.loss_of = _loss_of_logits


def _loss_of_logits(model: nn.Module, tokens: Tensor, target: Tensor) -> Tensor:
    logits = model(input_ids=tokens, use_cache=False).logits  # [B, S, V]
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def _losses(
    trained: Trained, args: TopKTrainArgs, device: torch.device
) -> tuple[list[float], list[float]]:
    """The losses of a small run, and the least gap at a threshold in each of its steps."""
    losses, gaps = [], []
    rows = batches(args.model.vocab_size, 2, args.model.max_seqlen, 2, device)
    for step in range(STEPS):
        with _gaps(trained.model) as found:
            losses.append(trained(*rows[step % 2]).item())
        gaps.append(min(found, default=float("inf")))
    return losses, gaps


@contextmanager
def _gaps(model: nn.Module) -> Iterator[list[float]]:
    """The least relative gap of every selection within the block."""
    found: list[float] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        largest = sum(x.detach().double() for x in inputs).topk(module.k + 1).values
        gap = (largest[..., -2] - largest[..., -1]) / largest[..., -2].abs()
        found.append(gap.min().item())

    handle = topk_handle(model)
    modules = [] if handle is None else handle.modules.values()
    hooks = [module.register_forward_hook(note) for module in modules]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def check_timed_losses(
    losses: dict[str, list[float]], twins: list[str], hard: list[str], dtype: str
) -> None:
    """RuntimeError where variants that compute the same have losses that are far apart.

    losses: by variant, a step each. twins, hard: names of those without TopK and with it. The
    first step of twins, from the same weights, is held to more: nothing is selected in it.
    """
    for names, first in ((twins, FIRST), (hard, APART)):
        for name in names[1:]:
            for step, (one, other) in enumerate(zip(losses[name], losses[names[0]], strict=True)):
                allowed = APART[dtype] if step else first[dtype]
                if not abs(one - other) <= allowed:
                    raise RuntimeError(
                        f"{name}: the loss of step {step} is {one}, that of {names[0]} {other};"
                        " no time is reported of what is not correct"
                    )
