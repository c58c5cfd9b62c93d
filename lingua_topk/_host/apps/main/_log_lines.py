"""What a run says of its last steps: a line of metrics.jsonl, and one of the log."""

from timeit import default_timer as timer
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from apps.main.train import Run


class Speed:
    """What was done since the last line, and since when."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        self.since = timer()
        self.micro_batches = 0


def metrics_of(
    run: "Run",
    speed: Speed,
    grad_norm: float,
    lr: float,
    data_load_time: float,
) -> dict[str, Any]:
    """One line of metrics.jsonl, flat, with Lingua's keys; all but `loss/out`."""
    args, state = run.args, run.state
    seconds = timer() - speed.since
    wps = speed.micro_batches * run.tokens_per_micro_batch / seconds
    micro_batches = args.grad_acc_steps * state.step + state.acc_step
    memory = run.memory.get_peak_stats()
    return {
        "global_step": state.step,
        "acc_step": state.acc_step,
        "speed/wps": wps,
        "speed/FLOPS": run.flop_per_token * wps,
        # The mean since the last line: to time a step of its own, the device would be waited for.
        "speed/curr_iter_time": seconds / speed.micro_batches,
        "speed/data_load_time": data_load_time,
        "optim/grad_norm": grad_norm,
        "optim/lr": lr,
        "optim/total_tokens": run.dp_degree * micro_batches * run.tokens_per_micro_batch,
        **{f"memory/{key}": value for key, value in memory._asdict().items()},
    }


def log_line(metrics: dict[str, Any], loss: float) -> str:
    """Lingua's line; the loss is this rank's."""
    fields = (
        f"step: {metrics['global_step']}",
        f"acc: {metrics['acc_step']}",
        f"loss: {loss:>7.4f}",
        f"grad: {metrics['optim/grad_norm']:.2e}",
        f"flops: {metrics['speed/FLOPS']:.2e}",
        f"wps: {metrics['speed/wps']:.2e}",
        f"iter: {metrics['speed/curr_iter_time']:>7.4f}",
        f"data: {metrics['speed/data_load_time']:>5.2f}",
        f"lr: {metrics['optim/lr']:.2e}",
        f"mem: {metrics['memory/max_active_pct']:.0f}%",
        f"pow: {metrics['memory/power_draw'] / 1000:.0f} W",
    )
    return "  ".join(fields)
