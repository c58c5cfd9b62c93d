"""What a job asks SLURM about itself when it ends: whether it was preempted, to be run again."""

import logging
import os
import re
import subprocess

logger = logging.getLogger(__name__)


def is_slurm_job() -> bool:
    """Whether SLURM can be asked about a job that this process is of."""
    return "SLURM_JOB_ID" in os.environ


def job_name() -> str:
    """This job as scontrol is told it.

    One element of an array has the array's own number as SLURM_JOB_ID: by that all its elements
    would be requeued, those that are done included.
    """
    if "SLURM_ARRAY_TASK_ID" in os.environ:
        return "{SLURM_ARRAY_JOB_ID}_{SLURM_ARRAY_TASK_ID}".format(**os.environ)
    return os.environ["SLURM_JOB_ID"]


def is_preempted() -> bool:
    """Whether SLURM ends this job because another is to have its place.

    It sends SIGTERM, as scancel does, and would requeue the job itself at the end of the grace
    time; one that has saved and ended before is taken for done.
    """
    if not is_slurm_job():
        return False
    try:
        shown = _scontrol("show", "job", "-o", job_name())
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("whether SLURM preempted this job is not known: %s", _reason(error))
        return False
    return re.search(r"\bPreemptTime=\d", shown) is not None


def requeue() -> bool:
    """Ask SLURM to run this job again; whether it will. Where it does not, the log says so."""
    job = job_name()
    logger.warning("requeueing SLURM job %s", job)
    try:
        _scontrol("requeue", job)
        return True
    except (OSError, subprocess.SubprocessError) as error:
        logger.error(
            "scontrol requeue %s failed: %s: the run is saved, and goes on when it is submitted"
            " again",
            job, _reason(error),
        )  # fmt: skip
        return False


def _scontrol(*words: str) -> str:
    command = ["scontrol", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout


def _reason(error: Exception) -> str:
    return " ".join((getattr(error, "stderr", None) or str(error)).split())
