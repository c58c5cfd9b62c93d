"""Turning single neurons of a model while it reads and writes.

    with steer(model, [Add(layer=3, neuron=417, delta=8.0)]):
        model(tokens)

In a TopK model one neuron is one handle: what it stands for can be read from what it fires on,
and adding to it turns the text towards that (arXiv 2506.21468).
"""

from lingua_topk.steering.interventions import (
    Ablate,
    Add,
    AddDirection,
    Clamp,
    Intervention,
    Scale,
    Set,
    in_units_of,
)
from lingua_topk.steering.places import Places, reading
from lingua_topk.steering.sites import steerable
from lingua_topk.steering.steer import steer

__all__ = [
    "Ablate",
    "Add",
    "AddDirection",
    "Clamp",
    "Intervention",
    "Places",
    "Scale",
    "Set",
    "in_units_of",
    "reading",
    "steer",
    "steerable",
]
