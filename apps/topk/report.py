"""A page of an analysis: every neuron with what it fires on, and texts with what fires on them."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apps.topk import cli
from apps.topk.corpus import flags
from apps.topk.provenance import write_text
from lingua_topk.analysis.recording import open_recording
from lingua_topk.errors import CheckpointError, ConfigError, DataError
from lingua_topk.report.data import Text
from lingua_topk.report.page import MARK, page

if TYPE_CHECKING:
    from apps.topk.checkpoint import Checkpoint

PROGRAM = "apps.topk.report"
EXAMPLE = "--run DUMP_DIR --out report.html"
FOLDER = "neurons"  # below the dump_dir, where apps.topk.analyze writes
TEXT_FLAGS = ("text",)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; mistakes raise a UserError, for `cli.run` to report."""
    argv = sys.argv[1:] if argv is None else argv
    flags.call(report, PROGRAM, argv, EXAMPLE, texts=TEXT_FLAGS)


def report(
    *,
    run: str,
    out: str = "report.html",
    text: str | Sequence[str] = "",
    texts: str = "",
    rows: int = 40,
    strongest: int = 16,
    contexts: int = 12,
    ckpt: str = "",
    dtype: str = "fp32",
    device: str = "",
) -> None:
    """Make one HTML file of an analysis, which opens in any browser and loads nothing else.

    It has the figures and the comparison, a table of all neurons that can be sorted and searched,
    a page for each neuron (top tokens, contexts coloured by its value, entropies with their
    controls, promoted and suppressed tokens, its trace where apps.topk.trace was run), texts
    with the neurons that fire on each token, and what steering does where apps.topk.steer_eval
    was run.

    Args:
        run: the dump_dir of a training run whose neurons were analysed (python -m
            apps.topk.analyze), or the folder of an analysis.
        out: the file to write. A report of this program is replaced, no other file is.
        text: a text that the model reads now, so that the report shows what fires on it; give
            the flag several times for several.
        texts: a UTF-8 file with more, one a line; empty lines are passed over.
        rows: rows of the recorded text that can be chosen in the report.
        strongest: neurons a token and layer that are kept of these texts.
        contexts: places of text that are shown a neuron, at most.
        ckpt: the checkpoint that was analysed, or its run; by default where it was then.
        dtype: what the model computes in for --text: fp64, fp32, bf16 or fp16.
        device: cpu or cuda; by default cuda where there is one.

    Raises: ConfigError for an argument that is not allowed, DataError for an analysis that cannot
    be read, CheckpointError for a checkpoint that cannot be used.
    """
    # With torch, which takes seconds that --help does not.
    from apps.topk.checkpoint import DTYPES
    from apps.topk.devices import device_of
    from apps.topk.neurons.corpus import token_pieces
    from apps.topk.neurons.folder import read_analysis
    from apps.topk.neurons.page_data import read_page_data
    from apps.topk.neurons.reading_texts import read_texts
    from apps.topk.steering import page_data as steering_data

    _check(rows, strongest, contexts, dtype)
    path = _output_file(out)
    folder = _analysis_folder(str(run))
    given = [*([text] if isinstance(text, str) and text else text), *_lines(texts)]
    checkpoint = _checkpoint(folder, ckpt)
    tokenizer = checkpoint.tokenizer()
    about = read_analysis(folder)
    read: list[Text] = []
    if given:
        model = checkpoint.model(device_of(device), DTYPES[dtype])
        add_bos = bool(checkpoint.params["data"].get("add_bos", True))
        read = read_texts(model, tokenizer, given, about["layers"], about["k"], strongest, add_bos)
    data = read_page_data(
        folder, token_pieces(tokenizer, checkpoint.model_args.vocab_size), _special(tokenizer),
        n_texts=rows, strongest=strongest, n_contexts=contexts, given=read,
    )  # fmt: skip
    beside = folder.parent / steering_data.FOLDER
    data.steering = steering_data.read_steering(beside, about, data.layers)
    content = page(data)
    try:
        write_text(path, content)
    except OSError as error:
        raise ConfigError(
            f"out={out!r} cannot be written ({error.strerror}): make room there, or choose another"
            " --out"
        ) from None
    n_neurons = sum(layer.width for layer in data.layers)
    size = len(content.encode()) / 1e6
    print(f"written: {path} ({n_neurons:,} neurons, {len(data.texts)} texts, {size:.1f} MB)")


def _check(rows: int, strongest: int, contexts: int, dtype: str) -> None:
    from apps.topk.checkpoint import DTYPES

    for name, value, least in (("rows", rows, 0), ("strongest", strongest, 1),
                               ("contexts", contexts, 1)):  # fmt: skip
        if value < least:
            raise ConfigError(f"{name}={value} is too small: give at least {least}")
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} is not known: choose one of {', '.join(DTYPES)}")


def _output_file(out: str) -> Path:
    """The file to write; ConfigError where it is there and not ours, or could not be written."""
    path = Path(out).expanduser()
    if path.suffix != ".html":
        raise ConfigError(f"out={out!r} does not end in .html: give a file such as report.html")
    if os.path.lexists(path) and not _is_ours(path):
        raise ConfigError(
            f"out={out!r} is there and is no report of this program, which will not replace it:"
            " choose another --out"
        )
    return path


def _is_ours(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(len(MARK)) == MARK.encode()
    except OSError:
        return False


def _analysis_folder(run: str) -> Path:
    from apps.topk.neurons.folder import DONE_NAME

    folder = Path(run).expanduser()
    for found in (folder, folder / FOLDER):
        if (found / DONE_NAME).is_file():
            return found
    raise DataError(
        f"run={run!r} holds no finished analysis (neither {DONE_NAME} nor {FOLDER}/{DONE_NAME}):"
        f" make one with python -m apps.topk.analyze --ckpt {run or 'DUMP_DIR'}"
    )


def _lines(texts: str) -> list[str]:
    if not texts:
        return []
    try:
        content = Path(texts).expanduser().read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(
            f"texts={texts!r} cannot be read ({error.strerror}): give a file"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"texts={texts!r} is not UTF-8: convert it") from None
    return [line for line in content.split("\n") if line.strip()]


def _checkpoint(folder: Path, given: str) -> "Checkpoint":
    """The checkpoint that was analysed: as given, beside the analysis, or where it was then."""
    from apps.topk.checkpoint import checkpoint_folder, open_checkpoint
    from apps.topk.neurons.page_data import RECORDING

    if given:
        return open_checkpoint(checkpoint_folder(given))
    recorded = Path(open_recording(folder / RECORDING).info["model_name"])
    beside = folder.parent / "checkpoints" / recorded.name
    place = beside if beside.is_dir() else recorded
    if not place.is_dir():
        raise CheckpointError(
            f"the checkpoint that was analysed, {recorded}, is not there any more: give --ckpt"
        )
    return open_checkpoint(place)


def _special(tokenizer: Any) -> dict[int, str]:
    named = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id}
    return {token: name for name, token in named.items() if token is not None}


if __name__ == "__main__":
    cli.run(main)
