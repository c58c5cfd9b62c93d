"""Follow neurons over the checkpoints of a run, and the same index over its layers."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from apps.topk import cli
from apps.topk.corpus import flags
from apps.topk.neurons.settings import Settings
from lingua_topk.errors import ConfigError

if TYPE_CHECKING:
    from apps.topk.tracing.summary import Trace

PROGRAM = "apps.topk.trace"
EXAMPLE = "--ckpts DUMP_DIR --neuron 3:417"
FOLDER = Path("neurons", "trace")  # below the dump_dir
SHOWN_TOKENS = 5


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; mistakes raise a UserError, for `cli.run` to report."""
    argv = sys.argv[1:] if argv is None else argv
    flags.call(trace, PROGRAM, argv, EXAMPLE, repeatable=["neuron", "data", "layers"])


def trace(
    *,
    ckpts: str,
    neuron: str = "",
    data: str = "",
    out: str = "",
    tokens: int = 200_000,
    row_length: int = 0,
    layers: str = "",
    k: int = 0,
    vectors: str = "",
    threshold: float = Settings.threshold,
    min_words: int = Settings.min_words,
    max_words: int = Settings.max_words,
    settled: float = 0.5,
    as_trained: bool = True,
    dtype: str = "fp32",
    device: str = "",
    batch_tokens: int = 4096,
) -> None:
    """Follow neurons over the checkpoints of a run, and the same index over its layers.

    Every whole checkpoint reads the same text. Of each neuron it measures the entropies, the top
    tokens, and the overlap of its tokens with those of its final self, the last checkpoint's:
    the sum over tokens of the smaller of the two shares of activation mass, 1 where they are
    the same and 0 where they have no token in common. A neuron has settled at the first
    checkpoint from which on the overlap never falls below --settled.

    All checkpoints are measured alike: the k activations of a token with the largest magnitude
    are kept, in TopK layers and in others. A checkpoint from inside the annealing phase computes
    them with the alpha that training had reached (--as_trained false: as if alpha were 0). The
    word vectors are the same for all checkpoints.

    Writes OUT/trace.json, OUT/trace.safetensors (every neuron) and figures: settling.svg,
    overlap.svg, token_entropy.svg, semantic_entropy.svg and layers.svg. A run that was stopped
    goes on when the same command is given again; what was measured of a checkpoint stays in
    OUT/checkpoints. Meanwhile OUT/recordings holds the activations of two checkpoints, about 10
    bytes for each one that is kept.

    Args:
        ckpts: the dump_dir of a training run with two checkpoints or more.
        neuron: a neuron to write the whole trace of, as LAYER:INDEX, both counted from 0;
            several separated by commas, or give the flag several times.
        data: the text to read: files, folders with *.val.jsonl files or of text, or hf:OWNER/NAME
            data sets, separated by commas; by default the held-out documents of training.
        out: the folder to write; by default CKPTS/neurons/trace.
        tokens: how many tokens of it, at most.
        row_length: tokens a row; 0 for as many as in training.
        layers: which layers, as 0,2,3; by default all.
        k: activations that are kept a token and layer; 0 for the model's own k, or 64 where it
            has no TopK.
        vectors: word vectors for semantic entropy: a word2vec or GloVe text file, or the folder
            of a sentence-transformers model; by default the last checkpoint's own embeddings,
            which is circular.
        threshold: share of a neuron's largest |value| above which a word counts.
        min_words: words with a vector that a neuron needs for semantic entropy.
        max_words: the most of them that are taken.
        settled: the overlap with the final self from which on a neuron counts as settled, above 0
            and at most 1.
        as_trained: use the alpha that training had reached.
        dtype: what the model computes in: fp64, fp32, bf16 or fp16.
        device: cpu or cuda; by default cuda where there is one.
        batch_tokens: tokens that the model reads at once.

    Raises: ConfigError for an argument that is not allowed, CheckpointError for checkpoints
    that cannot be used, DataError for text or vectors that cannot.
    """
    # With torch and matplotlib, which take seconds that --help does not.
    from apps.topk.devices import device_of
    from apps.topk.neurons import arguments
    from apps.topk.neurons.corpus import rows_of_corpus, text_of
    from apps.topk.tracing import output
    from apps.topk.tracing.checkpoints import checkpoints_of
    from apps.topk.tracing.recorder import Recorder, width_of
    from apps.topk.tracing.work import Work

    settings = Settings(threshold, min_words, max_words)
    arguments.check(settings, dtype, batch_tokens, row_length)
    if not 0 < settled <= 1:
        raise ConfigError(f"settled={settled} is not allowed: give a number above 0, at most 1")
    if k < 0:
        raise ConfigError(f"k={k} is not allowed: give at least 1, or 0 for the model's own")
    place = device_of(device)
    wanted = _neurons(neuron)
    checkpoints = checkpoints_of(ckpts)
    last = checkpoints[-1]
    chosen = arguments.layers_of(layers, last.model_args.n_layers)
    _check_neurons(wanted, chosen, width_of(last))
    folder = Path(out).expanduser() if out else arguments.folder_in_run(last, FOLDER)
    output.check_folder(folder)
    rows = rows_of_corpus(last, arguments.listed(data), tokens, row_length or None)
    work = Work(
        checkpoints=checkpoints, rows=rows, text=text_of(rows, last, vectors), settings=settings,
        recorder=Recorder(
            layers=chosen, k=k or arguments.own_k(last), as_trained=as_trained,
            dtype=dtype, device=place, batch_rows=max(batch_tokens // rows.tokens.shape[1], 1),
        ),
        folder=folder,
    )  # fmt: skip
    with cli.alone(folder, "out"):
        result = work.trace(settled)
        output.write(folder, result, wanted, output.origin(work, settled))
        work.clean_up()
    for layer, index in wanted:
        _show(result, layer, index)
    print(f"written: {folder} ({len(checkpoints)} checkpoints, {len(chosen)} layers)")


def _neurons(text: str) -> list[tuple[int, int]]:
    """Layer and index of each neuron in "3:417,0:5", each once."""
    from apps.topk.neurons.arguments import listed

    found = []
    for name in listed(text):
        numbers = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", name)
        if numbers is None:
            raise ConfigError(
                f"neuron={name!r} is not allowed: give LAYER:INDEX, both counted from 0, as 3:417"
            )
        found.append((int(numbers[1]), int(numbers[2])))
    return list(dict.fromkeys(found))


def _check_neurons(wanted: Sequence[tuple[int, int]], layers: Sequence[int], width: int) -> None:
    for layer, index in wanted:
        if layer not in layers:
            raise ConfigError(
                f"neuron={layer}:{index} is of a layer that is not recorded: give one of layer"
                f" {', '.join(map(str, layers))}, or another --layers"
            )
        if index >= width:
            raise ConfigError(
                f"neuron={layer}:{index} is not in the model: give an index from 0 to {width - 1}"
            )


def _show(trace: "Trace", layer: int, index: int) -> None:
    """The trace of a neuron on the terminal, a line a checkpoint."""
    from apps.topk.terminal import shown
    from apps.topk.tracing.summary import neuron_summary

    found = neuron_summary(trace, layer, index)
    step = found["settle_step"]
    when = "is dead in the end" if step is None else f"has settled at step {step}"
    print(f"{found['neuron']} {when}")
    print(f"{'step':>10}  overlap  token entropy  semantic entropy  top tokens")
    for one in found["checkpoints"]:
        numbers = [one["overlap"], one["token_entropy"], one["semantic_entropy"]]
        cells = ["-" if number is None else f"{number:.2f}" for number in numbers]
        texts = " ".join(_quoted(token) for token in one["top_tokens"][:SHOWN_TOKENS])
        line = f"{one['step']:>10}  {cells[0]:>7}  {cells[1]:>13}  {cells[2]:>16}  {texts}"
        print(shown(line.rstrip()))


def _quoted(token: dict) -> str:
    """A token's text as a string literal, since spaces and line ends are tokens too."""
    return repr(token["text"]) if token["text"] else f"<{token['token']}>"


if __name__ == "__main__":
    cli.run(main)
