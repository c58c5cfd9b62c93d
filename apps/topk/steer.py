"""Turn neurons of a TopK model and see the text follow, beside what it writes without."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from apps.topk import cli, result_lines
from apps.topk.corpus import flags
from apps.topk.defaults import BATCH_TOKENS
from apps.topk.prompts import read_prompts
from lingua_topk.errors import ConfigError

if TYPE_CHECKING:
    from apps.topk.checkpoint import Checkpoint

PROGRAM = "apps.topk.steer"
EXAMPLE = "--ckpt DUMP_DIR --neuron 3:417 --delta 4,8,16 --prompt 'Once upon a time,'"
# Flags that may be given several times; their values are taken as they are.
TEXT_FLAGS = ("prompt",)
FIRST_PROMPT = "The"  # of the interactive mode, where none is given
LISTED = 20  # neurons, where nobody says how many


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; mistakes raise a UserError, for `cli.run` to report."""
    argv = sys.argv[1:] if argv is None else argv
    flags.call(steer, PROGRAM, argv, EXAMPLE, repeatable=["neuron", "delta"], texts=TEXT_FLAGS)


def steer(
    *,
    ckpt: str,
    neuron: str = "",
    concept: str = "",
    n: int = 0,
    delta: str = "",
    unit: str = "",
    mode: str = "add",
    where: str = "all",
    before_selection: bool = False,
    suppress: bool = False,
    prompt: str | Sequence[str] = "",
    prompts: str = "",
    num: int = 1,
    max_tokens: int = 60,
    temperature: float = 0.7,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    analysis: str = "",
    twin: str = "",
    list: bool = False,
    interactive: bool = False,
    json: str = "",
    dtype: str = "fp32",
    device: str = "",
    batch_tokens: int = BATCH_TOKENS,
) -> None:
    """Turn neurons of a TopK model and see the text follow, beside what it writes without.

    A prompt is continued without steering and once with each delta, by the same draws. The words
    that the neurons fire on are highlighted (*so* where there are no colours), and with
    each text stands which share of its words they are.

    Which neurons: those that --neuron names, or those that fire on the word of --concept; with
    neither it takes one of its own. It chooses by the output score: how much likelier the words
    that a neuron fires on become as the next word when it is raised by its maximum, in nats. For
    words, strengths and choices there has to be an analysis (python -m apps.topk.analyze).

    Without a prompt, on a terminal, it goes on as with --interactive. Where the standard input is
    no terminal, each of its lines is a prompt.

    Args:
        ckpt: the checkpoint of a TopK model, such as DUMP_DIR/checkpoints/0000001000, or the
            dump_dir of a training run for its newest one.
        neuron: what to turn, as LAYER:NEURON, both counted from 0; several separated by commas,
            or give the flag several times: they are turned together.
        concept: a word, such as work; the neurons that fire on it with the best output score are
            turned.
        n: how many neurons the tool chooses, turned together; 0 for 1, with --list for 20.
        delta: numbers with commas, which may be negative: a text for each. By default 1, 2 and 4
            times the neuron's maximum; with --mode clamp 0.5, 0.25 and 0 times that, with --mode
            scale the factors 2, 4 and 8.
        unit: of the deltas: absolute, mean or maximum, the latter two of each neuron's own values
            where it fires. By default absolute where --delta is given.
        mode: add the delta to the neuron, set the neuron to it, clamp it to at most the delta,
            scale it by the delta as a factor, or ablate it (set it to 0, without a delta).
        where: act at all positions, at those of the prompt, or at the generated ones.
        before_selection: act before TopK selects, so that the neuron has to be among the k
            largest; otherwise on what TopK gives, where it takes part in any case.
        suppress: take a concept out of the text: the text with the neurons ablated, and with each
            delta subtracted.
        prompt: the beginning of a text; give the flag several times for several.
        prompts: a file with more: one a line, empty lines passed over. In a .jsonl file a
            prompt is a JSON string, or the "prompt" of an object, and may have several lines.
        num: completions a prompt, each with its own draws.
        max_tokens: generated tokens a text, at most.
        temperature: 0 takes the likeliest token each time; a number above 0 divides the
            logits, and tokens are drawn.
        top_p: draw from the smallest set of likeliest tokens with at least this probability,
            above 0 and at most 1.
        top_k: draw from this many likeliest tokens, before top_p applies; 0 for all.
        seed: of the draws; with the same arguments the texts are the same.
        analysis: the folder of an analysis of this model; by default RUN/neurons.
        twin: a checkpoint or run of the vanilla twin, for the perplexity of each text under it.
        list: only show which neurons there are to turn: those of --concept, or those of lowest
            semantic entropy, by falling output score.
        interactive: ask for numbers, prompts, neurons and words, and write anew after each.
        json: a new file for the results, one JSON object a line: index (of the prompt),
            completion, neurons, mode (null where unsteered), delta, unit, absolute (the delta of
            each neuron in units of activation), prompt, text, tokens (ids), reason,
            concept_words, words (how many were generated), twin_perplexity. How they were made
            goes beside it, into JSON.provenance.json.
        dtype: what the model computes in: fp64, fp32, bf16 or fp16.
        device: cpu or cuda; by default cuda where there is one.
        batch_tokens: tokens that are kept in memory at once, prompts included.

    Raises: ConfigError for an argument that is not allowed, CheckpointError for a checkpoint
    that cannot be used, DataError for an analysis that cannot.
    """
    # With torch, which takes seconds that --help does not.
    import torch

    from apps.topk.checkpoint import checkpoint_folder, open_checkpoint
    from apps.topk.devices import device_of
    from apps.topk.sampling import Sampling
    from apps.topk.steering import arguments, work
    from apps.topk.steering.bench import Bench

    given = [prompt] if isinstance(prompt, str) and prompt else [*prompt]
    n_given = len(given) + bool(prompts)
    arguments.check_combination(neuron, concept, n, list, interactive, json, n_given)
    how = arguments.turning_of(delta, unit, mode, where, before_selection, suppress)
    sampling = Sampling(max_tokens, temperature, top_p, top_k, seed)
    sampling.check_completions(num)
    arguments.check_generation(dtype, batch_tokens)
    place = device_of(device)
    out = result_lines.new_file(json)
    texts = None if list else _texts(given, prompts, interactive)
    if texts is None and json and not list:
        raise ConfigError(f"json={json!r} needs prompts: give --prompt or --prompts")
    checkpoint = open_checkpoint(checkpoint_folder(ckpt))
    bench = Bench(
        checkpoint, analysis=analysis, twin=_twin(twin, checkpoint), dtype=dtype, device=place,
        batch_tokens=batch_tokens,
    )  # fmt: skip
    origin = {"dtype": dtype, "device": str(place)}
    try:
        if list:
            work.list_neurons(bench, concept, n or LISTED, out, origin)
        else:
            choice = work.chosen(bench, neuron, concept, n or 1)
            work.check_default(bench, delta, how)
            if texts is None or interactive:
                first = texts[0] if texts else FIRST_PROMPT
                work.converse(bench, first, sampling, choice, how, num)
            else:
                work.compare(bench, texts, sampling, choice, how, num, out, origin)
    except torch.OutOfMemoryError:
        raise ConfigError(
            f"batch_tokens={batch_tokens} does not fit into the memory of {place}: give less, or"
            " a smaller --dtype"
        ) from None


def _texts(given: Sequence[str], prompts: str, interactive: bool) -> list[str] | None:
    """The prompts; None where they are to be asked for."""
    if interactive and not given and not prompts:
        return None  # the standard input has what is entered
    found = read_prompts(given, prompts)
    if interactive and found is not None and len(found) > 1:
        raise ConfigError(f"prompts={prompts!r} has {len(found)}, and --interactive begins with 1")
    return found


def _twin(name: str, checkpoint: "Checkpoint") -> "Checkpoint | None":
    if not name:
        return None
    from apps.topk.analyze import check_twin
    from apps.topk.checkpoint import checkpoint_folder, open_checkpoint

    found = open_checkpoint(checkpoint_folder(name))
    check_twin(checkpoint, found)
    return found


if __name__ == "__main__":
    cli.run(main)
