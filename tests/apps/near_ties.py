"""How near a selection is to another: where rounding can swap a neuron."""

import torch
from torch import Tensor, nn


def relative_gaps(x: Tensor, k: int) -> Tensor:
    """(T_k - T_k+1) / |T_k| of rows x, [..., D]: the result is [...]."""
    largest = x.topk(k + 1).values
    return (largest[..., k - 1] - largest[..., k]).abs() / largest[..., k - 1].abs()


def least_gap(model: nn.Module, tokens: list[int]) -> float:
    """The least relative gap of all selections while `model`, of this project, reads tokens."""
    gaps = []

    def note(module, inputs, _):
        gaps.append(relative_gaps(sum(inputs), module.k).min().item())

    hooks = [
        module.register_forward_hook(note)
        for module in model.modules()
        if type(module).__name__ == "TopK"
    ]
    with torch.no_grad():
        model(torch.tensor([tokens[-model.max_seqlen :]]))
    for hook in hooks:
        hook.remove()
    return min(gaps)
