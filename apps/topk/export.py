"""A checkpoint as a Hugging Face folder, and such a folder as a checkpoint again."""

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from apps.topk import cli
from apps.topk.corpus import flags
from apps.topk.corpus.output import publish
from lingua_topk.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from apps.topk.checkpoint import Checkpoint

PROGRAM = "apps.topk.export"
EXAMPLE = "--ckpt DUMP_DIR/checkpoints/0000001000 --out hf/mine"


def main(argv: Sequence[str] | None = None) -> None:
    flags.call(export, PROGRAM, sys.argv[1:] if argv is None else argv, EXAMPLE)


def export(
    *,
    out: str,
    ckpt: str = "",
    from_hf: str = "",
    dtype: str = "",
    as_trained: bool = False,
    tokenizer: bool = True,
) -> None:
    """Write a checkpoint as a Hugging Face folder, or such a folder as a checkpoint.

    A vanilla model becomes a Llama that transformers knows. A TopK model brings its code along:
    load it with trust_remote_code=True, or call lingua_topk.hf.register() before.

    Args:
        out: the folder to write, whole or not at all; a new one, or one that is empty.
        ckpt: the checkpoint to export, such as DUMP_DIR/checkpoints/0000001000.
        from_hf: an exported folder, whose weights may have changed since, to make a checkpoint
            of; give this or ckpt.
        dtype: of the exported weights: fp64, fp32, bf16 or fp16; by default fp32, or fp64 where
            the model was trained in it.
        as_trained: also export a checkpoint from inside the annealing phase, with the alpha
            that training had reached.
        tokenizer: export the tokenizer too, after a check that it gives the ids of training.

    Raises: ConfigError for an argument that is not allowed or a tokenizer that cannot be
    exported exactly, CheckpointError for a checkpoint that cannot be used.
    """
    if bool(ckpt) == bool(from_hf):
        raise ConfigError(
            f"ckpt={ckpt!r} and from_hf={from_hf!r}: give one of them, --ckpt to export and"
            " --from_hf to import"
        )
    folder = _new_folder(out)
    from apps.topk.checkpoint import DTYPES, open_checkpoint  # with torch, which takes seconds

    if dtype not in ("", *DTYPES):
        raise ConfigError(f"dtype={dtype!r} is not known: choose one of {', '.join(DTYPES)}")
    checkpoint = open_checkpoint(ckpt) if ckpt else None
    if checkpoint:
        _check_annealed(checkpoint, as_trained)
    from apps.topk import hf_folder  # with transformers, which takes more

    def fill(new: Path) -> None:
        if checkpoint:
            hf_folder.export(checkpoint, new, dtype, as_trained, tokenizer)
        else:
            hf_folder.checkpoint_of(Path(from_hf), new)

    _write(folder, fill)
    print(f"written: {out}")


def _new_folder(out: str) -> Path:
    folder = Path(out).expanduser().resolve()
    if not out or folder == folder.parent or (folder.exists() and not folder.is_dir()):
        raise ConfigError(f"out={out!r} cannot be a folder to write: give the path of a new one")
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"out={out!r} is there already and not empty: choose another --out")
    return folder


def _check_annealed(checkpoint: "Checkpoint", as_trained: bool) -> None:
    if checkpoint.alpha > 0 and not as_trained:
        raise CheckpointError(
            f"ckpt={str(checkpoint.folder)!r} lies inside the annealing phase (alpha"
            f" {checkpoint.alpha:.3f}, not 0): export a later one, or give --as_trained true for a"
            " model with that alpha"
        )
    topk = checkpoint.model_args.topk
    if checkpoint.alpha > 0 and topk is not None and topk.annealed == "k":
        raise CheckpointError(
            f"ckpt={str(checkpoint.folder)!r} lies inside the annealing of k, which an exported"
            " model does not know: export a later one"
        )


def _write(folder: Path, fill: Callable[[Path], None]) -> None:
    """Make `folder` of what `fill` puts into a new one beside it, at once."""
    new = folder.with_name(f".{folder.name}.export-{os.getpid()}")
    try:
        new.mkdir(parents=True)
        fill(new)
        for path in new.rglob("*"):
            _sync(path)
        publish(new, folder, replace=False)
    except (OSError, SafetensorError) as error:
        if isinstance(error, SafetensorError) and "I/O error" not in str(error):
            raise
        raise ConfigError(
            f"out={str(folder)!r} cannot be written: {error}: {cli.MAKE_ROOM}"
        ) from None
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _sync(path: Path) -> None:
    if path.is_file():
        with open(path, "rb") as file:
            os.fsync(file.fileno())


if __name__ == "__main__":
    cli.run(main)
