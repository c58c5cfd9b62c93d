"""Perplexity on held-out documents: every token predicted once, none left out.

A document is its bos token, where the model was trained with one, and the tokens of its text;
without bos its first token is not scored. eos is not scored, so that the total is the code
length of the text and of nothing else. A document longer than the window is read in
overlapping (strided) windows: from the second on, only tokens with at least `context` tokens
before them are scored there. lm-eval's rolling windows are disjoint instead and give a higher
number.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from apps.topk.evaluation.confidence import Z_95
from apps.topk.evaluation.scoring import Request, score
from lingua_topk import topk_handle
from lingua_topk.errors import CheckpointError, DataError

MOST_NATS = 500  # a token; of much more there is no perplexity in float64


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
    sizes: list[int] = field(default_factory=list)  # bytes in UTF-8, a document
    n_characters: int = 0

    @property
    def n_bytes(self) -> int:
        return sum(self.sizes)

    def add(self, text: str, tokens: list[int]) -> None:
        """One more document: its text, and its tokens with bos where there is one."""
        self.tokens.append(tokens)
        self.n_characters += len(text)
        self.sizes.append(len(text.encode("utf-8")))


def tokenised(texts: Iterable[str], tokenizer, add_bos: bool) -> Documents:
    """The documents of `texts`. DataError where they hold nothing to predict."""
    documents = Documents()
    for text in texts:
        documents.add(text, tokenizer.encode(text, add_bos=add_bos, add_eos=False))
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


class _SurvivorCounts:
    """Survivors a TopK layer at scored positions, counted by hooks while it is entered."""

    def __init__(self, model: nn.Module):
        handle = topk_handle(model)
        self._modules = {} if handle is None else handle.modules
        device = next(model.parameters()).device
        self._totals = torch.zeros(len(self._modules), dtype=torch.int64, device=device)
        self._scored: Tensor | None = None
        self._hooks: list[Any] = []

    def __enter__(self) -> "_SurvivorCounts":
        for index, module in enumerate(self._modules.values()):
            self._hooks.append(module.register_forward_hook(self._counter(index)))
        return self

    def __exit__(self, *exception) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def count_at(self, scored: Tensor) -> None:
        """The next forward counts at these places, bool [B, S]."""
        self._scored = scored

    def means(self, n_tokens: int) -> dict[int, float]:
        """Survivors a token by layer, over all processes."""
        if dist.is_initialized():
            dist.all_reduce(self._totals)
        return {
            layer: total / n_tokens
            for layer, total in zip(self._modules, self._totals.tolist(), strict=True)
        }

    def _counter(self, index: int):
        def count(module, inputs, y: Tensor) -> None:  # y: [B, S, D]
            self._totals[index] += (y[self._scored] != 0).sum()

        return count


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
    it and get the same; see `scoring.score`, of the precision too.
    """
    windows = [
        one
        for document, tokens in enumerate(documents.tokens)
        for one in windows_of(document, len(tokens), window, context)
    ]
    requests = [_request(one, documents.tokens[one.document]) for one in windows]
    with _SurvivorCounts(model) as survivors:
        scores = score(
            model, requests, window, batch_tokens, label or "evaluating",
            share_contexts=False, before=survivors.count_at,
        )  # fmt: skip
    owners = torch.tensor([one.document for one in windows])
    totals = torch.zeros(len(documents.tokens), dtype=torch.float64)
    totals.index_add_(0, owners, -scores.log_likelihoods)
    return totals, survivors.means(n_scored(documents))


def _request(window: Window, tokens: list[int]) -> Request:
    context = tokens[window.start : window.first_scored]
    return Request(tuple(context), tuple(tokens[window.first_scored : window.stop + 1]))


def n_scored(documents: Documents) -> int:
    """How many tokens are predicted: all but the first of each document."""
    return sum(max(len(tokens) - 1, 0) for tokens in documents.tokens)


def measures(documents: Documents, nll: Tensor) -> dict[str, float | None]:
    """What the likelihoods say of the whole text; `nll` as `negative_log_likelihoods` gives it.

    nll_per_token in nats, weighted by tokens; its standard error takes documents as the
    independent units (a ratio estimator: tokens of a document depend on each other), and is
    None for a single one, as is the 95% confidence interval of the perplexity, e to the ends of
    that of nll_per_token. CheckpointError where the likelihoods, or e to them, are not finite.
    """
    n_tokens = n_scored(documents)
    mean = nll.sum().item() / n_tokens
    if not mean < MOST_NATS:
        raise CheckpointError(
            f"the model gives {mean:.4g} nats a token: it has diverged, or its outputs overflow or"
            " hold NaN; evaluate it with dtype=fp32, or use an earlier checkpoint"
        )
    lengths = torch.tensor([max(len(tokens) - 1, 0) for tokens in documents.tokens]).double()
    residuals = nll - mean * lengths
    n = len(documents.tokens)
    # With a single document there is nothing to estimate a spread from.
    spread = n / (n - 1) * residuals.square().sum().item() if n > 1 else None
    error = None if spread is None else math.sqrt(spread) / n_tokens
    return {
        "documents": n,
        "tokens": n_tokens,
        "bytes": documents.n_bytes,
        "nll_per_token": mean,
        "nll_per_token_stderr": error,
        "perplexity": math.exp(mean),
        "perplexity_ci95": None if error is None else _interval(mean, error),
        "bits_per_byte": nll.sum().item() / math.log(2) / documents.n_bytes,
        "nll_per_char": nll.sum().item() / documents.n_characters,
        "avg_seqlen": n_tokens / n,
    }


def _interval(mean: float, error: float) -> list[float]:
    return [math.exp(mean - Z_95 * error), math.exp(mean + Z_95 * error)]
