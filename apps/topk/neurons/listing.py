"""A few neurons by name, with their words, for the terminal."""

from collections.abc import Sequence

import numpy as np

from apps.topk.neurons.folder import MeasuredLayer
from apps.topk.terminal import shown

WORDS = 10  # a neuron


def extreme_neurons(
    layers: Sequence[MeasuredLayer], measure: str, n: int, highest: bool = False
) -> list[tuple[int, int, float, list[str]]]:
    """The `n` scored neurons of the TopK layers with the lowest (highest) value of a measure.

    Of those that are told by their words. Layer, neuron, value and words of each, the most
    extreme first.
    """
    found = []
    for one in layers:
        values = one.arrays[measure]
        for neuron in np.flatnonzero(one.told & np.isfinite(values)) if one.is_topk else ():
            words = [word for word, _ in one.words[neuron][:WORDS]]
            found.append((one.index, int(neuron), float(values[neuron]), words))
    found.sort(key=lambda entry: (-entry[2] if highest else entry[2], *entry[:2]))
    return found[:n]


def median_of_control(layers: Sequence[MeasuredLayer], measure: str) -> float:
    """The median of the shuffled control of the TopK layers, NaN where nothing is scored."""
    parts = [one.arrays[f"shuffled_{measure}"] for one in layers if one.is_topk]
    values = np.concatenate(parts)
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else float("nan")


def describe(layers: Sequence[MeasuredLayer], n: int = 3) -> str:
    """The neurons with the lowest semantic entropy, and those with the highest MonoScore."""
    kinds = (
        ("lowest semantic entropy", "semantic_entropy", False, " bits"),
        ("highest MonoScore", "mono_score", True, ""),
    )
    lines = []
    for title, measure, highest, unit in kinds:
        chosen = extreme_neurons(layers, measure, n, highest)
        if not chosen:
            lines.append(f"no neuron has enough words for {title.split(' ', 1)[1]}")
            continue
        control = median_of_control(layers, measure)
        lines.append(f"neurons with the {title} (on shuffled tokens the median is {control:.3g}):")
        lines += [
            f"  {f'{layer}:{neuron}':>8}  {value:.3g}{unit}  {shown(', '.join(words))}"
            for layer, neuron, value, words in chosen
        ]
    return "\n".join(lines)
