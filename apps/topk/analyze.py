"""Read the neurons of a checkpoint: what they fire on, and how that compares with controls."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from apps.topk import cli
from apps.topk.corpus import flags
from apps.topk.neurons.settings import Settings
from lingua_topk.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from apps.topk.checkpoint import Checkpoint

PROGRAM = "apps.topk.analyze"
EXAMPLE = "--ckpt DUMP_DIR --twin TWIN_DUMP_DIR"
FOLDER = "neurons"  # below the dump_dir
TWIN_VALUES = ("selected", "largest")
# What a twin has in common with the model.
SHARED = ("dim", "n_layers", "vocab_size", "parameters", "max_seqlen", "steps", "step", "tokens")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; mistakes raise a UserError, for `cli.run` to report."""
    argv = sys.argv[1:] if argv is None else argv
    flags.call(analyze, PROGRAM, argv, EXAMPLE, repeatable=["data", "layers"])


def analyze(
    *,
    ckpt: str,
    twin: str = "",
    data: str = "",
    out: str = "",
    tokens: int = 200_000,
    row_length: int = 0,
    layers: str = "",
    k: int = 0,
    twin_values: str = "selected",
    vectors: str = "",
    threshold: float = Settings.threshold,
    min_words: int = Settings.min_words,
    max_words: int = Settings.max_words,
    contexts: int = Settings.contexts,
    context_tokens: int = Settings.context_tokens,
    seed: int = 0,
    dtype: str = "fp32",
    device: str = "",
    batch_tokens: int = 4096,
    quiet: bool = False,
) -> None:
    """Read the neurons of a checkpoint: what they fire on, and how that compares with controls.

    Every layer's neurons are recorded on a text and measured: token entropy, semantic entropy,
    MonoScore, how often and how strongly they fire, the tokens, words and places they fire on, and
    the next tokens that they promote. Two controls are always computed: the same values on
    shuffled tokens, and the same architecture with random weights. With --twin the vanilla
    twin is measured alike and compared, also at matched firing rates.

    Entropies are in bits. Token entropy is that of a neuron's |value| summed by token. Semantic
    entropy is that of the cosine similarities (20 bins over [-1, 1]) of the words on which it is
    above --threshold times its largest. MonoScore is the mean similarity of words weighted by
    both activations. Formulas: lingua_topk/analysis.

    Writes OUT/analysis.json, OUT/model, OUT/random, OUT/twin, comparison.json, comparison.md and
    entropy.svg; python -m apps.topk.report makes a page of them. Stopped, the same command goes
    on from there.

    Args:
        ckpt: the checkpoint, such as DUMP_DIR/checkpoints/0000001000, or the dump_dir of a
            training run for its newest one.
        twin: the same of the vanilla twin.
        data: the text to read: files, folders with *.val.jsonl files or of text, or hf:OWNER/NAME
            data sets, separated by commas, a document of each in turn; by default the held-out
            documents of training.
        out: the folder to write; by default neurons in the dump_dir of the run.
        tokens: how many tokens of it, at most.
        row_length: tokens a row; 0 for as many as in training.
        layers: which layers, as 0,2,3; by default all.
        k: values a token and layer that are kept where there is no TopK, those of largest
            magnitude; 0 for the model's own k (or 64), -1 for all.
        twin_values: selected: where the model has TopK, of the twin what the same selection would
            leave, so that both models' neurons are read alike. largest: k by magnitude, both signs
            in one neuron, which alone raises the entropy of the twin's.
        vectors: word vectors for semantic entropy and MonoScore: a word2vec or GloVe text file, or
            the folder of a sentence-transformers model; by default the model's own embeddings of
            words that are one token, which is circular.
        threshold: share of a neuron's largest |value| above which a word counts.
        min_words: words with a vector that a neuron needs for semantic entropy.
        max_words: the most of them that are taken.
        contexts: places of text that are kept a neuron.
        context_tokens: tokens around such a place.
        seed: of the random weights and of the shuffling.
        dtype: what the model computes in: fp64, fp32, bf16 or fp16.
        device: cpu or cuda; by default cuda where there is one.
        batch_tokens: tokens that the model reads at once.
        quiet: print what the comparison comes to, not its tables.

    Raises: ConfigError for an argument that is not allowed, CheckpointError for a checkpoint
    that cannot be used, DataError for text or vectors that cannot.
    """
    # With torch and matplotlib, which take seconds that --help does not.
    from rich.console import Console

    from apps.topk.checkpoint import checkpoint_folder, open_checkpoint
    from apps.topk.devices import device_of
    from apps.topk.neurons import arguments
    from apps.topk.neurons.analysis import Analysis
    from apps.topk.neurons.comparison import tables
    from apps.topk.neurons.corpus import rows_of_corpus

    settings = Settings(threshold, min_words, max_words, contexts, context_tokens, seed)
    arguments.check(settings, dtype, batch_tokens, row_length)
    if k < -1:
        raise ConfigError(f"k={k} is not allowed: give at least 1, 0 for the model's, -1 for all")
    if twin_values not in TWIN_VALUES:
        raise ConfigError(
            f"twin_values={twin_values!r} is not known: choose one of {', '.join(TWIN_VALUES)}"
        )
    place = device_of(device)
    checkpoint = open_checkpoint(checkpoint_folder(ckpt))
    twin_checkpoint = open_checkpoint(checkpoint_folder(twin)) if twin else None
    if twin_checkpoint is not None:
        check_twin(checkpoint, twin_checkpoint)
    rows = rows_of_corpus(checkpoint, arguments.listed(data), tokens, row_length or None)
    analysis = Analysis(
        checkpoint=checkpoint, twin=twin_checkpoint, rows=rows, settings=settings,
        layers=arguments.layers_of(layers, checkpoint.model_args.n_layers),
        k=None if k == -1 else k or arguments.own_k(checkpoint),
        twin_values=twin_values, vectors_from=vectors, device=place, dtype=dtype,
        batch_rows=max(batch_tokens // rows.tokens.shape[1], 1),
        out=Path(out).expanduser() if out else arguments.folder_in_run(checkpoint, FOLDER),
    )  # fmt: skip
    with cli.alone(analysis.out, "out"):
        compared = analysis.run()
    if quiet:
        print("\n".join(compared["conclusion"]))
    else:
        for table in tables(compared):
            Console().print(table)
    print(f"written: {analysis.out} (python -m apps.topk.report makes a page of it)")


def check_twin(checkpoint: "Checkpoint", twin: "Checkpoint") -> None:
    """CheckpointError where the neurons of the two cannot be compared one layer with another."""
    ours, theirs = (
        {**one.describe(), "step": one.step, "max_seqlen": one.model_args.max_seqlen}
        for one in (checkpoint, twin)
    )
    for name in SHARED:
        if ours[name] != theirs[name]:
            raise CheckpointError(
                f"twin={str(twin.folder)!r} has {name}={theirs[name]}, the model {ours[name]}: give"
                " the run that was trained alike, without TopK, at the same step"
            )
    if ours["tokenizer"]["sha256"] != theirs["tokenizer"]["sha256"]:
        raise CheckpointError(
            f"twin={str(twin.folder)!r} has another tokenizer: give the run that was trained alike"
        )
    if theirs["topk"] is not None:
        raise CheckpointError(
            f"twin={str(twin.folder)!r} has TopK itself: give the run with model.topk=null"
        )


if __name__ == "__main__":
    cli.run(main)
