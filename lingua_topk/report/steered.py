"""Steering as the page's chunk of that name holds it, for scripts/steering.js."""

from typing import Any

from lingua_topk.report.chunks import known
from lingua_topk.report.data import SteeredConcept, SteeredExample, SteeredNumbers, Steering


def steering_values(steering: Steering) -> dict[str, Any]:
    """JSON; None for numbers that were not measured."""
    return {
        "sentences": list(steering.sentences),
        "methods": vars(steering.methods),
        "concepts": [_concept(one) for one in steering.concepts],
        "examples": [_example(one) for one in steering.examples],
    }


def _concept(one: SteeredConcept) -> dict[str, Any]:
    return {
        "name": f"{one.layer}:{one.neuron}",
        "words": list(one.words),
        "heldOut": list(one.held_out_words),
        "delta": known(one.delta),
        "absolute": known(one.absolute),
        "numbers": _numbers(one.numbers),
    }


def _example(one: SteeredExample) -> dict[str, Any]:
    return {
        "concept": one.concept,
        "method": one.method,
        "delta": known(one.delta),
        "absolute": known(one.absolute),
        "isChosen": one.is_chosen,
        "prompt": one.prompt,
        "unsteered": one.unsteered,
        "steered": one.steered,
        "numbers": _numbers(one.numbers),
    }


def _numbers(one: SteeredNumbers | None) -> dict[str, Any] | None:
    if one is None:
        return None
    return {
        "rate": known(one.concept_rate),
        "unsteeredRate": known(one.unsteered_rate),
        "lift": known(one.lift),
        "ratio": known(one.perplexity_ratio),
        "score": known(one.score),
    }
