"""The checkpoints of one run, in the order in which it wrote them."""

import logging
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from apps.topk.checkpoint import METADATA_NAME, Checkpoint, open_checkpoint
from lingua_topk.errors import CheckpointError

logger = logging.getLogger(__name__)


def checkpoints_of(ckpts: str) -> list[Checkpoint]:
    """All whole checkpoints of the run in `ckpts`, by step; at least two, of one model.

    ckpts: the dump_dir of a training run, or the folder `checkpoints` in it. CheckpointError
    where there are too few, one is damaged, or one is of another model than the last.
    """
    folder = Path(ckpts).expanduser()
    if not ckpts or not folder.is_dir():
        raise CheckpointError(
            f"ckpts={ckpts!r} is not a folder: give the dump_dir of a training run"
        )
    inside = folder / "checkpoints"
    folders = _folders(inside if inside.is_dir() else folder)
    if len(folders) < 2:
        found = f"has one checkpoint only, {folders[0]}" if folders else "has no checkpoint"
        raise CheckpointError(
            f"ckpts={ckpts!r} {found}: tracing needs at least two of one run; checkpoint.dump.every"
            " says how often training keeps one"
        )
    checkpoints = sorted((_open(one) for one in folders), key=lambda one: one.step)
    for one in checkpoints[:-1]:
        _check_same_model(one, checkpoints[-1])
    return checkpoints


def _folders(folder: Path) -> list[Path]:
    found = sorted(one for one in folder.iterdir() if re.fullmatch(r"\d{10,}", one.name))
    whole = [one for one in found if (one / METADATA_NAME).is_file()]
    for one in found:
        if one not in whole:
            logger.warning("%s is not a whole checkpoint; it is passed over", one)
    return whole


def _open(folder: Path) -> Checkpoint:
    checkpoint = open_checkpoint(folder)
    if checkpoint.step is None:
        raise CheckpointError(
            f"{folder} does not say at which step it was saved: take it out of the folder, or put"
            " its train_state_00000.json back"
        )
    return checkpoint


def _check_same_model(one: Checkpoint, last: Checkpoint) -> None:
    ours, theirs = _described(one), _described(last)
    different = [name for name in ours if ours[name] != theirs[name]]
    if different:
        name = different[0]
        raise CheckpointError(
            f"{one.folder} is of another model than {last.folder}: {name} is {ours[name]!r} in the"
            f" one and {theirs[name]!r} in the other; give a folder with checkpoints of one run"
        )


def _described(checkpoint: Checkpoint) -> dict[str, Any]:
    """What neurons of two checkpoints must have in common to be compared."""
    args = {f"model.{name}": value for name, value in asdict(checkpoint.model_args).items()}
    settings = checkpoint.params["data"]["tokenizer"]
    tokenizer = {f"data.tokenizer.{name}": settings.get(name) for name in ("name", "path")}
    return args | tokenizer | {"tokenizer_sha256": checkpoint.params.get("tokenizer_sha256")}
