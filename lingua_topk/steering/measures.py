"""What steering gains and what it costs, of texts and of counts."""

from collections.abc import Hashable, Sequence

from lingua_topk.errors import ConfigError


def lift(steered: tuple[int, int], unsteered: tuple[int, int]) -> float:
    """How many times more often something occurs: the ratio of two rates.

    Each is a count and of how many. The ratio is (hits + 1/2) / (expected + 1/2), expected being
    the hits of as many tokens without steering: 1 where neither has any, whatever the totals.
    """
    (hits, total), (hits_before, total_before) = steered, unsteered
    expected = hits_before * total / total_before if total_before else 0.0
    return (hits + 0.5) / (expected + 0.5)


def distinct(tokens: Sequence[Hashable], n: int) -> float:
    """The share of a text's n-grams that are different ones (Li et al., arXiv 1510.03055).

    In (0, 1]; 1 for a text of fewer than two n-grams. ConfigError for n below 1.
    """
    if n < 1:
        raise ConfigError(f"n={n} is not allowed: give at least 1")
    n_grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(n_grams)) / len(n_grams) if n_grams else 1.0


def steering_score(lift: float, perplexity_ratio: float, variety_ratio: float) -> float:
    """One number in [0, 1) for concept, fluency and variety: their harmonic mean, 0 if one is 0.

    The concept's part is 1 - 1 / lift, the share of its words that are there because of the
    steering, 0 for a lift of at most 1. Fluency is 1 / perplexity_ratio and variety the ratio of
    distinct-2, both at most 1. Ratios are of steered text to unsteered text. That a text needs all
    three at once is the harmonic mean's point (as in AxBench, arXiv 2501.17148).
    """
    parts = (
        1 - 1 / lift if lift > 1 else 0.0,
        min(1 / perplexity_ratio, 1.0) if perplexity_ratio > 0 else 0.0,
        min(max(variety_ratio, 0.0), 1.0),
    )
    # A ratio that is infinite, or NaN, is no fluency.
    if not all(part > 0 for part in parts):
        return 0.0
    return len(parts) / sum(1 / part for part in parts)
