"""What the programs that read neurons take alike, and how it is checked."""

import re
from pathlib import Path

from apps.topk.checkpoint import DTYPES, Checkpoint
from apps.topk.neurons.settings import Settings
from lingua_topk.errors import ConfigError

DEFAULT_K = 64  # where no layer has TopK


def check(settings: Settings, dtype: str, batch_tokens: int, row_length: int) -> None:
    """ConfigError for the first that is not allowed."""
    if not 0 <= settings.threshold < 1:
        raise ConfigError(
            f"threshold={settings.threshold} is not allowed: give at least 0 and less than 1"
        )
    least = {"min_words": 2, "contexts": 1, "context_tokens": 1, "batch_tokens": 1}
    for name, value in (vars(settings) | {"batch_tokens": batch_tokens}).items():
        if name in least and value < least[name]:
            raise ConfigError(f"{name}={value} is too small: give at least {least[name]}")
    if settings.max_words < settings.min_words:
        raise ConfigError(
            f"max_words={settings.max_words} is less than min_words={settings.min_words}: give at"
            " least as many"
        )
    if not 0 <= settings.seed < 2**63:
        raise ConfigError(f"seed={settings.seed} is not allowed: give 0 to {2**63 - 1}")
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} is not known: choose one of {', '.join(DTYPES)}")
    if row_length < 0:
        raise ConfigError(
            f"row_length={row_length} is not allowed: give at least 2, or 0 for that of training"
        )


def listed(text: str) -> list[str]:
    """The names in a text with commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def layers_of(text: str, n_layers: int) -> list[int]:
    """The layers named, rising; all for ""."""
    if not text:
        return list(range(n_layers))
    names = listed(text)
    found = sorted({int(name) for name in names if re.fullmatch(r"[0-9]{1,9}", name)})
    if not found or len(found) < len(set(names)) or found[-1] >= n_layers:
        raise ConfigError(
            f"layers={text!r} is not allowed: give numbers from 0 to {n_layers - 1} with commas"
        )
    return found


def own_k(checkpoint: Checkpoint) -> int:
    """How many values a token are kept where nobody says: the model's own k."""
    topk = checkpoint.model_args.topk
    return DEFAULT_K if topk is None else topk.k


def folder_in_run(checkpoint: Checkpoint, name: str | Path) -> Path:
    """A folder in the dump_dir of the run that a checkpoint lies in, DUMP_DIR/checkpoints/STEP."""
    if checkpoint.folder.parent.name != "checkpoints":
        raise ConfigError(
            f"{str(checkpoint.folder)!r} does not lie in the dump_dir of a run: give --out"
        )
    return checkpoint.folder.parent.parent / name
