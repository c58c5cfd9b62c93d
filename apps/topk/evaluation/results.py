"""The files of an evaluation, in Meta Lingua's form and with their origin."""

import json
from collections.abc import Iterable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apps.topk import cli
from apps.topk.provenance import write_json, write_text
from apps.topk.records import drop_step
from lingua_topk.errors import ConfigError

if TYPE_CHECKING:
    from apps.topk.evaluation.validation import Documents  # with torch, and to compare needs none

# The key of results.json and validation.json that is no task and no source.
PROVENANCE = "provenance"
TASKS_NAME = "results.json"
VALIDATION_NAME = "validation.json"
DOCUMENTS_NAME = "validation_documents.jsonl"
# Written last: it is there when all of the evaluation is.
DONE_NAME = "provenance.json"
TASK_RECORDS = "metrics.eval.jsonl"
VALIDATION_RECORDS = "metrics.validation.jsonl"


def begin(folder: Path, checkpoint: Path, steer: dict[str, Any] | None = None) -> None:
    """Take back that all is there.

    steer: what the model is steered by, as the results tell it; None for the model as it is.
    ConfigError where the evaluation of another checkpoint is, or under other interventions.
    """
    if not is_its_place(folder, checkpoint):
        _refuse_other(folder, checkpoint, steer)
    (folder / DONE_NAME).unlink(missing_ok=True)


def _refuse_other(folder: Path, checkpoint: Path, steer: dict[str, Any] | None) -> None:
    for origin in _origins_in(folder):
        there = origin["checkpoint"]
        if Path(there).resolve() != checkpoint.resolve():
            raise ConfigError(
                f"dump_dir={folder} holds the evaluation of {there}: give another folder for that"
                f" of {checkpoint.resolve()}"
            )
        if _interventions(origin.get("steer")) != _interventions(steer):
            raise ConfigError(
                f"dump_dir={folder} holds the evaluation of {_model_told(origin.get('steer'))}:"
                f" give another folder for that of {_model_told(steer)}"
            )


def is_steered(folder: Path) -> bool:
    """Whether the evaluation in a folder is of a steered model."""
    origin = next(_origins_in(folder), {})  # the first is the smallest file
    return origin.get("steer") is not None


def steering_told(steer: Any) -> str:
    """What a model was steered by, as its results tell it, as one printable line; "" for none."""
    if steer is None:
        return ""
    told = steer.get("told") if isinstance(steer, dict) else None
    return cli.one_line(told) if isinstance(told, str) else "something that is not told"


def _model_told(steer: Any) -> str:
    told = steering_told(steer)
    return f"the model steered by {told}" if told else "the model as it is"


def _interventions(steer: Any) -> Any:
    return steer.get("interventions") if isinstance(steer, dict) else steer


def is_its_place(folder: Path, checkpoint: Path) -> bool:
    """Whether training evaluates `checkpoint` there: what is in it is of a run that was moved."""
    checkpoint = checkpoint.resolve()
    run = checkpoint.parents[1] if len(checkpoint.parts) > 2 else checkpoint
    return folder.resolve() == run / "evals" / checkpoint.name


def _origins_in(folder: Path) -> Iterator[dict[str, Any]]:
    """Where the files of an evaluation come from; of those that say it."""
    for name in (DONE_NAME, VALIDATION_NAME, TASKS_NAME):
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8"))
            origin = content.get(PROVENANCE, content)
            if isinstance(origin["checkpoint"], str):
                yield origin
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            continue


def write_validation(
    folder: Path, results: dict[str, dict[str, Any]], lines: Iterable[dict[str, Any]],
    origin: dict[str, Any],
) -> None:  # fmt: skip
    """validation.json, and validation_documents.jsonl from `lines`."""
    text = "".join(json.dumps(line) + "\n" for line in lines)
    write_text(folder / DOCUMENTS_NAME, text)
    write_json(folder / VALIDATION_NAME, {**results, PROVENANCE: origin})


def write_tasks(folder: Path, results: dict[str, Any], origin: dict[str, Any]) -> None:
    """results.json: what `simple_evaluate` gives."""
    write_json(folder / TASKS_NAME, {**results, PROVENANCE: origin})


def write_done(folder: Path, origin: dict[str, Any]) -> None:
    write_json(folder / DONE_NAME, origin)


def document_lines(source: str, documents: "Documents", nll) -> Iterator[dict[str, Any]]:
    """A line of validation_documents.jsonl for each document; nll: nats, [documents]."""
    for index, (tokens, n_bytes, nats) in enumerate(
        zip(documents.tokens, documents.sizes, nll.tolist(), strict=True)
    ):
        yield {
            "source": source, "document": index, "tokens": max(len(tokens) - 1, 0),
            "bytes": n_bytes, "nll": nats,
        }  # fmt: skip


def append_record(path: Path, content: dict[str, Any], step: int | None) -> None:
    """A line of a run's records; an evaluation that is done again replaces its own."""
    line = {"created_at": datetime.now(timezone.utc).isoformat(), **content}
    if step is not None:
        line["global_step"] = step
    if path.is_file() and step is not None:
        drop_step(path, step)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
