"""alpha beside the learning rate: driven, saved and restored by the same scheduler."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.optim.lr_scheduler import LambdaLR

from lingua_topk import TopKHandle
from lingua_topk.anneal import alpha_at


class ResumableScheduler:
    """The host's learning-rate scheduler, with a first step after a resume at the right rate.

    LambdaLR restores its own state only: Meta Lingua's first step would run with the rate of
    step 0, which with a warm-up is none at all. `resumed` is called with the number of steps
    that are done, once they are known.
    """

    def __init__(self, scheduler: LambdaLR, resumed: Callable[[int], None] = lambda step: None):
        self.scheduler = scheduler
        self.resumed = resumed

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["scheduler"], name)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore, and give the optimizer the learning rate of the step to come.

        By the schedule as it is now, and not as saved: Lingua's cosine is back at its peak
        after the last step of a run, which may be given more steps.
        """
        scheduler = self.scheduler
        scheduler.load_state_dict(state_dict)
        rates = [
            base * factor(scheduler.last_epoch)
            for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        ]
        for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        scheduler._last_lr = rates
        self.resumed(self.scheduler.last_epoch)


class AnnealingScheduler(ResumableScheduler):
    """The learning rate, and the alpha of a TopK model with it.

    alpha follows from the scheduler's step count, so that whatever restores the one
    restores the other.

    Attributes:
        used_alpha: alpha of the last finished optimizer step.
    """

    def __init__(
        self,
        scheduler: LambdaLR,
        handle: TopKHandle,
        n_steps: int,
        resumed: Callable[[int], None] = lambda step: None,
    ):
        super().__init__(scheduler, resumed)
        self.handle = handle
        self.n_steps = n_steps
        self.stats = handle.start_stats()
        self.handle.alpha = self.used_alpha = self._alpha()

    def _alpha(self) -> float:
        args = self.handle.args
        step = self.scheduler.last_epoch
        return alpha_at(step, self.n_steps, args.anneal_ratio, args.anneal_schedule)

    def step(self, *args: Any, **kwargs: Any) -> None:
        """After an optimizer step: the learning rate and the alpha of the next one."""
        self.used_alpha = self.handle.alpha
        self.scheduler.step(*args, **kwargs)
        self.handle.alpha = self._alpha()

    def state_dict(self) -> dict[str, Any]:
        """The scheduler's state, and what this process has counted; JSON throughout."""
        idle = {str(i): stats.idle.tolist() for i, stats in self.stats.items()}
        counts = {str(i): stats.counts.tolist() for i, stats in self.stats.items()}
        return {**self.scheduler.state_dict(), "topk": {"idle": idle, "counts": counts}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore both; the counts since the last log line go on, and so do idle neurons."""
        state = dict(state_dict)
        topk = state.pop("topk", {})
        super().load_state_dict(state)
        for i, stats in self.stats.items():
            for name, counted in (("idle", stats.idle), ("counts", stats.counts)):
                saved = topk.get(name, {}).get(str(i))
                if saved is not None and len(saved) == len(counted):
                    counted.copy_(torch.tensor(saved))
        self.handle.alpha = self.used_alpha = self._alpha()

    def state_dict_of_others(
        self, states: list[dict[str, Any]], rank: int, size: int
    ) -> dict[str, Any]:
        """One state for process `rank` of `size`, from those of all that ran before.

        Idle time is counted in a process's own tokens: the least, times their number, is
        shared out anew. What was counted since the last log line goes to the first process.
        """
        topk: dict[str, dict[str, list[int]]] = {"idle": {}, "counts": {}}
        for i in states[0].get("topk", {}).get("idle", {}):
            idle = torch.tensor([state["topk"]["idle"][i] for state in states])  # [P, D]
            topk["idle"][i] = (idle.amin(dim=0) * len(states) // size).tolist()
            counts = torch.tensor([state["topk"]["counts"][i] for state in states])  # [P, 2]
            topk["counts"][i] = (counts.sum(dim=0) * (rank == 0)).tolist()
        return {**states[0], "topk": topk}

    def metrics(self) -> dict[str, float]:
        """`topk/*` over all processes since the last call. All of them must call it.

        topk/alpha: of the last finished step. topk/l0/<layer>: mean survivors a token.
        topk/dead/<layer>: share of neurons that fired for none of the last
        `dead_window` tokens (0 until so many have been seen).
        """
        counts = torch.stack([stats.counts for stats in self.stats.values()])  # [L, 2]
        idle = torch.stack([stats.idle for stats in self.stats.values()])  # [L, D]
        processes = 1
        if dist.is_initialized():
            dist.all_reduce(counts, op=dist.ReduceOp.SUM)
            dist.all_reduce(idle, op=dist.ReduceOp.MIN)
            processes = dist.get_world_size()
        for stats in self.stats.values():
            stats.reset_counts()
        l0 = (counts[:, 0] / counts[:, 1].clamp(min=1)).tolist()
        dead = (idle * processes >= self.handle.args.dead_window).double().mean(dim=1).tolist()
        layers = list(self.stats)
        return {
            "topk/alpha": self.used_alpha,
            **{f"topk/l0/{i}": value for i, value in zip(layers, l0, strict=True)},
            **{f"topk/dead/{i}": value for i, value in zip(layers, dead, strict=True)},
        }
