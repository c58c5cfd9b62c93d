"""What became of texts that a steered model wrote: counted, and compared with unsteered ones."""

import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import nn

from apps.topk.evaluation.scoring import Request, score
from lingua_topk.analysis.words import words_of
from lingua_topk.steering.measures import distinct, lift, steering_score

MOST_NATS = 700.0  # a token; e to more is no number


@dataclass(frozen=True)
class Written:
    """Texts of one model under one intervention.

    Attributes:
        prompts, tokens: ids, a text each.
        words: of each generated token the word that it is a part of, "" for none.
        perplexity: of all generated tokens under the judge.
        distinct_1, distinct_2: means over texts.
    """

    prompts: list[list[int]]
    tokens: list[list[int]]
    words: list[list[str]]
    perplexity: float
    distinct_1: float
    distinct_2: float

    @property
    def n_tokens(self) -> int:
        return sum(map(len, self.tokens))

    def hits(self, words: Collection[str]) -> tuple[int, int]:
        """How many generated tokens belong to one of the words, and of how many."""
        return sum(word in words for text in self.words for word in text), self.n_tokens


def written(
    prompts: Sequence[list[int]],
    tokens: Sequence[list[int]],
    pieces: Sequence[bytes],
    judge: nn.Module,
    batch_tokens: int,
) -> Written:
    """The texts with what can be said of them alone. judge: whose perplexity it is.

    pieces: what each token spells.
    """
    n = sum(map(len, tokens))
    requests = [
        Request(tuple(prompt), tuple(text))
        for prompt, text in zip(prompts, tokens, strict=True)
        if text
    ]
    nats = 0.0
    if requests:
        scores = score(judge, requests, judge.max_seqlen, batch_tokens, "perplexity")
        nats = -scores.log_likelihoods.sum().item()
    means = [float(np.mean([distinct(text, size) for text in tokens])) for size in (1, 2)]
    return Written(
        list(map(list, prompts)),
        list(map(list, tokens)),
        [
            _words(prompt, text, pieces) for prompt, text in zip(prompts, tokens, strict=True)
        ],
        math.exp(min(nats / max(n, 1), MOST_NATS)),
        *means,
    )  # fmt: skip


def _words(prompt: list[int], text: list[int], pieces: Sequence[bytes]) -> list[str]:
    """Of each token of `text` its word, also where the prompt begins it."""
    found = words_of(np.array([prompt + text]), pieces)
    return [found.words[i] if i >= 0 else "" for i in found.index[len(prompt) :].tolist()]


@dataclass(frozen=True)
class Numbers:
    """What steering did to texts.

    Attributes:
        concept_rate, unsteered_rate: share of the generated tokens among the words.
        lift: see `lingua_topk.steering.measures.lift`.
        perplexity, unsteered_perplexity: under the judge; perplexity_ratio is their quotient.
        distinct_1, distinct_2: of the steered texts.
        variety_ratio: distinct_2 over that of the unsteered texts.
        score: see `steering_score`.
        tokens: generated, steered.
    """

    concept_rate: float
    unsteered_rate: float
    lift: float
    perplexity: float
    unsteered_perplexity: float
    perplexity_ratio: float
    distinct_1: float
    distinct_2: float
    variety_ratio: float
    score: float
    tokens: int

    def json(self) -> dict[str, Any]:
        return asdict(self)


def compared(steered: Written, unsteered: Written, words: Collection[str]) -> Numbers:
    """The numbers of a concept's words."""
    hits, before = steered.hits(words), unsteered.hits(words)
    gain = lift(hits, before)
    ratio = steered.perplexity / unsteered.perplexity
    variety = steered.distinct_2 / unsteered.distinct_2
    return Numbers(
        concept_rate=hits[0] / max(hits[1], 1),
        unsteered_rate=before[0] / max(before[1], 1),
        lift=gain,
        perplexity=steered.perplexity,
        unsteered_perplexity=unsteered.perplexity,
        perplexity_ratio=ratio,
        distinct_1=steered.distinct_1,
        distinct_2=steered.distinct_2,
        variety_ratio=variety,
        score=steering_score(gain, ratio, variety),
        tokens=hits[1],
    )
