"""Which implementation of the operator runs: by LINGUA_TOPK_BACKEND, or by the device."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from lingua_topk.errors import ConfigError
from lingua_topk.ops.cpu import SMALLEST, topk_cpu, topk_sum_cpu
from lingua_topk.ops.definition import topk_definition, topk_sum_definition

VARIABLE = "LINGUA_TOPK_BACKEND"
CHOICES = {
    "auto": "the fastest that can run: triton on a GPU, cpu on a CPU, else plain",
    "plain": "the definition, in torch's own operators",
    "cpu": "numpy's quickselect",
    "triton": "one fused kernel, for GPUs",
}


@dataclass(frozen=True)
class Backend:
    """`topk` and `topk_sum` of checked arguments, with the signatures of their definitions."""

    name: str
    topk: Callable[[Tensor, int, float | Tensor, str], Tensor]
    topk_sum: Callable[[Tensor, Tensor, int, float | Tensor, str], Tensor]


PLAIN = Backend("plain", topk_definition, topk_sum_definition)
CPU = Backend("cpu", topk_cpu, topk_sum_cpu)

_HAS_TRITON = find_spec("triton") is not None
_chosen: str | None = None  # read from the environment when it is first asked for


def chosen() -> str:
    """The name that was chosen, one of CHOICES. ConfigError for a variable with another value."""
    global _chosen
    if _chosen is None:
        _chosen = check_backend(os.environ.get(VARIABLE) or "auto")
    return _chosen


def check_backend(name: str) -> str:
    """name as it is when it is one of CHOICES, else ConfigError."""
    if name not in CHOICES:
        raise ConfigError(f"{VARIABLE}={name!r} is not known: choose one of {', '.join(CHOICES)}")
    return name


@contextmanager
def use(name: str) -> Iterator[None]:
    """Run another backend within the block, whatever was chosen. ConfigError as above."""
    global _chosen
    before, _chosen = _chosen, check_backend(name)
    try:
        yield
    finally:
        _chosen = before


def backend_of(x: Tensor) -> Backend:
    """The backend that runs for x [..., D]. ConfigError where the chosen one cannot."""
    name = chosen()
    if name == "auto":
        return _fastest(x)
    if name == "plain":
        return PLAIN
    if name == "cpu":
        if x.device.type != "cpu":
            raise _cannot_run(name, f"x is on {x.device}", "auto or triton")
        return CPU
    if not _HAS_TRITON:
        raise _cannot_run(name, "there is no package triton", "auto, or install the extra dev")
    from lingua_topk.ops import triton_topk

    reason = triton_topk.why_not(x)
    if reason is not None:
        raise _cannot_run(name, reason, "auto")
    return _triton()


def _triton() -> Backend:
    # Imported when it is first used: it takes time, and is not everywhere.
    from lingua_topk.ops.triton_topk import topk_sum_triton, topk_triton

    return Backend("triton", topk_triton, topk_sum_triton)


def _fastest(x: Tensor) -> Backend:
    # What is no plain tensor (sharded, without data) is left to torch's own operators, and so is
    # differentiation in torch.func and in forward mode, which they alone know.
    if type(x) not in (Tensor, torch.nn.Parameter) or _is_transformed():
        return PLAIN
    if x.device.type == "cpu" and x.numel() >= SMALLEST:
        return CPU
    if x.is_cuda and _HAS_TRITON:
        from lingua_topk.ops.triton_topk import why_not

        return PLAIN if why_not(x) else _triton()
    return PLAIN


def _is_transformed() -> bool:
    if torch.compiler.is_compiling():  # forward mode cannot be asked about there
        return torch._C._functorch.peek_interpreter_stack() is not None
    in_forward_mode = torch.autograd.forward_ad._current_level >= 0
    return in_forward_mode or torch._C._are_functorch_transforms_active()


def _cannot_run(name: str, why: str, instead: str) -> ConfigError:
    return ConfigError(f"{VARIABLE}={name} cannot run: {why}; choose {instead}")
