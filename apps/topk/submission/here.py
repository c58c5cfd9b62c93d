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
    outcomes: list[str] = []
    done = set()
    for n, job in enumerate(training):
        problem = _run(f"run {n + 1} of {len(training)}: {job.name}", job)
        problem = problem or _not_finished(job)
        if problem is None:
            done.add(n)
        outcomes.append(_outcome(f"run {job.name}", problem))
    for n, job in enumerate(evaluations):
        if n in done:
            problem = _run(f"evaluation {n + 1} of {len(evaluations)}: {job.name}", job)
        else:
            problem = "not started, since its run is not done"
        outcomes.append(_outcome(f"evaluation {job.name}", problem))
    print("\n".join(outcomes), flush=True)
    return int(any(not line.endswith(DONE) for line in outcomes))


DONE = ": done"


def _outcome(what: str, problem: str | None) -> str:
    return f"{what}{DONE}" if problem is None else f"{what}: FAILED: {problem}"


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
