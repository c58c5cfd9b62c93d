"""What a run is refused for, found out before anything is written."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lingua._manifest import find_damage, is_as_written
from lingua.checkpoint import (
    CheckpointArgs,
    CheckpointManager,
    check_fits,
)
from lingua.data import init_dataloader_state_from_args
from lingua.distributed import get_world_size, validate_distributed_args
from lingua.errors import CheckpointError, ConfigError
from lingua.metrics import import_wandb
from lingua.optim import build_lr_fn

if TYPE_CHECKING:
    from apps.main.train import TrainArgs

# Keys of the model that change what is reported and not what is trained.
FREE_KEYS = ("topk.dead_window",)


def validate_train_args(args: "TrainArgs", output_size: int) -> None:
    """Fill in what follows from other fields; ConfigError for what cannot run.

    output_size: the tokenizer's number of tokens.
    """
    if not args.dump_dir:
        raise ConfigError("dump_dir is not set: give a folder for what the run writes")
    for name, value, least in (
        ("steps", args.steps, 1),
        ("grad_acc_steps", args.grad_acc_steps, 1),
        ("gc_collect_freq", args.gc_collect_freq, 1),
        ("logging.freq", args.logging.freq, 1),
        ("checkpoint.dump.every", args.checkpoint.dump.every, 1),
        ("checkpoint.eval.every", args.checkpoint.eval.every, 1),
        ("checkpoint.dump.keep", args.checkpoint.dump.keep, 0),
        ("checkpoint.eval.keep", args.checkpoint.eval.keep, 0),
        ("logging.acc_freq", args.logging.acc_freq or 1, 1),
        ("data.batch_size", args.data.batch_size, 1),
        ("data.seq_len", args.data.seq_len, 1),
        ("data.n_views", args.data.n_views, 2),  # the input and its target
        ("model.dim", args.model.dim, 1),
        ("model.n_layers", args.model.n_layers, 1),
    ):
        if value < least:
            raise ConfigError(f"{name}={value} is too small: give at least {least}")
    _validate_numbers(args)
    for name, text in asdict(args.env).items():
        if "\0" in text:
            raise ConfigError(f"env.{name}={text!r} holds a NUL: an environment variable cannot")
    validate_distributed_args(args.distributed, get_world_size())
    build_lr_fn(args.optim, args.steps)  # refuses what the optimizer cannot take
    _validate_vocabulary(args, output_size)
    # Reads the folders of the sources; the state itself is made anew when the run starts.
    init_dataloader_state_from_args(args.data, rank=0, world_size=1)
    if args.checkpoint.path is None:
        args.checkpoint.path = str(Path(args.dump_dir) / "checkpoints")
    args.model.max_seqlen = args.data.seq_len
    if args.probe_freq is not None:
        raise ConfigError(
            f"probe_freq={args.probe_freq} is not offered by the embedded host: set it to null, or"
            " run inside Meta Lingua (LINGUA_HOME)"
        )
    if args.async_eval_gpus is not None:
        raise ConfigError(
            f"async_eval_gpus={args.async_eval_gpus} is not offered by the embedded host yet: set"
            " it to null, and evaluation runs between two training steps"
        )
    if args.logging.wandb is not None:
        import_wandb()
        args.logging.wandb.name = args.logging.wandb.name or args.name


def _validate_numbers(args: "TrainArgs") -> None:
    """What torch would stumble over later, or train NaN with."""
    for name, seed in (("seed", args.seed), ("model.seed", args.model.seed)):
        if not -(2**63) <= seed < 2**63:
            raise ConfigError(f"{name}={seed} is out of range: give a number of 64 bits")
    for name, value, fits, allowed in (
        ("rope_theta", args.model.rope_theta, args.model.rope_theta > 0, "above 0"),
        ("norm_eps", args.model.norm_eps, args.model.norm_eps >= 0, "of at least 0"),
        ("init_base_std", args.model.init_base_std, (args.model.init_base_std or 1) > 0, "above 0"),
        (
            "sliding_window",
            args.model.sliding_window,
            (args.model.sliding_window or 1) >= 1 and args.model.sliding_window != 0,
            "of at least 1",
        ),
    ):
        if not fits or (value is not None and not math.isfinite(value)):
            raise ConfigError(f"model.{name}={value} is not allowed: give a number {allowed}")


def _validate_vocabulary(args: "TrainArgs", output_size: int) -> None:
    if args.model.vocab_size < 0:
        args.model.vocab_size = output_size
    if args.model.vocab_size < output_size:
        raise ConfigError(
            f"model.vocab_size={args.model.vocab_size} is smaller than the tokenizer's"
            f" {output_size} tokens: leave it out, or give at least that many"
        )


def newest_checkpoint(args: CheckpointArgs) -> Path | None:
    """The checkpoint that a run would go on from, or None."""
    if not Path(args.path).is_dir():
        return None
    manager = CheckpointManager(args)
    readable = [one for one in manager.existing_saves if is_as_written(one, "params.json")]
    manager.existing_saves = readable or manager.existing_saves
    return manager.get_last_step_path()


def validate_checkpoints(args: "TrainArgs", model: nn.Module) -> None:
    """CheckpointError or ConfigError where the weights to begin with are not this model's.

    model: as `args.model` describes it, on any device.
    """
    newest = newest_checkpoint(args.checkpoint)
    if newest is None:
        if args.checkpoint.init_ckpt_path:
            _validate_initial_weights(args, model)
        return
    if not is_as_written(newest, "params.json"):
        raise CheckpointError(
            f"checkpoint.path={args.checkpoint.path} holds no checkpoint whose params.json is as it"
            f" was written (the newest is {newest}): put one back, or move the folder away to begin"
            " anew"
        )
    try:
        saved = json.loads((newest / "params.json").read_text(encoding="utf-8"))["model"]
        saved = _leaves(saved)
    except (ValueError, KeyError, OSError, AttributeError) as error:
        raise CheckpointError(
            f"{newest}/params.json cannot be read ({error!r}): remove the folder to go on from an"
            " earlier checkpoint"
        ) from None
    wanted = _leaves(asdict(args.model))
    same_kind = ("topk.k" in saved) == ("topk.k" in wanted)
    for key in sorted({*saved, *wanted}):
        is_new = key not in saved and same_kind  # a checkpoint of an earlier version
        if key in FREE_KEYS or is_new or saved.get(key) == wanted.get(key):
            continue
        raise ConfigError(
            f"model.{key}={wanted.get(key)}, but the run in dump_dir={args.dump_dir} has"
            f" {saved.get(key)} (in {newest}): give that value to resume it, or another dump_dir to"
            " start a new run"
        )


def _validate_initial_weights(args: "TrainArgs", model: nn.Module) -> None:
    folder = Path(args.checkpoint.init_ckpt_path)
    try:
        check_fits(model.state_dict(), folder, "model")
        damage = find_damage(folder)
        if damage:
            raise CheckpointError(f"{folder} is damaged: {damage}: use another checkpoint")
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint.init_ckpt_path: {error}") from None
    if not hasattr(args.model, "topk") and _has_topk(folder):
        # The weights have the keys and shapes of a plain model, and would be taken for one.
        raise CheckpointError(
            f"checkpoint.init_ckpt_path={folder} is of a TopK model (model.topk in its"
            " params.json), which apps.main.train would make a plain one: start the run with"
            " apps.topk.train"
        )


def _has_topk(folder: Path) -> bool:
    try:
        params = json.loads((folder / "params.json").read_text(encoding="utf-8"))
        return params["model"].get("topk") is not None
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False


def _leaves(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"topk": {"k": 4}} as {"topk.k": 4}."""
    found = {}
    for name, value in section.items():
        if isinstance(value, dict):
            found.update(_leaves(value, f"{prefix}{name}."))
        else:
            found[prefix + name] = value
    return found
