"""How fast one token after another is generated: densely, sparsely, and by transformers."""

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from apps.bench.devices import check_device
from apps.bench.rows import RESULTS, append, origin
from apps.topk import cli
from apps.topk.checkpoint import DTYPES
from apps.topk.corpus import flags
from apps.topk.decoding import FIRST_BY_CALLS
from apps.topk.generation import Generator
from apps.topk.model import TopKTransformer, TopKTransformerArgs
from apps.topk.sampling import Sampling
from lingua_topk import TopKArgs
from lingua_topk.errors import ConfigError

PROGRAM = "apps.bench.decoding"
EXAMPLE = "--dim 1024 --layers 8 --vocab 32000"
DENSE, SPARSE, THEIRS = "dense", "sparse", "transformers"
HEAD_DIM = 128
# Of the check in float64: wide enough for gathering to be chosen, and a text long enough to show
# what differs.
CHECKED = {"dim": 512, "layers": 4, "vocab": 512, "k": 16}
CHECKED_TOKENS = 40
# Tokens that set up what the others use: the first, which the prompt costs, and the next, in which
# weights are laid out for sparse decoding; on a GPU those up to the one whose step is recorded.
SET_UP = {"cpu": 2, "cuda": FIRST_BY_CALLS + 2}
TOKENS = {"cpu": 8, "cuda": 64}
# Prompts, tokens -> the generated ids, and when each was there: seconds, one a token.
Generate = Callable[[list[list[int]], int], tuple[list[list[int]], list[float]]]


def main(argv: Sequence[str] | None = None) -> None:
    flags.call(measure, PROGRAM, sys.argv[1:] if argv is None else argv, EXAMPLE)


def measure(
    *,
    device: str = "cpu",
    dim: int = 1024,
    layers: int = 8,
    vocab: int = 32000,
    k: int = 64,
    batch: int = 1,
    prompt: int = 16,
    tokens: int = 0,
    dtype: str = "fp32",
    site: str = "residual",
    repeats: int = 8,
    save: bool = False,
) -> list[dict[str, Any]]:
    """Measure greedy decoding of a random model with TopK, all ways on the same weights.

    In turns, in one process: our dense decoding, our sparse decoding, and transformers' own
    `generate` with the exported weights. A turn is timed from its second generated token to the
    last, on a GPU from the fifth: what a text costs once is not counted, which is reading the
    prompt, laying out weights for sparse decoding, and recording a step. `ratio` is the time of
    the dense one over the time of this one, in the same turn: its median, and the 10th and 90th
    percentile; `over_transformers` the same with the time of transformers. `ceiling` is the ratio
    that the bytes of the weights allow, and `saving` the part of the saving of time it allows that
    was reached. Times are written for a GPU only; on a CPU the ratio is what carries over.

    Before that, in this very run, all three must generate the same texts with a small model in
    float64; where they do not, nothing is reported: the program fails.

    Args:
        device: cpu or cuda.
        dim: width of the model, D, a multiple of 128.
        layers: blocks of the model.
        vocab: size of its vocabulary.
        k: how many values TopK keeps.
        batch: texts that are continued at once.
        prompt: tokens of each prompt.
        tokens: generated tokens a turn, at least 3, on a GPU 6; by default 8, on a GPU 64.
        dtype: fp64, fp32, bf16 or fp16.
        site: residual or mlp.
        repeats: turns that count; one before them does not.
        save: append rows to apps/bench/results/decoding.csv.

    Returns: a row for each way.
    """
    tokens = tokens or TOKENS.get(device, 0)
    _check(device, dim, layers, vocab, k, batch, prompt, tokens, dtype, site, repeats)
    _check_correct(device, batch, site)
    model = _model(dim, layers, vocab, k, site, DTYPES[dtype], device, prompt + tokens)
    prompts = _prompts(batch, prompt, vocab)
    ways = {DENSE: _ours(model, False), SPARSE: _ours(model, True), THEIRS: _theirs(model)}
    seconds, texts = _in_turns(ways, prompts, tokens, repeats, SET_UP[device])
    ceiling = byte_ceiling(model, batch)
    shape = {"device": device, "dtype": dtype, "dim": dim, "layers": layers, "vocab": vocab,
             "k": k, "site": site, "batch": batch, "prompt": prompt, "tokens": tokens,
             "repeats": repeats}  # fmt: skip
    found = [{**origin(), **shape, **row} for row in _rows(seconds, texts, ceiling, device)]
    _show(found)
    for row in found if save else []:
        append(RESULTS / "decoding.csv", row)
    return found


def _check(
    device: str, dim: int, layers: int, vocab: int, k: int, batch: int, prompt: int, tokens: int,
    dtype: str, site: str, repeats: int,
) -> None:  # fmt: skip
    check_device(device)
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} is not known: choose one of {', '.join(DTYPES)}")
    if site not in ("residual", "mlp"):
        raise ConfigError(f"site={site!r} is not known: choose residual or mlp")
    if dim < HEAD_DIM or dim % HEAD_DIM:
        raise ConfigError(f"dim={dim} is not allowed: give a multiple of {HEAD_DIM}")
    least = {"layers": 3, "vocab": 2, "k": 1, "batch": 1, "prompt": 1,
             "tokens": SET_UP[device] + 1, "repeats": 1}  # fmt: skip
    given = {"layers": layers, "vocab": vocab, "k": k, "batch": batch, "prompt": prompt,
             "tokens": tokens, "repeats": repeats}  # fmt: skip
    for name, smallest in least.items():
        if given[name] < smallest:
            raise ConfigError(f"{name}={given[name]} is too small: give at least {smallest}")


# --- the model, and the ways to decode with it ---


def _model(
    dim: int, layers: int, vocab: int, k: int, site: str, dtype: torch.dtype, device: str,
    length: int,
) -> TopKTransformer:  # fmt: skip
    """A model with random weights, made in place: the largest leave no room for a second one."""
    args = TopKTransformerArgs(
        dim=dim, n_layers=layers, head_dim=min(HEAD_DIM, dim // 2), vocab_size=vocab,
        max_seqlen=length, topk=TopKArgs(k=k, site=site),
    )  # fmt: skip
    with torch.device("meta"):
        model = TopKTransformer(args)
    for parameter in model.parameters():  # the rotary table stays in float32
        parameter.data = parameter.data.to(dtype)
    model.to_empty(device=device)
    model.requires_grad_(False)
    _fill(model)
    model.args = args
    return model.eval()


def _fill(model: TopKTransformer) -> None:
    """Normal weights; the host's own, cut ones take minutes to draw for the largest models."""
    generator = torch.Generator(model.tok_embeddings.weight.device).manual_seed(0)
    model.rope_embeddings.reset_parameters()
    for parameter in model.parameters():
        if parameter.dim() == 1:  # a norm's
            parameter.fill_(1.0)
        else:
            parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)


def _prompts(batch: int, length: int, vocab: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, vocab, (batch, length), generator=generator).tolist()


class _Tokenizer:
    """A letter a token, so that the text of each is there at once."""

    def __init__(self, vocab: int):
        self.n_words = vocab

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(0x10000 + one) for one in ids)


def _ours(model: TopKTransformer, sparse: bool) -> Generate:
    generator = Generator(model, _Tokenizer(model.tok_embeddings.num_embeddings), sparse=sparse)
    generator.sparse_from = 1  # what laying out the weights costs is not counted

    def generate(prompts: list[list[int]], tokens: int) -> tuple[list[list[int]], list[float]]:
        times: list[float] = []

        def note(index: int, _: str) -> None:
            if index == 0:
                times.append(time.perf_counter())

        found = generator.generate_tokens(prompts, Sampling(max_tokens=tokens), note)
        return [one.tokens for one in found], times

    return generate


class _Times:
    """What transformers calls a streamer: it is given the prompt, then every token."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, _: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def _theirs(model: TopKTransformer) -> Generate:
    theirs = _exported(model)
    device = model.tok_embeddings.weight.device

    @torch.inference_mode()
    def generate(prompts: list[list[int]], tokens: int) -> tuple[list[list[int]], list[float]]:
        x, streamer = torch.tensor(prompts, device=device), _Times()
        found = theirs.generate(
            x, attention_mask=torch.ones_like(x), max_new_tokens=tokens, do_sample=False,
            pad_token_id=0, eos_token_id=None, streamer=streamer,
        )  # fmt: skip
        return found[:, x.shape[1] :].tolist(), streamer.times[1:]

    return generate


def _exported(model: TopKTransformer) -> nn.Module:
    """The model as transformers has it; but for what is laid out otherwise, on the same memory."""
    from lingua_topk.hf import TopKLMForCausalLM
    from lingua_topk.hf.convert import to_hf_config, to_hf_weights

    config = to_hf_config(model.args, model.args.topk, model.layers[0].feed_forward.hidden_dim)
    with torch.device("meta"):
        theirs = TopKLMForCausalLM(config)
    theirs.load_state_dict(to_hf_weights(model.state_dict(), config), assign=True)
    rotary = theirs.model.rotary_emb  # a buffer that is in no state dict
    theirs.model.rotary_emb = type(rotary)(config).to(model.tok_embeddings.weight.device)
    return theirs.eval().requires_grad_(False)


# --- correctness ---


def _check_correct(device: str, batch: int, site: str) -> None:
    """RuntimeError where texts of a small model in float64 are not the same, all three ways."""
    model = _model(
        **CHECKED, site=site, dtype=torch.float64, device=device, length=8 + CHECKED_TOKENS
    )
    prompts = _prompts(batch, 8, CHECKED["vocab"])
    ways = {DENSE: _ours(model, False), SPARSE: _ours(model, True), THEIRS: _theirs(model)}
    texts = {name: generate(prompts, CHECKED_TOKENS)[0] for name, generate in ways.items()}
    for name in (SPARSE, THEIRS):
        if texts[name] != texts[DENSE]:
            raise RuntimeError(
                f"{name}: a text in float64 is not that of dense decoding; no time is reported of"
                " what is not correct"
            )


# --- time ---


def _in_turns(
    ways: dict[str, Generate], prompts: list[list[int]], tokens: int, repeats: int, set_up: int
) -> tuple[np.ndarray, list[list[list[int]]]]:
    """Seconds a token behind those of `set_up`, [repeats, ways], and the texts of each way."""
    seconds, texts = np.empty((1 + repeats, len(ways))), []
    for turn in range(len(seconds)):
        texts = []
        for i, generate in enumerate(ways.values()):
            text, times = generate(prompts, tokens)
            seconds[turn, i] = (times[-1] - times[set_up - 1]) / (tokens - set_up)
            texts.append(text)
    return seconds[1:], texts


def byte_ceiling(model: TopKTransformer, batch: int) -> float:
    """How often faster a token can be for what is not read: bytes of weights, dense over sparse.

    For distinct survivors in every row of the batch; without embedding, cache and activations.
    """
    read = sum(weight.numel() for weight in model.parameters())
    read -= model.tok_embeddings.weight.numel()  # but for a row; tied, the output reads it
    if "output.weight" not in model.state_dict():
        read += model.tok_embeddings.weight.numel()
    args = model.args.topk
    saved = 0
    for layer in args.topk_layers(len(model.layers)):
        if args.site == "residual" and layer + 1 < len(model.layers):
            saved += _saved(model.layers[layer + 1].attention, ("wq", "wk", "wv"), args.k * batch)
        if args.site == "mlp":
            saved += _saved(model.layers[layer].feed_forward, ("w2", "w3"), args.k * batch)
    return read / (read - saved)


def _saved(part: nn.Module, names: tuple[str, ...], survivors: int) -> int:
    """Weights that are not read, where of the width that is selected in so many are."""
    saved = 0
    for name in names:
        weight = getattr(part, name).weight  # w3 has the selected width in its rows
        width = weight.shape[0] if name == "w3" else weight.shape[1]
        saved += weight.numel() * max(width - survivors, 0) // width
    return saved


def _rows(
    seconds: np.ndarray, texts: list[list[list[int]]], ceiling: float, device: str
) -> list[dict[str, Any]]:
    names = (DENSE, SPARSE, THEIRS)
    rows = []
    for i, name in enumerate(names):
        ratio = np.percentile(seconds[:, 0] / seconds[:, i], (10, 50, 90))
        over = np.percentile(seconds[:, names.index(THEIRS)] / seconds[:, i], (10, 50, 90))
        saving = None
        with suppress(ZeroDivisionError):
            saving = (1 - 1 / ratio[1]) / (1 - 1 / ceiling) if name == SPARSE else None
        same = np.mean([a == b for x, y in zip(texts[0], texts[i], strict=True)
                        for a, b in zip(x, y, strict=True)])  # fmt: skip
        microseconds = 1e6 * np.median(seconds[:, i])
        rows.append({
            "what": name,
            "ratio": round(float(ratio[1]), 3),
            "ratio_p10": round(float(ratio[0]), 3),
            "ratio_p90": round(float(ratio[2]), 3),
            "over_transformers": round(float(over[1]), 3),
            "over_transformers_p10": round(float(over[0]), 3),
            "over_transformers_p90": round(float(over[2]), 3),
            "ceiling": round(ceiling, 3),
            "saving": None if saving is None else round(float(saving), 2),
            "same_tokens": round(float(same), 2),
            "microseconds": round(float(microseconds), 1) if device == "cuda" else None,
        })  # fmt: skip
    return rows


def _show(rows: list[dict[str, Any]]) -> None:
    first = rows[0]
    shape = (
        f"D={first['dim']}, L={first['layers']}, vocabulary {first['vocab']:,}, k={first['k']}"
        f" ({first['site']}), batch {first['batch']}, {first['dtype']}; bytes allow"
        f" {first['ceiling']}"
    )
    columns = ("what", "ratio", "10%", "90%", "over transformers", "10%", "90%", "saving", "us")
    table = Table(*columns, title=shape)
    for row in rows:
        over = ("over_transformers", "over_transformers_p10", "over_transformers_p90")
        values = [f"{row[name]:.2f}" for name in ("ratio", "ratio_p10", "ratio_p90", *over)]
        saving = "" if row["saving"] is None else f"{row['saving']:.0%}"
        time_shown = "" if row["microseconds"] is None else f"{row['microseconds']:,}"
        table.add_row(row["what"], *values, saving, time_shown)
    Console().print(table)


if __name__ == "__main__":
    cli.run(main)
