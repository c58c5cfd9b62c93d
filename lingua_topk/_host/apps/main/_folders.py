"""What rank 0 takes hold of and writes before a run, and how the others hear that it cannot."""

import errno
import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from lingua._lock import folders_of_run, held
from lingua._manifest import from_first
from lingua.args import dump_config
from lingua.errors import ConfigError, UserError

if TYPE_CHECKING:
    from apps.main.train import TrainArgs


def take_folders(args: "TrainArgs", stack: ExitStack) -> list[str]:
    """Lock what the run writes until `stack` ends; lines for the log. ConfigError."""
    checkpoints = Path(args.checkpoint.path)
    if checkpoints.exists() and not checkpoints.is_dir():
        raise _unwritable(args, os.strerror(errno.EEXIST))
    wanted = folders_of_run(args.dump_dir, args.checkpoint.path)
    notes = [stack.enter_context(held(folder, field)) for field, folder in wanted]
    return [note for note in notes if note]


def raise_in_all(error: UserError | None) -> None:
    """What rank 0 met, on every rank: alone it would leave the others waiting."""
    error = from_first(error)
    if error is not None:
        raise error


def write_config(args: "TrainArgs", dump_dir: Path) -> None:
    try:
        for folder in (Path(args.checkpoint.path), dump_dir):
            folder.mkdir(parents=True, exist_ok=True)
        dump_config(args, dump_dir / "config.yaml", log_config=False)
    except OSError as error:
        raise _unwritable(args, error.strerror) from None


def _unwritable(args: "TrainArgs", reason: str) -> ConfigError:
    return ConfigError(
        f"dump_dir={args.dump_dir} or checkpoint.path={args.checkpoint.path} cannot be written"
        f" ({reason}): make room there, or give another folder"
    )
