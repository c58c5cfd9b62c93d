"""Which run each one is compared with: its vanilla twin."""

from collections.abc import Sequence
from pathlib import Path

from apps.topk.comparison.runs import Run
from lingua_topk.errors import ConfigError

# A twin shares these; what they are called in a note.
SHARED = {
    "dim": "D",
    "n_layers": "L",
    "vocab_size": "vocabulary",
    "parameters": "parameters",
    "tokens": "tokens trained",
    "steps": "steps planned",
    "step": "step evaluated",
}
HOW_TO_CHOOSE = "--twin NAME forces one"


def unlike(run: Run, twin: Run) -> str:
    """Where the two models differ beside TopK, as text; empty where they do not."""
    pairs = {
        label: (getattr(run.model, name), getattr(twin.model, name))
        for name, label in SHARED.items()
    }
    return ", ".join(f"{label} {a}, not {b}" for label, (a, b) in pairs.items() if a != b)


def find_twin(run: Run, runs: Sequence[Run]) -> tuple[Run | None, str]:
    """The vanilla twin of a TopK run, or None and why there is none.

    That of a steered model is the same model as it is. A vanilla run needs no twin, and no reason.
    """
    if run.steered:
        return _unsteered(run, runs)
    if run.model.topk is None:
        return None, ""
    vanilla = [one for one in runs if one.model.topk is None]
    if not vanilla:
        return None, "no vanilla run was given to compare it with"
    fitting = [one for one in vanilla if not unlike(one, run)]
    if len(fitting) == 1:
        return fitting[0], ""
    if fitting:
        names = ", ".join(one.name for one in fitting)
        return None, f"several vanilla runs fit ({names}): {HOW_TO_CHOOSE}"
    reasons = "; ".join(f"{one.name} has {unlike(one, run)}" for one in vanilla[:3])
    more = f"; and {len(vanilla) - 3} more" if len(vanilla) > 3 else ""
    return None, f"no vanilla run fits ({reasons}{more}): {HOW_TO_CHOOSE}"


def _unsteered(run: Run, runs: Sequence[Run]) -> tuple[Run | None, str]:
    """The evaluation of the same checkpoint without steering, or None and why there is none."""
    found = [one for one in runs if not one.steered and one.checkpoint == run.checkpoint]
    if len(found) == 1:
        return found[0], ""
    if found:
        names = ", ".join(one.name for one in found)
        return None, f"it was evaluated unsteered several times ({names}): {HOW_TO_CHOOSE}"
    return None, f"no evaluation of its checkpoint without steering was given: {HOW_TO_CHOOSE}"


def forced_twin(name: str, runs: Sequence[Run]) -> Run:
    """The run called `name` in the table, or else by its model or its path. ConfigError."""
    for match in (
        lambda run: run.name == name,
        lambda run: run.model.name == name,
        lambda run: run.given == Path(name),
    ):
        found = [run for run in runs if match(run)]
        if len(found) == 1:
            return found[0]
        if found:
            break
    known = ", ".join(repr(run.name) for run in runs)
    problem = "is not one run" if found else "is none of the runs"
    raise ConfigError(f"--twin={name!r} {problem}: choose one of {known}")
