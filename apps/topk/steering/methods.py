"""The ways of steering that are compared, each on the words of the same concepts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from apps.topk.neurons.reading import reader_of
from apps.topk.steering.handles import Handle, Handles
from lingua_topk.analysis.words import Words
from lingua_topk.errors import DataError
from lingua_topk.steering import Add, AddDirection, Intervention
from lingua_topk.steering.sites import output_of, sites_of

NEURON, RANDOM, DIRECTION = "neuron", "random neuron", "direction"
TWIN_NEURON, TWIN_DIRECTION = "twin neuron", "twin direction"
FIRST = 5  # words, which say what a neuron stands for
SIMILAR = 10  # neurons of about the same firing rate, of which the random one is drawn


@dataclass(frozen=True)
class Concept:
    """What a handle's text is steered towards.

    Attributes:
        handle: with the words that delta is chosen by.
        held_out: the words that the numbers are of.
    """

    handle: Handle
    held_out: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.handle.name


def split_words(words: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Every other word: those to choose by, and those that are held out."""
    return tuple(words[::2]), tuple(words[1::2])


@dataclass(frozen=True)
class Method:
    """One way of steering towards one concept.

    Attributes:
        name: of the way.
        unit: what a delta of 1 is, in units of activation: the neuron's maximum with its sign, or
            the length of the direction.
        intervention: of a delta.
        neuron: LAYER:NEURON, "" for a direction.
    """

    name: str
    unit: float
    intervention: Callable[[float], Intervention]
    neuron: str = ""


def of_neuron(name: str, handle: Handle) -> Method:
    """Adding to a neuron."""

    unit = handle.sign * handle.maximum

    def intervention(delta: float) -> Intervention:
        return Add(handle.layer, handle.neuron, delta * unit)

    return Method(name, unit, intervention, handle.name)


def of_direction(name: str, layer: int, direction: Tensor) -> Method:
    """Adding a direction, [D]."""

    def intervention(delta: float) -> Intervention:
        return AddDirection(layer, direction, delta)

    return Method(name, direction.norm().item(), intervention)


def random_neuron(handles: Handles, one: Handle, seed: int) -> Handle:
    """Another neuron of the layer that fires about as often, and on other words.

    None of the FIRST words of either is among those of the other, where there are such neurons.
    Drawn from the SIMILAR ones of nearest log firing rate. DataError where no other ever fires.
    """
    firing = [
        other
        for other in handles.all_of(one.layer)
        if other.neuron != one.neuron and other.maximum > 0
    ]
    words = set(one.words[:FIRST])
    others = [other for other in firing if not words & set(other.words[:FIRST])] or firing
    if not others:
        raise DataError(
            f"layer {one.layer} has no neuron besides {one.name} that fires: give an analysis of"
            " more text"
        )
    rate = np.log(one.firing_rate)
    others.sort(key=lambda other: (abs(np.log(other.firing_rate) - rate), other.neuron))
    draws = np.random.default_rng([seed, one.layer, one.neuron])
    return others[draws.integers(min(SIMILAR, len(others)))]


@torch.inference_mode()
def directions(
    model: nn.Module,
    concepts: Sequence[Concept],
    tokens: np.ndarray,
    words: Words,
    batch_rows: int,
    dense: bool,
) -> dict[str, Tensor]:
    """By concept the mean of a layer's values where its words stand less the mean elsewhere, [D].

    Those words are the ones to choose by. A concept whose words do not stand in the text has
    none.

    Args:
        tokens: int [N, S], with their `words`.
        dense: as for `steer`.
    """
    index = words.index.reshape(tokens.shape)
    masks = {one.name: _stands(one.handle.words, words.words, index) for one in concepts}
    sums: dict[str, Tensor] = {}
    totals: dict[int, Tensor] = {}
    sites = sites_of(model, dense)
    read = reader_of(model)
    for first in range(0, len(tokens), batch_rows):
        heard = _heard(model, sites, {one.handle.layer for one in concepts}, read,
                       torch.from_numpy(tokens[first : first + batch_rows]).long())  # fmt: skip
        for layer, y in heard.items():
            total = y.sum(dim=(0, 1))
            totals[layer] = totals[layer] + total if layer in totals else total
        for one in concepts:
            here = torch.from_numpy(masks[one.name][first : first + batch_rows])
            y = heard[one.handle.layer]
            found = y[here.to(y.device)].sum(dim=0)  # [D]
            sums[one.name] = sums[one.name] + found if one.name in sums else found
    made = {}
    for one in concepts:
        n = int(masks[one.name].sum())
        if 0 < n < tokens.size:
            rest = (totals[one.handle.layer] - sums[one.name]) / (tokens.size - n)
            made[one.name] = (sums[one.name] / n - rest).float()
    return made


def _heard(
    model: nn.Module, sites: Mapping, layers: set[int], read: Callable, tokens: Tensor
) -> dict[int, Tensor]:
    """What the layers give for a batch of rows, float64 [B, S, D]."""
    heard: dict[int, Tensor] = {}

    def listen(layer: int):
        def hook(module: nn.Module, inputs: tuple, output) -> None:
            heard[layer] = output_of(output).double()

        return hook

    handles = [sites[one].module.register_forward_hook(listen(one)) for one in sorted(layers)]
    try:
        read(tokens)
    finally:
        for handle in handles:
            handle.remove()
    return heard


def _stands(wanted: Sequence[str], known: Sequence[str], index: np.ndarray) -> np.ndarray:
    """Where one of the words stands: bool of the shape of `index`, -1 is no word."""
    wanted = set(wanted)
    is_wanted = np.array([*(word in wanted for word in known), False])  # the last one is that of -1
    return is_wanted[index]
