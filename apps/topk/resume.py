"""A run that goes on: what may have changed since its checkpoint, and what may not."""

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from apps.topk.model import TopKTrainArgs
from lingua.distributed import get_world_size
from lingua_topk._host.lingua._manifest import is_as_written
from lingua_topk.errors import ConfigError

logger = logging.getLogger(__name__)

# Sections and keys that say where and how a run works, and not what comes out.
MAY_CHANGE = (
    "name",
    "dump_dir",
    "steps",
    "save_at",
    "nonfinite",
    "changed_data",
    "gc_collect_freq",
    "probe_freq",
    "async_eval_gpus",
    "env",
    "profiling",
    "logging",
    "checkpoint",
    "eval",
    "distributed",
    "data.load_async",
    "data.max_malformed",
    "model.topk.dead_window",
)
MAY_NOT_CHANGE_ALTHOUGH = (  # within a section that may
    "distributed.model_dtype",
    "distributed.float8_recipe",
    "distributed.float8_filter",
)
# These may where the number of processes changes and the tokens of a step do not.
SHARE_OF_BATCH = ("grad_acc_steps", "data.batch_size")
PATHS = ("data.root_dir", "data.tokenizer.path")
# The host fills these in: from the tokenizer, data.seq_len, dump_dir and the number of processes.
FILLED_IN = (
    "model.vocab_size", "model.max_seqlen", "checkpoint.path", "distributed.dp_replicate",
)  # fmt: skip


def checkpoint_folder(args: TopKTrainArgs) -> Path:
    """Where a run has its checkpoints."""
    return Path(args.checkpoint.path or Path(args.dump_dir, "checkpoints"))


def newest_params(args: TopKTrainArgs) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that can be resumed, and the config in it; None for a new run."""
    states = checkpoint_folder(args).glob("[0-9]*/train_state_00000.json")
    folders = [state.parent for state in states if state.parent.name.isdecimal()]
    for folder in sorted(folders, key=lambda folder: int(folder.name), reverse=True):
        params = read_params(folder)
        if params is not None and is_as_written(folder, "params.json"):
            return folder, params
    return None


def read_params(folder: Path) -> dict[str, Any] | None:
    """The config that is saved in a checkpoint; None where there is none that can be read."""
    try:
        params = json.loads((folder / "params.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return params if isinstance(params, dict) and isinstance(params.get("model"), dict) else None


def check_unchanged(args: TopKTrainArgs) -> list[str]:
    """What changed since the checkpoint and may, a line each; ConfigError for what may not."""
    found = newest_params(args)
    if found is None:
        return []
    folder, saved = found
    _check_kind(args, folder, saved)
    changes = list(_changes(saved, asdict(args)))
    before, now = _processes(args, folder)
    keeps_batch = _sequences(saved, before) == _sequences(asdict(args), now)
    allowed = SHARE_OF_BATCH if before != now and keeps_batch else ()
    refused = [one for one in changes if not _may_change(one[0]) and one[0] not in allowed]
    if refused:
        key, old, new = refused[0]
        if key == "tokenizer_sha256":
            raise ConfigError(
                f"data.tokenizer.path={args.data.tokenizer.path} is another file than the run in"
                f" dump_dir={args.dump_dir} began with (its SHA-256 is {new}, in {folder} it is"
                f" {old}): put that file back to resume it, or give another dump_dir"
            )
        more = f" ({len(refused)} such differences)" if len(refused) > 1 else ""
        raise ConfigError(
            f"{key}={new}, but the run in dump_dir={args.dump_dir} has {old} (in {folder}){more}:"
            " give that value to resume it, or another dump_dir to start a new run"
        )
    lines = [f"{key}: {old} -> {new}" for key, old, new in changes]
    if not keeps_batch:
        lines.append(
            f"processes: {before} -> {now}, and with them the sequences of a step,"
            f" {_sequences(saved, before)} -> {_sequences(asdict(args), now)}; change"
            " grad_acc_steps or data.batch_size as well to keep those"
        )
    return lines


def _processes(args: TopKTrainArgs, folder: Path) -> tuple[int, int]:
    """How many processes that read data saved the checkpoint, and how many there are now."""
    before = len(list(folder.glob("train_state_*.json")))
    return before, get_world_size() // max(args.distributed.tp_size, 1)


def _sequences(config: dict[str, Any], processes: int) -> int:
    """Those of an optimizer step."""
    return processes * config["grad_acc_steps"] * config["data"]["batch_size"]


def _check_kind(args: TopKTrainArgs, folder: Path, saved: dict[str, Any]) -> None:
    """The weights fit both kinds of model, so nothing else would notice."""
    had, has = saved["model"].get("topk"), args.model.topk
    if (had is None) == (has is None):
        return
    kinds = {True: "a plain model", False: "a TopK model"}
    raise ConfigError(
        f"model.topk={None if has is None else asdict(has)} makes {kinds[has is None]}, but the run"
        f" in dump_dir={args.dump_dir} is of {kinds[had is None]} (in {folder}): give model.topk as"
        " there to resume it, or another dump_dir to start a new run"
    )


def _changes(saved: dict[str, Any], wanted: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(key, value in the checkpoint, value now) of what differs; keys of one only count not."""
    saved, wanted = _leaves(saved), _leaves(wanted)
    for key, new in wanted.items():
        old = saved.get(key, new)
        if key in PATHS and old and new and Path(old).resolve() == Path(new).resolve():
            continue
        if key not in FILLED_IN and old != new:
            yield key, old, new


def _may_change(key: str) -> bool:
    within = any(key == name or key.startswith(f"{name}.") for name in MAY_CHANGE)
    return within and key not in MAY_NOT_CHANGE_ALTHOUGH


def _leaves(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"topk": {"k": 4}} as {"topk.k": 4}; the sources of the data stay one value."""
    found: dict[str, Any] = {}
    for name, value in section.items():
        key = prefix + name
        if isinstance(value, dict) and value and key != "data.sources":
            found.update(_leaves(value, f"{key}."))
        else:
            found[key] = list(value) if isinstance(value, tuple) else value
    return found


def log_start(args: TopKTrainArgs, changes: list[str]) -> None:
    """Say in the log what is not as it was, or as one might think."""
    for change in changes:
        logger.info("changed since the checkpoint: %s", change)
    if args.model.topk is not None and any(change.startswith("steps:") for change in changes):
        logger.warning(
            "with steps=%d the learning rate and alpha of the steps to come are those of a run of"
            " that length: alpha is 0 from step %d on",
            args.steps, round(args.steps * args.model.topk.anneal_ratio),
        )  # fmt: skip
    topk = args.model.topk
    if topk is not None and topk.site == "residual" and topk.k >= args.model.dim:
        logger.warning(
            "model.topk.k=%d is not below model.dim=%d: every component survives, and the model is"
            " a plain one with an activation at the end of its blocks", topk.k, args.model.dim,
        )  # fmt: skip
    if newest_params(args) is None and args.checkpoint.init_ckpt_path:
        _log_kind_of_weights(args)


def _log_kind_of_weights(args: TopKTrainArgs) -> None:
    folder = Path(args.checkpoint.init_ckpt_path)
    params = read_params(folder)
    if params is None:
        logger.warning("%s has no params.json that says of what model its weights are", folder)
        return
    had, has = params["model"].get("topk"), args.model.topk
    if had is not None and has is None:
        logger.warning(
            "the initial weights in %s are of a TopK model (k=%s); this run makes a plain one of"
            " them, since model.topk is not set", folder, had.get("k"),
        )  # fmt: skip
