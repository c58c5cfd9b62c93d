"""Continue texts with the model of a checkpoint: on the terminal, or many into a file."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apps.topk import cli, result_lines
from apps.topk.corpus import flags, progress
from apps.topk.defaults import BATCH_TOKENS
from apps.topk.prompts import read_prompts
from apps.topk.provenance import provenance
from lingua_topk.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from apps.topk.checkpoint import Checkpoint
    from apps.topk.generation import Generation, Generator
    from apps.topk.sampling import Sampling

PROGRAM = "apps.topk.generate"
EXAMPLE = "--ckpt DUMP_DIR --prompt 'The file is'"
# Flags that may be given several times; their values are taken as they are.
TEXT_FLAGS = ("prompt", "stop")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; mistakes raise a UserError, for `cli.run` to report."""
    argv = sys.argv[1:] if argv is None else argv
    flags.call(generate, PROGRAM, argv, EXAMPLE, texts=TEXT_FLAGS)


def generate(
    *,
    ckpt: str,
    prompt: str | Sequence[str] = "",
    prompts: str = "",
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    stop: str | Sequence[str] = "",
    ignore_eos: bool = False,
    num: int = 1,
    json: str = "",
    dtype: str = "fp32",
    device: str = "",
    as_trained: bool = False,
    batch_tokens: int = BATCH_TOKENS,
    sparse: bool = True,
) -> None:
    """Continue texts with the model of a checkpoint.

    Without a prompt, on a terminal, it asks for them: each line that is entered is continued,
    Ctrl-C stops a continuation, an empty line or Ctrl-D ends the program. Where the standard
    input is no terminal, each of its lines is a prompt.

    Control characters are shown escaped (newline and tab are not); with --json they are kept.

    Args:
        ckpt: the checkpoint, such as DUMP_DIR/checkpoints/0000001000, or the dump_dir of a
            training run for its newest one.
        prompt: the beginning of a text, which may be empty; give the flag several times for
            several.
        prompts: a file with more: one a line, empty lines passed over. In a .jsonl file a
            prompt is a JSON string, or the "prompt" of an object, and may have several lines.
        max_tokens: generated tokens a text, at most.
        temperature: 0 takes the likeliest token each time; a number above 0 divides the
            logits, and tokens are drawn.
        top_p: draw from the smallest set of likeliest tokens with at least this probability,
            above 0 and at most 1.
        top_k: draw from this many likeliest tokens, before top_p applies; 0 for all.
        seed: of the draws; with the same arguments the texts are the same.
        stop: a string that ends a text and is cut off, taken as it is (in bash, $'\\n' is a
            newline); give the flag several times for several.
        ignore_eos: never take the token that ends a text.
        num: completions a prompt, each with its own draws.
        json: a new file for the results, one JSON object a line: index (of the prompt),
            completion, prompt, text, tokens (ids), reason (eos, stop, length, or window where
            the model's positions are used up). How they were made goes beside it, into
            JSON.provenance.json.
        dtype: what the model computes in: fp64, fp32, bf16 or fp16.
        device: cpu or cuda; by default cuda where there is one.
        as_trained: use a checkpoint from inside the annealing phase with the alpha that
            training had reached.
        batch_tokens: tokens that are kept in memory at once, prompts included; a batch has as
            many texts as fit.
        sparse: where it is faster, read of the weights behind TopK layers only what the
            survivors meet. Meanwhile it takes memory for a second copy of those weights, about a
            fifth of the model; the texts are the same, but for the rounding of sums.

    Raises: ConfigError for an argument that is not allowed, CheckpointError for a checkpoint
    that cannot be used.
    """
    import torch  # which takes seconds, as what stands on it does

    from apps.topk.checkpoint import DTYPES, checkpoint_folder, open_checkpoint
    from apps.topk.devices import device_of
    from apps.topk.generation import Generator
    from apps.topk.sampling import Sampling

    sampling = Sampling(
        max_tokens, temperature, top_p, top_k, seed, tuple(_listed(stop)), ignore_eos
    )
    sampling.check_completions(num)
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} is not known: choose one of {', '.join(DTYPES)}")
    if batch_tokens < 1:
        raise ConfigError(f"batch_tokens={batch_tokens} is not allowed: give at least 1")
    place = device_of(device)
    texts = read_prompts(_listed(prompt), prompts)
    if json and texts is None:
        raise ConfigError(f"json={json!r} needs prompts: give --prompt or --prompts")
    out = result_lines.new_file(json)
    checkpoint = open_checkpoint(checkpoint_folder(ckpt))
    tokenizer, model = checkpoint.tokenizer(), checkpoint.model(place, DTYPES[dtype], as_trained)
    add_bos = bool(checkpoint.params["data"].get("add_bos", True))
    generator = Generator(model, tokenizer, batch_tokens, add_bos, sparse=sparse)
    try:
        if texts is None:
            _converse(generator, sampling, num)
        elif out is None and len(texts) * num == 1:
            _stream(generator, sampling, texts[0])
        else:
            results = _batch(generator, sampling, texts * num)
            if out is None:
                _show(results, len(texts))
            else:
                _write(out, results, len(texts), _origin(checkpoint, sampling, dtype, place))
    except torch.OutOfMemoryError:
        also = ", --sparse=False" if sparse else ""
        raise ConfigError(
            f"batch_tokens={batch_tokens} does not fit into the memory of {place}: give less{also},"
            " or a smaller --dtype"
        ) from None


def _listed(texts: str | Sequence[str]) -> list[str]:
    if isinstance(texts, str):
        return [texts] if texts else []
    return list(texts)


def _converse(generator: "Generator", sampling: "Sampling", num: int) -> None:
    if num > 1:
        raise ConfigError(f"num={num} needs prompts: give --prompt or --prompts")
    from apps.topk import terminal

    terminal.converse(generator, sampling)


def _stream(generator: "Generator", sampling: "Sampling", prompt: str) -> None:
    from apps.topk import terminal

    generator.check(generator.encode(prompt))
    terminal.write(prompt)
    try:
        generator.generate([prompt], sampling, lambda _, piece: terminal.write(piece))
    finally:
        print(flush=True)


def _batch(generator: "Generator", sampling: "Sampling", prompts: list[str]) -> list["Generation"]:
    with progress.bar("generating", len(prompts), "text") as shown:
        return generator.generate(prompts, sampling, on_done=lambda *_: shown.update())


def _show(results: list["Generation"], n_prompts: int) -> None:
    """The texts of every prompt in turn, each below a line that says which one it is."""
    from apps.topk import terminal

    num = len(results) // n_prompts
    for index, completion, one in _in_turn(results, n_prompts):
        which = f"prompt {index + 1} of {n_prompts}"
        which += f", completion {completion + 1} of {num}" if num > 1 else ""
        print(f"=== {which} ({one.reason})")
        terminal.write(one.prompt + one.text + "\n")


def _origin(
    checkpoint: "Checkpoint", sampling: "Sampling", dtype: str, device: "torch.device"
) -> dict[str, Any]:
    return provenance(
        ckpt=str(checkpoint.folder), step=checkpoint.step, sampling=asdict(sampling), dtype=dtype,
        device=str(device),
    )  # fmt: skip


def _write(out: Path, results: list["Generation"], n_prompts: int, origin: dict[str, Any]) -> None:
    lines = (
        {"index": index, "completion": completion, **asdict(one)}
        for index, completion, one in _in_turn(results, n_prompts)
    )
    print(f"written: {out} ({result_lines.write(out, lines, origin)} texts)")


def _in_turn(
    results: list["Generation"], n_prompts: int
) -> Iterator[tuple[int, int, "Generation"]]:
    """Index of the prompt, completion and result, those of a prompt together."""
    for index in range(n_prompts):
        for completion, one in enumerate(results[index::n_prompts]):
            yield index, completion, one


if __name__ == "__main__":
    cli.run(main)
