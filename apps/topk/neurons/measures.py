"""Every measure of every neuron of a recorded layer, with its shuffled control."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from apps.topk.neurons.settings import Settings
from lingua_topk.analysis import neurons
from lingua_topk.analysis.distinctive import DistinctiveWord, distinctive_words
from lingua_topk.analysis.monoscore import mono_score
from lingua_topk.analysis.recording import Block, LayerRecording
from lingua_topk.analysis.semantics import semantic_measures
from lingua_topk.analysis.vectors import Vectors
from lingua_topk.analysis.words import Words

TOP_TOKENS = 20
NEXT_TOKENS = 10
DIRECT_NEURONS = 128  # at once: their logits over the whole vocabulary are in memory


@dataclass(frozen=True)
class Text:
    """What stands at the places of a recording.

    Attributes:
        tokens: int32 [N, S].
        words: which words they are parts of.
        vectors: of the words.
    """

    tokens: np.ndarray
    words: Words
    vectors: Vectors

    @property
    def word_counts(self) -> np.ndarray:
        """How many places belong to each word, int64 [W]."""
        index = self.words.index
        return np.bincount(index[index >= 0], minlength=len(self.words.words))

    def shuffled(self, seed: int) -> "Text":
        """The same tokens and words at places that have nothing to do with what fires there."""
        order = np.random.default_rng(seed).permutation(self.tokens.size)
        tokens = self.tokens.reshape(-1)[order].reshape(self.tokens.shape)
        return replace(
            self, tokens=tokens, words=replace(self.words, index=self.words.index[order])
        )


@dataclass(frozen=True)
class Measured:
    """A layer's neurons: arrays [D] or [D, n] by name, the words that each fires on most strongly,
    and those that tell it apart."""

    arrays: dict[str, np.ndarray]
    words: list[list[tuple[str, float]]]
    distinctive: list[list[DistinctiveWord]]


def measure_layer(
    layer: LayerRecording, text: Text, shuffled: Text, vocab_size: int, settings: Settings
) -> Measured:
    """What a layer's neurons fire on; `shuffled` is the control, its arrays are named so."""
    parts: list[dict[str, np.ndarray]] = []
    words: list[list[tuple[str, float]]] = []
    distinctive: list[list[DistinctiveWord]] = []
    counts, control_counts = text.word_counts, shuffled.word_counts
    row_length = text.tokens.shape[1]
    for block in layer.blocks():
        found = neurons.token_mass(block, text.tokens.reshape(-1))
        semantic, mono, fired_on = _semantics(block, text, counts, settings)
        ids, shares = neurons.top_tokens(found, TOP_TOKENS)
        entropy = neurons.token_entropy(found)
        part = {
            "counts": block.counts,
            "firing_rate": block.counts / layer.n_tokens,
            **neurons.strength(block),
            "token_entropy": entropy,
            "token_entropy_count": neurons.token_entropy(found, by_count=True),
            "token_entropy_normalised": entropy / np.log2(vocab_size),
            "top_tokens": ids,
            "top_token_share": shares,
            **semantic,
            "mono_score": mono,
            **_control(block, shuffled, control_counts, settings),
        }
        if settings.contexts:
            part |= neurons.top_contexts(
                block, row_length, settings.contexts, settings.context_tokens
            )
        parts.append(part)
        words += fired_on
        distinctive += distinctive_words(block, text.words)
    arrays = {name: np.concatenate([one[name] for one in parts]) for name in parts[0]}
    return Measured(arrays, words, distinctive)


def _semantics(
    block: Block, text: Text, counts: np.ndarray, settings: Settings
) -> tuple[dict[str, np.ndarray], np.ndarray, list[list[tuple[str, float]]]]:
    found = semantic_measures(
        block, text.words, text.vectors, threshold=settings.threshold,
        min_words=settings.min_words, max_words=settings.max_words,
    )  # fmt: skip
    arrays = {
        "semantic_entropy": found.entropy,
        "n_words": found.n_words,
        "n_with_vector": found.n_with_vector,
        "coverage": found.coverage,
    }
    return arrays, mono_score(block, text.words, text.vectors, counts), found.top_words


def _control(
    block: Block, shuffled: Text, counts: np.ndarray, settings: Settings
) -> dict[str, np.ndarray]:
    mass = neurons.token_mass(block, shuffled.tokens.reshape(-1))
    semantic, mono, _ = _semantics(block, shuffled, counts, settings)
    return {
        "shuffled_token_entropy": neurons.token_entropy(mass),
        "shuffled_token_entropy_count": neurons.token_entropy(mass, by_count=True),
        "shuffled_semantic_entropy": semantic["semantic_entropy"],
        "shuffled_mono_score": mono,
    }


@torch.no_grad()
def next_tokens(model: nn.Module) -> dict[str, np.ndarray]:
    """The tokens that each neuron promotes and suppresses most; see `direct_effects`.

    Of neurons that are components of the residual stream, which are the same in every layer. What
    a neuron of a feed-forward adds also depends on the other half of its gate: it has none of
    these. int32 and float32 [D, n].
    """
    norm, output = model.norm.weight.float(), _output(model).float()
    directions = torch.eye(model.dim, device=norm.device)  # [D, D]
    parts = [
        neurons.direct_effects(some, norm, output, NEXT_TOKENS)
        for some in directions.split(DIRECT_NEURONS)
    ]
    arrays = {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in parts[0]}
    return {
        name: array.astype(np.float32 if name.endswith("logits") else np.int32)
        for name, array in arrays.items()
    }


def _output(model: nn.Module) -> torch.Tensor:
    """The output matrix, [V, D]; tied models share it with the embedding."""
    output = model.output
    return output.weight if hasattr(output, "weight") else output.tied_module.weight
