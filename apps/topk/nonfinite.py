"""A step whose gradient is not finite: left out, so that NaN never gets into the weights.

It is decided and counted on the device, in a hook before the optimizer's step, which both hosts'
loops call: fused AdamW itself leaves a step out when its `found_inf` is 1, as for torch's
GradScaler. The host looks at the counts where it waits for the device anyway, at log lines and
before a save. All processes decide alike.
"""

import logging
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lingua_topk.errors import ConfigError, UserError

logger = logging.getLogger(__name__)

STOP, SKIP = "stop", "skip"
MOST_IN_A_ROW = 10  # steps that `skip` leaves out before the run ends


class NonFiniteError(UserError):
    """The gradient was not finite, and the run was to end then; its checkpoints are whole."""

    exit_status = 3


def validate(choice: str) -> None:
    """ConfigError for what `nonfinite` cannot be."""
    if choice not in (STOP, SKIP):
        raise ConfigError(
            f"nonfinite={choice!r} is not known: choose {STOP} (end the run) or {SKIP} (leave the"
            " step out)"
        )


class Guard:
    """Keeps an optimizer from steps whose gradient holds NaN or infinite values.

    optimizer: AdamW over `model`, whose gradients are clipped before its step, as both hosts do: a
    norm that is not a number makes all of them NaN, in all processes. scheduler: the learning
    rate's, which counts steps. Once the run is to end no step changes the weights any more.

    A gradient of finite values whose norm alone is too large for its dtype is not found: clipping
    has made it 0.

    Only steps that the scheduler has counted too are counted: to make an optimizer's state, torch's
    get_state_dict takes a step of its own, with gradients of zero.
    """

    def __init__(self, choice: str, model: nn.Module, optimizer: Optimizer, scheduler: Any):
        self._most = 1 if choice == STOP else MOST_IN_A_ROW
        self._skips = choice == SKIP
        self._parameters = [one for one in model.parameters() if one.requires_grad]
        self._scheduler = scheduler
        self._is_fused = all(group.get("fused") for group in optimizer.param_groups)
        device = self._parameters[0].device
        # Steps left out, those of them in a row, the last of them, and that on which the run ends.
        self._counts = torch.zeros(4, dtype=torch.int64, device=device)
        # As they were before the newest call of the optimizer, and how many steps were done then.
        self._before = self._counts.clone()
        self._done_before: int | None = None
        self._told = 0  # of the steps left out, in the log
        optimizer.register_step_pre_hook(self._before_step)

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        gradients = [_local(one.grad) for one in self._parameters if one.grad is not None]
        if not gradients:
            return
        is_bad = (~nn.utils.get_total_norm(gradients).isfinite()).long()
        if dist.is_initialized() and dist.get_world_size() > 1:
            # Each process looks at its part alone; and a copy of the weights that is broken must
            # not go on without the others, or they without it.
            dist.all_reduce(is_bad, op=dist.ReduceOp.MAX)
        found = self._count(is_bad)
        if self._is_fused:
            optimizer.found_inf = found.float()
        elif found.item():
            # Other implementations know no found_inf, but pass over parameters without gradient.
            optimizer.zero_grad(set_to_none=True)

    def _count(self, is_bad: Tensor) -> Tensor:
        """Whether the step is left out: a number of one place, 0 or 1, on the device."""
        self._counts.copy_(self._counted())
        self._before.copy_(self._counts)
        self._done_before = self._scheduler.last_epoch
        skipped, in_a_row, last, end = (self._counts[i] for i in range(4))  # views
        step = self._scheduler.last_epoch + 1
        goes_on = (end == 0).long()
        bad = is_bad * goes_on
        skipped += bad
        in_a_row.copy_((in_a_row + bad) * torch.maximum(bad, 1 - goes_on))
        last += bad * (step - last)
        end += bad * (in_a_row >= self._most) * step
        return torch.maximum(bad, 1 - goes_on)

    def _counted(self) -> Tensor:
        """The counts, without a step that the scheduler has not counted: it was none of the run."""
        is_none = self._done_before == self._scheduler.last_epoch
        return self._before if is_none else self._counts

    def check(self) -> None:
        """NonFiniteError once the run is to end; in all processes alike. Waits for the device."""
        skipped, _, last, end = self._counted().tolist()
        if end:
            raise NonFiniteError(self._why(end))
        if skipped > self._told:
            logger.warning(
                "%d of the last steps left out, since their gradient was not finite (NaN or"
                " infinite): the last one is step %d; %d in this run",
                skipped - self._told, last, skipped,
            )  # fmt: skip
            self._told = skipped

    def _why(self, step: int) -> str:
        if not self._skips:
            return (
                f"step {step}: the gradient is not finite (NaN or infinite), so the run ends;"
                " nothing of that step or after it was saved, and the same command goes on from the"
                " newest checkpoint: look at the data and at optim.lr, or give nonfinite=skip to"
                " leave such steps out"
            )
        return (
            f"step {step}: the gradients of {self._most} steps in a row are not finite (NaN or"
            " infinite), so the run ends; the same command goes on from the newest checkpoint: if"
            " it ends there again, go back to an earlier one (move newer ones out of the way), or"
            " start anew with a lower optim.lr"
        )

    def metrics(self) -> dict[str, float]:
        """`optim/skipped`, the steps left out since the run began; {} where it is not to skip.

        Raises as `check`.
        """
        self.check()
        return {"optim/skipped": self._told} if self._skips else {}

    def state_dict(self) -> dict[str, list[int]]:
        """What a run that goes on has to know: nothing where no step was left out."""
        counts = self._counted().tolist()
        return {"nonfinite": counts} if counts[0] else {}

    def load_state_dict(self, state: dict[str, list[int]]) -> None:
        counts = state.get("nonfinite", [0, 0, 0, 0])
        self._counts.copy_(torch.tensor(counts))
        self._done_before = None
        self._told = counts[0]


def _local(gradient: Tensor) -> Tensor:
    """This process's part of a gradient that is spread over several."""
    return gradient.to_local() if hasattr(gradient, "to_local") else gradient


class GuardedScheduler:
    """A scheduler whose saved state has the guard's in it."""

    def __init__(self, scheduler: Any, guard: Guard):
        self.scheduler = scheduler
        self.guard = guard

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["scheduler"], name)

    def state_dict(self) -> dict[str, Any]:
        """JSON throughout."""
        return {**self.scheduler.state_dict(), **self.guard.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        own = {key: value for key, value in state_dict.items() if key == "nonfinite"}
        rest = {key: value for key, value in state_dict.items() if key not in own}
        self.guard.load_state_dict(own)
        self.scheduler.load_state_dict(rest)
