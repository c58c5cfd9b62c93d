"""A sweep's arrays, handed to sbatch."""

import re
import subprocess
from pathlib import Path
from shlex import quote

from lingua_topk._host.lingua.stool import say
from lingua_topk.errors import UserError


class SubmissionError(UserError):
    """The launcher did not take a job."""

    exit_status = 1


def submit_all(launcher: str, folder: Path, has_evaluations: bool, n_runs: int) -> int:
    """Submit the runs, and what evaluates each once it has ended well; the exit status.

    An evaluation whose run failed can never start: it is cancelled, instead of waiting for ever.
    """
    runs = _submit(launcher, [], folder / "submit.slurm")
    say(f"submitted {n_runs} runs as job array {runs}, elements 0 to {n_runs - 1}")
    evaluations = None
    if has_evaluations:
        options = [f"--dependency=aftercorr:{runs}", "--kill-on-invalid-dep=yes"]
        script = folder / "evaluate.slurm"
        try:
            evaluations = _submit(launcher, options, script)
        except SubmissionError as error:
            raise SubmissionError(
                f"{error}; the runs are submitted all the same. To have them evaluated:"
                f" {launcher} {' '.join(options)} {quote(str(script))}"
            ) from None
        say(
            f"submitted their evaluations as job array {evaluations}: each starts when the run of"
            " its number has ended well, and is cancelled where that failed"
        )
    ids = [one for one in (runs, evaluations) if one is not None]
    logs, script = quote(f"{folder}/logs"), quote(f"{folder}/submit.slurm")
    say(
        f"look:        squeue --jobs={','.join(ids)}\n"
        f"             {logs}, and the folders logs of every run\n"
        f"cancel:      scancel {' '.join(ids)}, or one run: scancel {runs}_N\n"
        f"once more:   sbatch --array=N {script} goes on with run N where it stopped"
    )
    if has_evaluations:
        say(f"             and its evaluation: {evaluate_again(folder)}, JOB being what that says")
    return 0


def evaluate_again(folder: Path) -> str:
    """The command that evaluates run N of a sweep, once the job that goes on with it is done."""
    options = "--dependency=aftercorr:JOB --kill-on-invalid-dep=yes --array=N"
    return f"sbatch {options} {quote(f'{folder}/evaluate.slurm')}"


def _submit(launcher: str, options: list[str], script: Path) -> str:
    """The job's id."""
    command = [*launcher.split(), "--parsable", *options, str(script)]
    say(" ".join([*command[:-1], quote(command[-1])]))
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    found = re.fullmatch(r"(\d+)(;.*)?", (done.stdout.splitlines() or [""])[-1])
    if done.returncode or found is None:
        said = done.stdout.strip()
        raise SubmissionError(
            f"{launcher} ended with status {done.returncode} for {script}"
            f"{f' and said {said!r}' if said else ''}"
        )
    return found[1]


def submit_single(launcher: list[str], script: Path) -> int:
    """Submit one job, and say how to look at it and cancel it. As `stool.start`."""
    try:
        job = _submit(" ".join(launcher), [], script)
    except SubmissionError as error:
        raise SubmissionError(
            f"{error}; dump_dir={script.parent} stays as it is: once that is mended, give the same"
            " command with dirs_exists_ok=true"
        ) from None
    say(
        f"submitted job {job}\n"
        f"look:    squeue --jobs={job}\n"
        f"cancel:  scancel --signal=TERM {job} saves first; scancel {job} may not"
    )
    return 0
