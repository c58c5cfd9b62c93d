"""Which neurons are turned: as named, those of a word, or those that look best."""

from collections.abc import Sequence
from dataclasses import dataclass

from apps.topk.corpus import progress
from apps.topk.neurons.arguments import listed
from apps.topk.steering.bench import Bench
from apps.topk.steering.handles import Handle, parse_name, scored
from apps.topk.steering.probes import probes_of
from apps.topk.steering.turning import unknown
from lingua_topk.errors import ConfigError
from lingua_topk.steering import Ablate, steer

CANDIDATES = 32  # whose output score is measured


@dataclass(frozen=True)
class Choice:
    """The neurons that are turned together.

    Attributes:
        neurons: at least one.
        why: a line; "" where the user has named them.
    """

    neurons: tuple[Handle, ...]
    why: str = ""


def named(bench: Bench, names: str) -> Choice:
    """The neurons LAYER:NEURON, with commas. ConfigError for one that is not there."""
    found = dict.fromkeys(parse_name(name) for name in listed(names))
    if not found:
        raise ConfigError(f"neuron={names!r} names none: give LAYER:NEURON, such as 3:417")
    for layer, neuron in found:
        with steer(bench.model, [Ablate(layer, neuron)]):
            pass  # the model itself knows best what is there
    return Choice(tuple(_looked_up(bench, layer, neuron) for layer, neuron in found))


def _looked_up(bench: Bench, layer: int, neuron: int) -> Handle:
    """With what the analysis knows of it, which may be of some layers only."""
    analysed = () if bench.handles is None else [one.index for one in bench.handles.layers]
    if layer not in analysed:
        return unknown(layer, neuron)
    return bench.handles.named(f"{layer}:{neuron}")


def of_word(bench: Bench, word: str, n: int) -> Choice:
    """Of those that fire on a word the `n` that make their words likeliest."""
    candidates = candidates_of_word(bench, word)
    if n > len(candidates):
        raise ConfigError(
            f"n={n} is too many: {len(candidates)} neurons fire on {word!r}; give at most"
            f" {len(candidates)}"
        )
    best = tuple(candidates[:n])
    if len(candidates) == 1:
        why = f"the only one that fires on {word!r}; output score {_scores(best)}"
    else:
        why = f"of {len(candidates)} that fire on {word!r}, the highest output score"
        why += f" ({_scores(best)})"
    return Choice(best, f"{_names(best)}: {why}")


def proposed(bench: Bench, n: int) -> Choice:
    """Of those of lowest semantic entropy the `n` that make their words likeliest."""
    candidates = candidates_of_all(bench)
    if n > len(candidates):
        raise ConfigError(f"n={n} is too many: give at most {len(candidates)}, or --neuron")
    best = tuple(candidates[:n])
    return Choice(
        best,
        f"{_names(best)}: of the {len(candidates)} neurons of lowest semantic entropy, the highest"
        f" output score ({_scores(best)})",
    )


def candidates_of_word(bench: Bench, word: str) -> list[Handle]:
    """Neurons that fire on a word, by falling output score; ConfigError where there is none."""
    handles = bench.needed_handles(f"concept={word!r}")
    return _scored(bench, [one for one in handles.of_word(word) if one.layer in bench.widths])


def candidates_of_all(bench: Bench) -> list[Handle]:
    """The neurons of lowest semantic entropy, by falling output score."""
    handles = bench.needed_handles("choosing a neuron (without --neuron)")
    found = [one for one in handles.shortlist(CANDIDATES) if one.layer in bench.widths]
    if not found:
        raise ConfigError(
            f"{handles.folder} has no neuron that is told by its words: give --neuron, or analyse"
            " more text"
        )
    return _scored(bench, found)


def _scored(bench: Bench, candidates: Sequence[Handle]) -> list[Handle]:
    candidates = candidates[:CANDIDATES]
    with progress.bar("output scores", len(candidates), "neuron") as bar:
        return scored(
            candidates, bench.model, bench.tokenizer, probes_of(bench.analysis), bar.update
        )


def _names(neurons: Sequence[Handle]) -> str:
    return f"neuron{'s' if len(neurons) > 1 else ''} {', '.join(one.name for one in neurons)}"


def _scores(neurons: Sequence[Handle]) -> str:
    known = [f"{one.output_score:.2f}" for one in neurons if one.output_score is not None]
    return f"{', '.join(known)} nats" if known else "not known"
