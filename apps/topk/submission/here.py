"""A sweep without a queue: one job after the other, on this machine or in this allocation."""

from collections.abc import Sequence
from timeit import default_timer as timer

from apps.topk.submission.finished import finished_checkpoint
from apps.topk.submission.scripts import Job
from lingua_topk._host.lingua.stool import run_launcher
from lingua_topk.errors import UserError


def run_all(training: Sequence[Job], evaluations: Sequence[Job]) -> int:
    """The runs, then the evaluations of those that are done; 0, or 1 where one of them failed.

    Ctrl-C reaches the run, which saves and ends, and ends all.
    """
    outcomes: list[tuple[str, str | None]] = []  # what, and what went wrong with it
    done = set()
    for n, job in enumerate(training):
        problem = _run(f"run {n + 1} of {len(training)}: {job.name}", job)
        problem = problem or _not_finished(job)
        if problem is None:
            done.add(n)
        outcomes.append((f"run {job.name}", problem))
    for n, job in enumerate(evaluations):
        if n in done:
            problem = _run(f"evaluation {n + 1} of {len(evaluations)}: {job.name}", job)
        else:
            problem = "not started, since its run is not done"
        outcomes.append((f"evaluation {job.name}", problem))
    for what, problem in outcomes:
        print(f"{what}: {'done' if problem is None else f'FAILED: {problem}'}", flush=True)
    return int(any(problem is not None for _, problem in outcomes))


def _run(title: str, job: Job) -> str | None:
    """What went wrong, or None."""
    print(f"{title} (bash {job.script})", flush=True)
    started = timer()
    status = run_launcher(["bash", str(job.script)])
    seconds = timer() - started
    print(f"{title}: ended with status {status} after {seconds:,.0f} s", flush=True)
    return None if status == 0 else f"status {status}; see {job.folder}/logs and what it said above"


def _not_finished(job: Job) -> str | None:
    try:
        finished_checkpoint(job.folder)
        return None
    except UserError as error:
        return str(error)
