"""The loss of the output layer, in one go with its product or after it.

LINGUA_TOPK_LOSS names one. Those of libraries never hold the logits of all tokens, which for a
batch of many tokens and a large vocabulary are most of the memory of a training step.
"""

import functools
import os
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from lingua.errors import ConfigError

VARIABLE = "LINGUA_TOPK_LOSS"
IGNORED = -100
CHOICES = {
    "auto": "plain",
    "plain": "the logits, then their cross-entropy",
    "torch": "torch's linear_cross_entropy in chunks of tokens; not in bf16, where it rounds",
    "liger": "Liger-Kernel's, on CUDA",
    "cce": "cut-cross-entropy's, on CUDA and in half precision",
}
_PACKAGES = {"liger": "liger_kernel", "cce": "cut_cross_entropy"}


def chosen() -> str:
    """The loss by its name, "auto" replaced. ConfigError for a variable with another value.

    "auto" is the plain one everywhere: on a CPU torch's was seen to take four times as long,
    and those for CUDA have not been measured.
    """
    name = os.environ.get(VARIABLE) or "auto"
    if name not in CHOICES:
        raise ConfigError(f"{VARIABLE}={name!r} is not known: choose one of {', '.join(CHOICES)}")
    return "plain" if name == "auto" else name


def why_not(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a loss cannot run there on hidden states of that dtype; None where it can."""
    if name == "torch":
        if not hasattr(F, "linear_cross_entropy"):
            return f"torch {torch.__version__} has no linear_cross_entropy"
        return "it rounds the loss to bf16" if dtype == torch.bfloat16 else None
    if name in _PACKAGES:
        if device.type != "cuda":
            return f"it needs CUDA, and the model is on {device}"
        if name == "cce" and dtype not in (torch.bfloat16, torch.float16):
            return f"it takes half precision, and the model computes in {dtype}"
        if find_spec(_PACKAGES[name]) is None:
            return f"there is no package {_PACKAGES[name]}"
    return None


def linear_cross_entropy(name: str, h: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy of the logits h weight^T, by a library; -100 is ignored.

    Args:
        name: one of CHOICES, "auto" and "plain" excepted.
        h: [..., D], hidden states after the final norm.
        weight: [V, D], whole, in h's dtype.
        target: [...], int64.

    Returns: [], float32, or float64 for such h.

    Raises: ConfigError where that loss cannot run.
    """
    reason = why_not(name, h.device, h.dtype)
    if reason is not None:
        raise ConfigError(f"{VARIABLE}={name} cannot run: {reason}; choose auto")
    # What compiles the model leaves them as they are: they bring their own kernels. (Said here,
    # as it imports the compiler.)
    function = torch.compiler.disable(
        {"torch": _by_torch, "liger": _by_liger, "cce": _by_cce}[name]
    )
    loss = function(h.flatten(0, -2), weight, target.flatten())
    return loss.to(torch.promote_types(h.dtype, torch.float32))


def _by_torch(h: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    from torch.nn import LinearCrossEntropyOptions

    options = LinearCrossEntropyOptions()
    return F.linear_cross_entropy(h, weight, target, ignore_index=IGNORED, options=options)


def _by_liger(h: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    # The weight's gradient is a sum over chunks: in half precision each would be rounded.
    return _liger()(h, weight, target, ignore_index=IGNORED, accum_dtype=torch.float32)


@functools.cache
def _liger():
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy


def _by_cce(h: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy as cut

    # By default it leaves out what is small of the gradients.
    return cut(h, weight, target, ignore_index=IGNORED, filter_eps=None)
