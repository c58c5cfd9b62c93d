"""What a run of a study was made with, so that results of other keys are not taken for its own."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apps.topk.evaluation.results import DONE_NAME
from apps.topk.provenance import write_json
from apps.topk.studies.arguments import Run
from lingua_topk.errors import ConfigError

MADE_WITH = "study.json"  # in the folder of a run
FREE_KEYS = ("dump_dir",)  # a study can be moved


def take(run: Run, evaluation: dict[str, Any]) -> None:
    """Write down what a run is made with; ConfigError where one is there that was made otherwise.

    Else results of other keys would be taken for those that are asked for.
    """
    path, now = run.folder / MADE_WITH, {"train": run.config, "eval": evaluation}
    if run.folder.is_dir() and any(run.folder.iterdir()):
        there = _made_with(path)
        other = first_other(there.get("train"), now["train"], FREE_KEYS)
        if other is not None:
            raise ConfigError(
                f"{run.folder} was trained with other keys than this study has ({other} by"
                f" {MADE_WITH} in it): give dump_dir=OTHER, or move it away"
            )
        other = first_other(there.get("eval"), now["eval"])
        if other is not None and (run.evaluation / DONE_NAME).is_file():
            raise ConfigError(
                f"{run.evaluation} was made with other keys than this study has ({other} by"
                f" {run.folder / MADE_WITH}): move it away, or give those keys"
            )
    run.folder.mkdir(parents=True, exist_ok=True)
    write_json(path, now)


def _made_with(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def first_other(there: Any, now: dict[str, Any], free: Sequence[str] = ()) -> str | None:
    """The first key of two configs, as a.b, that has not the same value in both; None for none."""
    if not isinstance(there, dict):
        return "unknown ones"
    for name in dict.fromkeys([*now, *there]):
        if name in free:
            continue
        a, b = there.get(name), now.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            inner = first_other(a, b)
            if inner is not None:
                return f"{name}.{inner}"
        elif a != b or (name in there) != (name in now):
            return f"{name}={json.dumps(a)}"
    return None
