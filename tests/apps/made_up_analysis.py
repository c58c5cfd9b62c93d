"""Analysis folders whose measures are made up, so that what a comparison must say is known."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np

from apps.topk.neurons.folder import write_layer
from apps.topk.neurons.measures import Measured

N_TOKENS = 100_000


def entropy_of(rates: np.ndarray, draws: np.random.Generator) -> np.ndarray:
    """An entropy in bits that comes from how often a neuron fires, and from nothing else."""
    return np.log2(rates * N_TOKENS) * 0.7 + draws.normal(0, 0.3, len(rates))


def rates_around(middle: float, n: int, draws: np.random.Generator) -> np.ndarray:
    """Firing rates spread log-normally, as counts of `N_TOKENS`."""
    return np.maximum(np.round(middle * np.exp(draws.normal(0, 0.8, n)) * N_TOKENS), 2) / N_TOKENS


def arrays(
    rates: np.ndarray, entropy: np.ndarray, draws: np.random.Generator
) -> dict[str, np.ndarray]:
    """The measures of a layer, [n] each; every fifth neuron has no semantic entropy."""
    n = len(rates)
    semantic = entropy / 3
    semantic[::5] = np.nan
    return {
        "counts": np.round(rates * N_TOKENS).astype(np.int64),
        "firing_rate": rates,
        "token_entropy": entropy,
        "token_entropy_count": entropy + 0.1,
        "semantic_entropy": semantic,
        "mono_score": 1 / (1 + entropy),
        "shuffled_token_entropy": entropy + draws.uniform(1, 2, n),
        "shuffled_token_entropy_count": entropy + draws.uniform(1, 2, n),
        "shuffled_semantic_entropy": semantic + draws.uniform(0.2, 0.4, n),
        "shuffled_mono_score": 0.5 / (1 + entropy),
    }


def write_part(
    folder: Path,
    layers: list[dict[str, np.ndarray]],
    *,
    topk: tuple[int, ...] = (),
    kept: str = "survivors",
    n_tokens: int = N_TOKENS,
) -> None:
    for index, found in enumerate(layers):
        layer = SimpleNamespace(index=index, is_topk=index in topk, kept=kept, n_tokens=n_tokens)
        write_layer(
            folder,
            layer,
            Measured(found, *([[] for _ in found["counts"]] for _ in range(2))),
            "made up",
        )


def write_analysis(
    out: Path, *, lower_by: float = 0.0, n: int = 300, seed: int = 0, twin: bool = True
) -> Path:
    """A model of three layers, two with TopK, that fires half as often as its twin.

    At the same firing rate its entropies are lower by `lower_by` bits.
    """
    draws = np.random.default_rng(seed)

    def made(middle: float, less: float) -> list[dict[str, np.ndarray]]:
        all_rates = [rates_around(middle, n, draws) for _ in range(3)]
        return [arrays(r, entropy_of(r, draws) - less, draws) for r in all_rates]

    write_part(out / "model", made(0.01, lower_by), topk=(0, 1))
    write_part(out / "random", made(0.01, -1.0), topk=(0, 1))
    if twin:
        write_part(out / "twin", made(0.02, 0.0), kept="the 24 largest by magnitude")
    return out
