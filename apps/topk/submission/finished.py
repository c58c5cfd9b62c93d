"""Whether a run has done its steps: one that ended with status 0 may only have been paused.

A signal before the time limit, SIGTERM and Ctrl-C have it save and end so. SLURM runs it again
where it could be asked to (the job is pending then, and what depends on it waits), and otherwise
takes it for done.
"""

import shlex
from pathlib import Path
from typing import Any

from apps.topk import cli
from lingua_topk.errors import CheckpointError


def finished_checkpoint(run: Path) -> Path:
    """The checkpoint of a run's last step. CheckpointError where the run is not done."""
    from apps.topk.checkpoint import newest_checkpoint

    steps = _steps(run)
    checkpoint = newest_checkpoint(run)
    if int(checkpoint.name) < steps:
        raise CheckpointError(
            f"{run} is at step {int(checkpoint.name):,} of {steps:,}: the run was paused, and is"
            f" not done; go on with sbatch {shlex.quote(f'{run}/submit.slurm')}"
        )
    return checkpoint


def _steps(run: Path) -> int:
    """Those that the run's last start was asked for."""
    path = run / "config.yaml"  # written by training, in full
    if not path.is_file():
        raise CheckpointError(f"{run} has no config.yaml: the run did not start; see {run}/logs")
    steps: Any = cli.read_yaml(str(path)).get("steps")
    if not isinstance(steps, int):
        raise CheckpointError(f"{path}: steps={steps} is no number: it is not what training wrote")
    return steps
