"""A run: one folder of evaluations, read."""

import re
import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path

from apps.topk.comparison.fields import Fields, read_json
from apps.topk.comparison.harness_results import members_of_groups, read_harness
from apps.topk.comparison.measures import Measure, Result
from apps.topk.comparison.models import Model, read_model
from apps.topk.comparison.validation_results import read_validation
from apps.topk.evaluation.results import (
    DOCUMENTS_NAME,
    PROVENANCE,
    TASKS_NAME,
    VALIDATION_NAME,
    is_steered,
    steering_told,
)
from lingua_topk.errors import ConfigError, DataError

WRITTEN = (VALIDATION_NAME, TASKS_NAME)


@dataclass
class Run:
    """What is known of one evaluated model.

    Attributes:
        name: what it is called in the table.
        given: the path that was asked for; `folder` the one with the results.
        steered: what its model was steered by; "" for the model as it is.
        members: tasks that are part of a group with measures of its own.
        origins: a line on each file: commit, checkpoint, step.
        notes: what was left out.
    """

    name: str
    given: Path
    folder: Path
    model: Model
    checkpoint: str | None
    results: dict[Measure, Result]
    steered: str = ""
    members: set[str] = field(default_factory=set)
    origins: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def commit(self) -> str:
        return ", ".join(dict.fromkeys(self.origins.values()))


def read_run(given: Path) -> Run:
    """The evaluation in `given`, or the newest one of the training run that wrote it.

    ConfigError for what is no folder, DataError where there is no evaluation or a damaged one.
    """
    folder = evaluation_folder(given)
    files = {name: read_json(folder / name) for name in WRITTEN if (folder / name).is_file()}
    origins = {name: content.section(PROVENANCE) for name, content in files.items()}
    model, checkpoint = _one_model(folder, origins)
    steered = _steered(folder, origins)
    name = f"{model.name}, steered" if steered else model.name
    run = Run(name, given, folder, model, checkpoint, {}, steered)
    if steered:
        run.notes.append(f"the model is steered: {steered}")
    for name, origin in origins.items():
        run.origins[name] = origin.text("commit") or "unknown"
    if VALIDATION_NAME in files:
        documents = folder / DOCUMENTS_NAME
        found, notes = read_validation(files[VALIDATION_NAME], documents, model.tokenizer)
        run.results |= found
        run.notes += notes
    if TASKS_NAME in files:
        found, notes = read_harness(files[TASKS_NAME])
        run.results |= found
        run.notes += notes
        run.members = members_of_groups(files[TASKS_NAME])
    return run


def evaluation_folder(given: Path) -> Path:
    """`given` where it holds results, else the newest folder in `given`/evals that does.

    There those of a steered model are passed over: they are not what training led to.
    """
    if not given.is_dir():
        raise ConfigError(
            f"RUN={str(given)!r} is not a folder: give the dump_dir of a training run, or one of"
            " its evaluations, such as DUMP_DIR/evals/0000001000"
        )
    if _has_results(given):
        return given
    steps = [path for path in given.glob("evals/*") if re.fullmatch(r"\d{10,}", path.name)]
    steps = [path for path in steps if _has_results(path)]
    found = [path for path in steps if not is_steered(path)]
    if found:
        return max(found, key=lambda path: int(path.name))
    kind = "evaluation but of steered models" if steps else "evaluation"
    raise DataError(
        f"RUN={str(given)!r} has no {kind} ({' or '.join(WRITTEN)}, also in evals/<step>):"
        f" make one with {_how_to_evaluate(given)}"
    )


def _has_results(folder: Path) -> bool:
    return any((folder / name).is_file() for name in WRITTEN)


def _how_to_evaluate(given: Path) -> str:
    checkpoints = sorted(path.parent for path in given.glob("checkpoints/*/.metadata"))
    newest = checkpoints[-1] if checkpoints else Path("DUMP_DIR/checkpoints/0000001000")
    out = given / "evals" / newest.name
    return (
        "python -m apps.topk.eval config=configs/eval/validation.yaml"
        f" {shlex.quote(f'ckpt_dir={newest}')} {shlex.quote(f'dump_dir={out}')}"
    )


def _steered(folder: Path, origins: dict[str, Fields]) -> str:
    """What the model of all files was steered by; DataError where they differ in it."""
    told = {steering_told(origin.content.get("steer")) for origin in origins.values()}
    if len(told) > 1:
        raise DataError(
            f"{folder}: {' and '.join(origins)} are of different interventions (steer): evaluate"
            " again, with another dump_dir"
        )
    return told.pop()


def _one_model(folder: Path, origins: dict[str, Fields]) -> tuple[Model, str | None]:
    """The model and checkpoint that all files are of; DataError where they are of two."""
    # One that describes its model serves for one of an older version, which does not.
    telling = [one for one in origins.values() if one.content.get("model") is not None]
    models = [read_model(one) for one in telling or list(origins.values())[:1]]
    steps = {one.whole_or_none("step") for one in origins.values()} - {None}
    if len(steps) > 1 or any(_untold(one) != _untold(models[0]) for one in models):
        raise DataError(
            f"{folder}: {' and '.join(origins)} are of different checkpoints: evaluate one of them"
            " again, with another dump_dir"
        )
    first = (telling or list(origins.values()))[0]
    return models[0], first.text("checkpoint")


def _untold(model: Model) -> Model:
    """The model without what a file may not say."""
    return replace(model, tokens=None, step=None, steps=None)
