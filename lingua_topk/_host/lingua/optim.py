"""AdamW and the schedules of its learning rate."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from lingua.errors import ConfigError

SCHEDULERS = ("constant", "linear", "inv_sqrt", "cosine", "wsd")


@dataclass
class OptimArgs:
    lr: float = 3e-4
    weight_decay: float = 0.1
    epsilon: float = 1e-8
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0  # largest norm of the gradient

    scheduler: str = "cosine"  # constant, linear, inv_sqrt, cosine or wsd
    warmup: int = 2000  # steps
    lr_min_ratio: float = 0.1  # the smallest multiplier of lr after the warm-up
    cycle_length: float = 1.0  # cosine, wsd: share of the steps
    cosine_theta: float = 1.0
    annealing_step: int = 1000  # not read; Lingua has it
    decay_fraction: float = 0.1  # wsd: share of the steps in which the rate falls
    exp_factor: float = 0.5  # inv_sqrt


# A multiplier of optim.lr: every function below takes the step, 0 for the first update.


def _warming(step: int, warmup: int) -> float | None:
    """step / warmup, or None once the warm-up is over."""
    return step / warmup if step < warmup else None


def _progress(step: int, warmup: int, n_steps: int) -> float:
    """The share of the steps after the warm-up that is done; 0 where none come after it."""
    return (step - warmup) / max(n_steps - warmup, 1)


def lr_constant(step: int) -> float:
    """1 always, without warm-up."""
    return 1.0


def lr_linear(step: int, warmup: int, n_steps: int, min_ratio: float) -> float:
    """From 1 after the warm-up to `min_ratio` at `n_steps`, and so from then on."""
    warming = _warming(step, warmup)
    if warming is not None:
        return warming
    if step > n_steps:
        return min_ratio
    s = _progress(step, warmup, n_steps)
    return s * min_ratio + (1 - s)


def lr_inv_sqrt(step: int, warmup: int, exp_factor: float, min_ratio: float) -> float:
    """(warmup / step) ** exp_factor, not below `min_ratio`. No warm-up counts as one step."""
    warming = _warming(step, warmup)
    if warming is not None:
        return warming
    return max(max(warmup, 1) ** exp_factor / max(step, 1) ** exp_factor, min_ratio)


def lr_cosine(
    step: int, warmup: int, n_steps: int, cycle_length: float, theta: float, min_ratio: float
) -> float:
    """Half a cosine every `cycle_length * n_steps` steps, from 1 to `min_ratio`.

    `theta` bends the time axis. The last step belongs to the half-cycle that it ends, so
    that one cycle ends at `min_ratio`; after it the multiplier stays there.
    """
    warming = _warming(step, warmup)
    if warming is not None:
        return warming
    if step > n_steps:
        return min_ratio
    s = _progress(step, warmup, n_steps)
    cycles = step / (n_steps * cycle_length)
    cycle = math.ceil(cycles) - 1 if step == n_steps else math.floor(cycles)
    sign = -1 if cycle % 2 else 1
    cosine = sign * math.cos(math.pi * s**theta / cycle_length)
    return min_ratio + 0.5 * (1 - min_ratio) * (cosine + 1)


def lr_wsd(
    step: int,
    warmup: int,
    n_steps: int,
    decay_fraction: float,
    cycle_length: float,
    min_ratio: float,
) -> float:
    """Warm-up, stable, decay: 1 until each cycle's last `decay_fraction`, then down.

    The decay is linear in 1 / multiplier, from 1 to `min_ratio`. 1 / 0 being no number,
    it is linear in the multiplier for `min_ratio` 0. Cycles end at multiples of
    `cycle_length * n_steps` and at `n_steps`; the decay of cycle k is k times as long.
    """
    warming = _warming(step, warmup)
    if warming is not None:
        return warming
    cycle_steps = max(int(n_steps * cycle_length), 1)
    end = n_steps if step == n_steps else cycle_steps * (step // cycle_steps + 1)
    decay_steps = int(end * decay_fraction)
    if step <= end - decay_steps:
        return 1.0
    progress = (step - (end - decay_steps)) / decay_steps
    if min_ratio == 0:
        return 1 - progress
    return 1 / (progress / min_ratio + (1 - progress))


def build_lr_fn(args: OptimArgs, n_steps: int) -> Callable[[int], float]:
    """The schedule of a run of `n_steps` steps: step -> multiplier of optim.lr.

    ConfigError for an unknown schedule and for values that it cannot take.
    """
    _validate(args, n_steps)
    warmup, min_ratio = args.warmup, args.lr_min_ratio
    after_warmup = {
        "linear": (lr_linear, {"n_steps": n_steps}),
        "inv_sqrt": (lr_inv_sqrt, {"exp_factor": args.exp_factor}),
        "cosine": (
            lr_cosine,
            {"n_steps": n_steps, "cycle_length": args.cycle_length, "theta": args.cosine_theta},
        ),
        "wsd": (
            lr_wsd,
            {
                "n_steps": n_steps,
                "cycle_length": args.cycle_length,
                "decay_fraction": args.decay_fraction,
            },
        ),
    }
    if args.scheduler == "constant":
        return lr_constant
    function, options = after_warmup[args.scheduler]
    return functools.partial(function, warmup=warmup, min_ratio=min_ratio, **options)


def _validate(args: OptimArgs, n_steps: int) -> None:
    if args.scheduler not in SCHEDULERS:
        raise ConfigError(
            f"optim.scheduler={args.scheduler!r} is not known: choose one of"
            f" {', '.join(SCHEDULERS)}"
        )
    for field, allowed, fits in (
        ("lr", "a number of at least 0", args.lr >= 0),
        ("weight_decay", "a number of at least 0", args.weight_decay >= 0),
        ("epsilon", "a number of at least 0", args.epsilon >= 0),
        ("beta1", "at least 0 and below 1", 0 <= args.beta1 < 1),
        ("beta2", "at least 0 and below 1", 0 <= args.beta2 < 1),
        ("clip", "a norm above 0", args.clip > 0),
        ("warmup", "a number of steps, at least 0", args.warmup >= 0),
        ("lr_min_ratio", "a share of lr, from 0 to 1", 0 <= args.lr_min_ratio <= 1),
        ("cycle_length", "a share of the steps, above 0", args.cycle_length > 0),
        ("cosine_theta", "a number above 0", args.cosine_theta > 0),
        ("exp_factor", "a number of at least 0", args.exp_factor >= 0),
        ("decay_fraction", "a share of the steps, from 0 to 1", 0 <= args.decay_fraction <= 1),
    ):
        value = getattr(args, field)
        # An infinite clip is none.
        if not (fits and (math.isfinite(value) or field == "clip")):
            raise ConfigError(f"optim.{field}={value} is not allowed: give {allowed}")
    if args.scheduler == "wsd" and args.decay_fraction >= args.cycle_length:
        raise ConfigError(
            f"optim.decay_fraction={args.decay_fraction} with optim.cycle_length="
            f"{args.cycle_length}: the decay is part of a cycle, give a smaller decay_fraction"
        )
    if n_steps < 1:
        raise ConfigError(f"steps={n_steps} is too small: give at least 1")


def build_optimizer(model: nn.Module, args: OptimArgs, n_steps: int) -> tuple[AdamW, LambdaLR]:
    """AdamW over all parameters, in one group with weight decay, and its schedule.

    The learning rate is set for the first step; call `scheduler.step()` after every
    `optimizer.step()`. ConfigError for values that are not allowed.
    """
    lr_fn = build_lr_fn(args, n_steps)
    optimizer = _adamw(
        model,
        lr=args.lr,
        betas=(args.beta1, args.beta2),
        eps=args.epsilon,
        weight_decay=args.weight_decay,
    )
    return optimizer, LambdaLR(optimizer, lr_fn)


def _adamw(model: nn.Module, **options) -> AdamW:
    """With the fused kernel where the parameters' device has one."""
    try:
        return AdamW(model.parameters(), fused=True, **options)
    except RuntimeError:
        return AdamW(model.parameters(), fused=False, **options)
