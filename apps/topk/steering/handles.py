"""Neurons that can be turned, with what is known of them from an analysis.

A neuron that detects a thing need not produce it, so that a good handle is told by two numbers:
the semantic entropy of the words it fires on, from the analysis, and an output score, from raising
it and looking at what the model says next, as far as that leaves the text fluent (after Arad et
al., arXiv 2505.20063, who choose features of autoencoders so).
"""

import difflib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from apps.topk.inference import CAUSAL, hidden_states, visible, window_of
from apps.topk.neurons.folder import MODEL, MeasuredLayer, read_analysis, read_layers
from lingua_topk.errors import ConfigError, DataError
from lingua_topk.steering import Add, steer

NAME = re.compile(r"(\d{1,9}):(\d{1,9})")
SHOWN_WORDS = 3  # of the nearest, in a message
LEAST_WORDS = 4  # of a handle: two to choose by, two that are held out
STRENGTHS = (0.5, 1.0, 2.0, 4.0, 8.0)  # in multiples of a neuron's maximum
MOST_COST = math.log(2)  # nats a token
LEAST_LOG = -100.0  # log P of a token that is as good as impossible


@dataclass(frozen=True)
class Handle:
    """A neuron of a layer.

    Attributes:
        words: that tell it apart, most first (see `distinctive_words`).
        semantic_entropy: of those, in bits; NaN where they are too few.
        firing_rate: share of the tokens that it fires on.
        mean, maximum: of its |value| where it fires; 0 where it never does.
        sign: of its mean value on the first of the words; -1 is for models without TopK only.
        output_score: in nats, how much likelier its words become as the next word at the strength
            that is best for that and makes text no more than twice as perplexing; None where that
            was not measured.
        strength: that strength, in multiples of its maximum; 0 where none does more good than
            none.
    """

    layer: int
    neuron: int
    words: tuple[str, ...]
    semantic_entropy: float
    firing_rate: float
    mean: float
    maximum: float
    sign: int = 1
    output_score: float | None = None
    strength: float | None = None

    @property
    def name(self) -> str:
        return f"{self.layer}:{self.neuron}"


def parse_name(name: str, field: str = "neuron") -> tuple[int, int]:
    """Layer and neuron of a name such as 3:417."""
    match = NAME.fullmatch(name.strip())
    if match is None:
        raise ConfigError(f"{field}={name!r} is no neuron: give LAYER:NEURON, such as 3:417")
    return int(match[1]), int(match[2])


@dataclass(frozen=True)
class Handles:
    """The neurons of an analysis.

    Attributes:
        folder: of the analysis.
        layers: that were analysed, by index.
        dense: neurons of layers without TopK are handles too.
    """

    folder: Path
    layers: tuple[MeasuredLayer, ...]
    dense: bool = False

    def named(self, name: str) -> Handle:
        """The neuron LAYER:NEURON. ConfigError, with the nearest, for one that is not there."""
        layer, neuron = parse_name(name)
        found = {one.index: one for one in self.layers}
        if layer not in found:
            nearest = min(found, key=lambda index: abs(index - layer))
            raise ConfigError(
                f"neuron={name!r}: layer {layer} is not one that was analysed:"
                f" {', '.join(map(str, found))}; the nearest is {nearest}"
            )
        width = len(found[layer].arrays["counts"])
        if neuron >= width:
            raise ConfigError(
                f"neuron={name!r} is not there: layer {layer} has 0 to {width - 1}; the nearest is"
                f" {layer}:{width - 1}"
            )
        return self._handle(found[layer], neuron)

    def of_word(self, word: str) -> list[Handle]:
        """The neurons that fire on a word, those for which it comes first in front.

        Among those for which it is as far in front, the ones that say least else (the lowest
        semantic entropy). Of the layers with TopK. ConfigError, with the nearest words, where there
        is none.
        """
        wanted = word.strip().lower().replace("\u2019", "'")
        places = self._places_of_words.get(wanted)
        if not places:
            near = difflib.get_close_matches(wanted, self._places_of_words, SHOWN_WORDS, 0.6)
            nearest = f"near it: {', '.join(near)}" if near else "none is near it"
            raise ConfigError(
                f"concept={word!r} is not among the words that a neuron fires on: {nearest}; --list"
                " shows neurons with their words"
            )
        found = [(rank, self._handle(layer, neuron)) for rank, layer, neuron in places]
        found.sort(key=lambda one: (one[0], _falling_last(one[1].semantic_entropy)))
        return [handle for _, handle in found]

    def shortlist(self, n: int) -> list[Handle]:
        """The `n` neurons of lowest semantic entropy, of those that have one and have words."""
        found = []
        for layer in self.layers:
            entropies = layer.arrays["semantic_entropy"]
            chosen = np.flatnonzero(np.isfinite(entropies)) if self._has_handles(layer) else ()
            found += [
                (float(entropies[i]), layer.index, int(i), layer)
                for i in chosen
                if len(layer.distinctive[i]) >= LEAST_WORDS
            ]
        found.sort(key=lambda one: one[:3])
        return [self._handle(layer, neuron) for _, _, neuron, layer in found[:n]]

    def all_of(self, layer: int) -> list[Handle]:
        """All neurons of a layer."""
        (one,) = (one for one in self.layers if one.index == layer)
        return [self._handle(one, neuron) for neuron in range(len(one.arrays["counts"]))]

    def strengths(self, unit: str) -> dict[int, np.ndarray]:
        """By layer the `mean` or the `maximum` of each neuron, [D], for `in_units_of`."""
        return {one.index: one.arrays[unit] for one in self.layers}

    @cached_property
    def _places_of_words(self) -> dict[str, list[tuple[int, MeasuredLayer, int]]]:
        """Of every word where it stands in which neuron's list."""
        places: dict[str, list[tuple[int, MeasuredLayer, int]]] = {}
        for layer in self.layers:
            lists = layer.distinctive if self._has_handles(layer) else ()
            for neuron, words in enumerate(lists):
                for rank, one in enumerate(words):
                    places.setdefault(one.word, []).append((rank, layer, neuron))
        return places

    def _has_handles(self, layer: MeasuredLayer) -> bool:
        return layer.is_topk or self.dense

    @staticmethod
    def _handle(layer: MeasuredLayer, neuron: int) -> Handle:
        numbers = (
            float(layer.arrays[name][neuron])
            for name in ("semantic_entropy", "firing_rate", "mean", "maximum")
        )
        words = layer.distinctive[neuron]
        sign = -1 if words and words[0].mean < 0 else 1
        return Handle(layer.index, neuron, tuple(one.word for one in words), *numbers, sign)


def _falling_last(value: float) -> float:
    return math.inf if math.isnan(value) else value


def read_handles(analysis: Path, part: str = MODEL, dense: bool = False) -> Handles:
    """The neurons in the folder of an analysis; `part` as in `apps.topk.neurons.folder`.

    DataError where there is no finished analysis, or none of that part.
    """
    read_analysis(analysis)
    layers = read_layers(analysis / part)
    if not layers:
        raise DataError(f"{analysis} has no {part}: analyse again, with --twin for the twin's")
    return Handles(analysis, tuple(layers), dense)


# The output score --------------------------------------------------------------------------


def next_word_ids(words: Sequence[str], encode: Callable[[str], list[int]]) -> list[int]:
    """The tokens that are such a word after a space, as a whole, each once, rising.

    A piece that a word begins with begins many others, so that words of several pieces are left
    out; where no word is a single token, their first pieces have to do.
    """
    spelled = [ids for word in words if (ids := encode(f" {word}"))]
    whole = [ids for ids in spelled if len(ids) == 1]
    return sorted({ids[0] for ids in whole or spelled})


def last_log_probabilities(model: nn.Module, rows: Tensor) -> Tensor:
    """What the model gives the next token after each of the rows, int64 [P, S]: nats [P, V]."""
    rows = rows.to(next(model.parameters()).device)
    positions = torch.arange(rows.shape[1], device=rows.device).expand_as(rows)
    sliding = window_of(model)
    mask = CAUSAL if sliding is None else visible(positions, positions, sliding)
    with torch.inference_mode():
        last = hidden_states(model, rows, positions, mask)[:, -1]  # [P, D]
        return model.output(last).double().log_softmax(dim=-1)


def scored(
    handles: Sequence[Handle],
    model: nn.Module,
    tokenizer: Any,
    probes: Tensor,
    on_progress: Callable[[], None] | None = None,
    dense: bool = False,
) -> list[Handle]:
    """The handles with their output scores, highest first.

    P is what the model gives the next token after a probe, P' the same with the neuron raised at
    every position by a multiple of its maximum, W its words (see `next_word_ids`). The gain is log
    mean P'(W) - log mean P(W), means over the probes: the log of the lift that is to be expected.
    The cost is that of -log P under P' less that under P, how much more perplexing what the
    steered model writes is to the other. The score is the largest gain of the multiples in
    STRENGTHS up to the first that costs more than log 2. A neuron that never fires, or has no
    words, has none.

    Args:
        tokenizer: a host's, the model's own.
        probes: int64 [P, S], beginnings of texts.
        dense: as for `steer`.
    """

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_bos=False, add_eos=False)

    before = last_log_probabilities(model, probes)  # [P, V]
    found = []
    for one in handles:
        ids = next_word_ids(one.words, encode)
        if ids and one.maximum > 0:
            found.append(_scored(one, model, probes, before, ids, dense))
        else:
            found.append(one)
        if on_progress is not None:
            on_progress()
    return sorted(found, key=_by_score)


def _scored(
    one: Handle, model: nn.Module, probes: Tensor, before: Tensor, ids: list[int], dense: bool
) -> Handle:
    best, strength = 0.0, 0.0
    for multiple in STRENGTHS:
        delta = one.sign * multiple * one.maximum
        with steer(model, [Add(one.layer, one.neuron, delta)], dense=dense):
            after = last_log_probabilities(model, probes)  # [P, V]
        if not _cost(before, after) <= MOST_COST:  # NaN: not
            break  # more of it costs more
        gain = (_log_mass(after, ids) - _log_mass(before, ids)).item()
        if gain > best:
            best, strength = gain, multiple
    return replace(one, output_score=best, strength=strength)


def _log_mass(log_p: Tensor, ids: list[int]) -> Tensor:
    """log of the sum over probes of P(W), of log P [P, V]; []."""
    return log_p[:, ids].logsumexp(dim=(0, 1))


def _cost(before: Tensor, after: Tensor) -> float:
    """How much more perplexing `after` is to `before` than itself, both log P [P, V], in nats."""
    nats = ((after.exp() - before.exp()) * -before.clamp(min=LEAST_LOG)).sum(dim=-1)  # [P]
    return nats.mean().item()


def _by_score(one: Handle) -> tuple[float, int, int]:
    return (math.inf if one.output_score is None else -one.output_score, one.layer, one.neuron)


def distinct_features(handles: Sequence[Handle]) -> list[Handle]:
    """Of the handles of one index the first: in the residual stream it is one feature, whichever
    the layer."""
    firsts: dict[int, Handle] = {}
    for one in handles:
        firsts.setdefault(one.neuron, one)
    return list(firsts.values())
