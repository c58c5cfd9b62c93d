"""Perplexity on held-out documents: every token predicted once, none left out.

A document is its bos token, where the tokenizer has one, and the tokens of its text; eos
is not scored, so that the total is the code length of the text and of nothing else. A
document longer than the window is read in overlapping (strided) windows: from the second
on, only tokens with at least `context` tokens before them are scored there. lm-eval's
rolling windows are disjoint instead and give a higher number.
"""

import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from lingua_topk import topk_handle
from lingua_topk.errors import CheckpointError, DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Window:
    """A part of a document that is read at once.

    The input is tokens [start, stop) of the document; predicted are tokens
    [first_scored, stop], each from those before it in the window.
    """

    document: int
    start: int
    stop: int
    first_scored: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass
class Documents:
    """Tokenised text, and how much text it is."""

    tokens: list[list[int]] = field(default_factory=list)
    n_characters: int = 0
    n_bytes: int = 0  # in UTF-8

    def add(self, text: str, tokens: list[int]) -> None:
        """One more document: its text, and its tokens with bos where there is one."""
        self.tokens.append(tokens)
        self.n_characters += len(text)
        self.n_bytes += len(text.encode("utf-8"))


def tokenised(texts: Iterable[str], tokenizer) -> Documents:
    """The documents of `texts`. DataError where they hold nothing to predict."""
    documents = Documents()
    has_bos = getattr(tokenizer, "bos_id", None) is not None
    for text in texts:
        documents.add(text, tokenizer.encode(text, add_bos=has_bos, add_eos=False))
    if not any(len(tokens) > 1 for tokens in documents.tokens):
        raise DataError("the held-out documents hold no token to predict: give more text")
    return documents


def windows_of(document: int, n_tokens: int, window: int, context: int) -> Iterator[Window]:
    """The windows of a document of `n_tokens`, bos included, in their order.

    1 <= context < window; tokens 1 .. n_tokens - 1 are scored, each in one window.
    """
    last = n_tokens - 1
    start, next_scored = 0, 1
    while next_scored <= last:
        stop = min(start + window, last)
        yield Window(document, start, stop, next_scored)
        next_scored = stop + 1
        start = next_scored - context


def batches_of(windows: list[Window], batch_tokens: int) -> list[list[Window]]:
    """Windows of similar length together, at most `batch_tokens` tokens with the padding.

    A single longer window is a batch of its own.
    """
    batches: list[list[Window]] = []
    for window in sorted(windows, key=len, reverse=True):
        if batches and (len(batches[-1]) + 1) * len(batches[-1][0]) <= batch_tokens:
            batches[-1].append(window)
        else:
            batches.append([window])
    return batches


class _SurvivorCounts:
    """Survivors a TopK layer at scored positions, counted by hooks while it is entered."""

    def __init__(self, model: nn.Module):
        handle = topk_handle(model)
        self.modules = {} if handle is None else handle.modules
        device = next(model.parameters()).device
        self.totals = torch.zeros(len(self.modules), dtype=torch.int64, device=device)
        self.scored: Tensor | None = None  # bool [B, S], set before each forward
        self._hooks: list[Any] = []

    def __enter__(self) -> "_SurvivorCounts":
        for index, module in enumerate(self.modules.values()):
            self._hooks.append(module.register_forward_hook(self._counter(index)))
        return self

    def __exit__(self, *exception) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def _counter(self, index: int):
        def count(module, inputs, y: Tensor) -> None:  # y: [B, S, D]
            self.totals[index] += (y[self.scored] != 0).sum()

        return count


@torch.inference_mode()
def negative_log_likelihoods(
    model: nn.Module,
    documents: Documents,
    window: int,
    context: int,
    batch_tokens: int,
    label: str = "",
) -> tuple[Tensor, dict[int, float]]:
    """Summed negative log-likelihood of each document, and mean survivors a token by layer.

    Nats, float64 [documents]; a document without a scored token has 0. All processes call
    it and get the same; each reads its share of the windows. The log-softmax is in float32
    or better whatever the model's dtype, and sums are in float64.
    """
    rank, size = _rank_and_size()
    windows = [
        one
        for document, tokens in enumerate(documents.tokens)
        for one in windows_of(document, len(tokens), window, context)
    ]
    device = next(model.parameters()).device
    totals = torch.zeros(len(documents.tokens), dtype=torch.float64, device=device)
    batches = batches_of(windows, batch_tokens)[rank::size]
    logger.info("%s: %d windows in %d batches", label or "evaluating", len(windows), len(batches))
    bar = tqdm(batches, desc=label, unit="batch", leave=False, disable=None if rank == 0 else True)
    with _SurvivorCounts(model) as survivors:
        for batch in bar:
            inputs, targets, scored = (x.to(device) for x in _padded(batch, documents))
            survivors.scored = scored
            losses = _losses(model(inputs), targets)  # [B, S], 0 where not scored
            owners = torch.tensor([one.document for one in batch], device=device)
            totals.index_add_(0, owners, losses.double().sum(dim=1))
    if size > 1:
        dist.all_reduce(totals)
        dist.all_reduce(survivors.totals)
    n_tokens = n_scored(documents)
    l0 = {
        layer: total / n_tokens
        for layer, total in zip(survivors.modules, survivors.totals.tolist(), strict=True)
    }
    return totals.cpu(), l0


def n_scored(documents: Documents) -> int:
    """How many tokens are predicted: all but the first of each document."""
    return sum(max(len(tokens) - 1, 0) for tokens in documents.tokens)


def measures(documents: Documents, nll: Tensor) -> dict[str, float | None]:
    """What the likelihoods say of the whole text; `nll` as `negative_log_likelihoods` gives it.

    nll_per_token in nats, weighted by tokens; its standard error takes documents as the
    independent units (a ratio estimator: tokens of a document depend on each other), and is
    None for a single one. CheckpointError where the likelihoods are not finite.
    """
    n_tokens = n_scored(documents)
    mean = nll.sum().item() / n_tokens
    if not math.isfinite(mean):
        raise CheckpointError(
            f"the model gives {mean} nats a token: its outputs overflow, or hold NaN; evaluate it"
            " with dtype=fp32, or use an earlier checkpoint"
        )
    lengths = torch.tensor([max(len(tokens) - 1, 0) for tokens in documents.tokens]).double()
    residuals = nll - mean * lengths
    n = len(documents.tokens)
    # With a single document there is nothing to estimate a spread from.
    spread = n / (n - 1) * residuals.square().sum().item() if n > 1 else None
    return {
        "documents": n,
        "tokens": n_tokens,
        "bytes": documents.n_bytes,
        "nll_per_token": mean,
        "nll_per_token_stderr": None if spread is None else math.sqrt(spread) / n_tokens,
        "perplexity": math.exp(mean),
        "bits_per_byte": nll.sum().item() / math.log(2) / documents.n_bytes,
        "nll_per_char": nll.sum().item() / documents.n_characters,
        "avg_seqlen": n_tokens / n,
    }


def _padded(batch: list[Window], documents: Documents) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs and targets, int64 [B, S], padded at the end; and which targets are scored.

    What stands behind a token cannot change its prediction, so padding needs no mask.
    """
    length = max(map(len, batch))
    inputs = torch.zeros(len(batch), length, dtype=torch.int64)
    targets = torch.zeros_like(inputs)
    scored = torch.zeros_like(inputs, dtype=torch.bool)
    for row, one in enumerate(batch):
        tokens = torch.tensor(documents.tokens[one.document][one.start : one.stop + 1])
        inputs[row, : len(one)] = tokens[:-1]
        targets[row, : len(one)] = tokens[1:]
        # The target at position p is token start + p + 1.
        scored[row, one.first_scored - one.start - 1 : len(one)] = True
    return inputs, targets.masked_fill(~scored, -100), scored


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """logits: [B, S, V]; targets: [B, S], -100 not scored. Nats, [B, S]."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)  # [B S, V]
    return F.cross_entropy(wide, targets.flatten(), reduction="none").view(targets.shape)


def _rank_and_size() -> tuple[int, int]:
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1
