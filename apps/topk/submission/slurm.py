"""A sweep's arrays, handed to sbatch."""

import re
import subprocess
import sys
from pathlib import Path

from lingua_topk.errors import UserError


class SubmissionError(UserError):
    """The launcher did not take a job."""

    exit_status = 1


def submit_all(launcher: str, folder: Path, has_evaluations: bool, n_runs: int) -> int:
    """Submit the runs, and what evaluates each once it has ended well; the exit status.

    An evaluation whose run failed can never start: it is cancelled, instead of waiting for ever.
    """
    runs = _submit(launcher, [], folder / "submit.slurm")
    print(f"submitted {n_runs} runs as job array {runs}, elements 0 to {n_runs - 1}")
    evaluations = None
    if has_evaluations:
        options = [f"--dependency=aftercorr:{runs}", "--kill-on-invalid-dep=yes"]
        script = folder / "evaluate.slurm"
        try:
            evaluations = _submit(launcher, options, script)
        except SubmissionError as error:
            raise SubmissionError(
                f"{error}; the runs are submitted all the same. To have them evaluated:"
                f" {launcher} {' '.join(options)} {script}"
            ) from None
        print(
            f"submitted their evaluations as job array {evaluations}: each starts when the run of"
            " its number has ended well, and is cancelled where that failed"
        )
    ids = [one for one in (runs, evaluations) if one is not None]
    print(
        f"look:        squeue --jobs={','.join(ids)}\n"
        f"             {folder}/logs, and the folders logs of every run\n"
        f"cancel:      scancel {' '.join(ids)}, or one run: scancel {runs}_N\n"
        f"once more:   sbatch --array=N {folder}/submit.slurm goes on with run N where it stopped"
    )
    return 0


def _submit(launcher: str, options: list[str], script: Path) -> str:
    """The job's id."""
    command = [*launcher.split(), "--parsable", *options, str(script)]
    print(" ".join(command), flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    found = re.fullmatch(r"(\d+)(;.*)?", (done.stdout.splitlines() or [""])[-1])
    if done.returncode or found is None:
        said = done.stdout.strip()
        raise SubmissionError(
            f"{launcher} ended with status {done.returncode} for {script}"
            f"{f' and said {said!r}' if said else ''}"
        )
    return found[1]


def tell_of_single(name: str) -> None:
    """How to look at and cancel a job whose id sbatch has printed."""
    print(f"look:    squeue --me --name={name}\ncancel:  scancel --me --name={name}")
    sys.stdout.flush()
