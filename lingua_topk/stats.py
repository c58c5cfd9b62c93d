"""What fires in a TopK layer, counted on the device."""

import torch
from torch import Tensor


class FiringStats:
    """Running counts over the outputs y of one TopK layer. A neuron fires where y != 0.

    Kept as plain tensors that are updated in place, so that they stay on the device,
    need no buffer in the model, and do not recompile a compiled model.

    Attributes:
        counts: int64 [2], survivors and tokens since the last `reset_counts`.
        idle: int64 [D], tokens this process has seen since the last call in which the
            neuron fired.
    """

    def __init__(self, width: int, device: torch.device | str):
        self.counts = torch.zeros(2, dtype=torch.int64, device=device)
        self.idle = torch.zeros(width, dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, y: Tensor) -> None:
        """Count the tokens of y, [..., D], any dtype; a NaN counts as firing.

        Does nothing in a backward pass: what activation checkpointing recomputes there
        was counted in the forward pass.
        """
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            return
        fired = (y != 0).reshape(-1, y.shape[-1])  # [N, D]
        tokens = fired.shape[0]
        per_neuron = fired.sum(dim=0, dtype=torch.int32)  # [D]; in int64 it takes twice as long
        self.counts[0] += per_neuron.sum()
        self.counts[1] += tokens
        self.idle.copy_(torch.where(per_neuron > 0, 0, self.idle + tokens))

    def reset_counts(self) -> None:
        self.counts.zero_()

    @property
    def l0(self) -> float:
        """Mean survivors a token since the last `reset_counts`; NaN before the first token."""
        survivors, tokens = self.counts.tolist()
        return survivors / tokens if tokens else float("nan")
