"""How neurons are measured. Without torch, so that what reads flags starts at once."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """How neurons are measured; all of it stands in the results.

    Attributes:
        threshold: share of a neuron's largest |value| above which it fires on a word.
        min_words: distinct words with a vector that semantic entropy needs.
        max_words: the most of them that are taken, those with the largest |value|.
        contexts: places of text that are kept a neuron; 0 for none.
        context_tokens: tokens around such a place.
        seed: of the shuffled control, and of the random weights.
    """

    threshold: float = 0.5
    min_words: int = 10
    max_words: int = 100
    contexts: int = 8
    context_tokens: int = 32
    seed: int = 0
