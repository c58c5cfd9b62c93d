"""What is done to neurons, as a command line says it: a mode, and numbers in a unit."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from apps.topk.steering.handles import Handle
from lingua_topk.errors import ConfigError
from lingua_topk.steering import Ablate, Add, Clamp, Intervention, Scale, Set

ADD, SET, CLAMP, SCALE, ABLATE = MODES = ("add", "set", "clamp", "scale", "ablate")
ABSOLUTE, MEAN, MAXIMUM = UNITS = ("absolute", "mean", "maximum")
# Where nobody says: multiples of the maximum, factors for `scale`.
DEFAULTS = {ADD: (1, 2, 4), SET: (1, 2, 4), CLAMP: (0.5, 0.25, 0), SCALE: (2, 4, 8), ABLATE: ()}


@dataclass(frozen=True)
class Turning:
    """How neurons are turned; `variants` makes interventions of it.

    Attributes:
        mode: one of MODES; with `clamp` the deltas are what the neurons are lowered to.
        deltas: one text each, in the unit.
        unit: of the deltas, one of UNITS; `mean` and `maximum` are each neuron's own. Factors
            (`scale`) have none.
        where, before_selection: as of an Intervention.
        suppress: the neurons are ablated, and the deltas subtracted.
    """

    mode: str
    deltas: tuple[float, ...]
    unit: str
    where: str
    before_selection: bool
    suppress: bool


@dataclass(frozen=True)
class Variant:
    """One of the ways in which a prompt is continued, next to the unsteered one.

    Attributes:
        mode: one of MODES.
        delta: in the unit that was asked for, negative where it is subtracted; None for ablate.
        absolute: the same for each neuron in units of activation; () where there is none.
        interventions: for `steer`.
    """

    mode: str
    delta: float | None
    absolute: tuple[float, ...]
    interventions: tuple[Intervention, ...]


def unknown(layer: int, neuron: int) -> Handle:
    """A neuron of which there is no analysis: no words, and NaN for all numbers."""
    return Handle(layer, neuron, (), math.nan, math.nan, math.nan, math.nan)


def is_known(neuron: Handle) -> bool:
    """Whether there is an analysis of it."""
    return not math.isnan(neuron.maximum)


def variants(turning: Turning, neurons: Sequence[Handle]) -> list[Variant]:
    """What the neurons are turned by, one after another; they are turned together.

    ConfigError where a unit is not known of a neuron, or it never fires.
    """
    if turning.suppress:
        less = replace(turning, deltas=tuple(-delta for delta in turning.deltas), suppress=False)
        return [_variant(replace(turning, mode=ABLATE), None, neurons), *variants(less, neurons)]
    if turning.mode == ABLATE:
        return [_variant(turning, None, neurons)]
    return [_variant(turning, delta, neurons) for delta in turning.deltas]


def _variant(turning: Turning, delta: float | None, neurons: Sequence[Handle]) -> Variant:
    has_unit = turning.mode in (ADD, SET, CLAMP)
    absolute = tuple(delta * _strength(one, turning.unit) for one in neurons) if has_unit else ()
    layers = dict.fromkeys(one.layer for one in neurons)
    made = []
    for layer in layers:
        here = [i for i, one in enumerate(neurons) if one.layer == layer]
        indices = tuple(neurons[i].neuron for i in here)
        numbers = tuple(absolute[i] for i in here) if has_unit else delta
        made.append(_intervention(turning, layer, indices, numbers))
    return Variant(turning.mode, delta, absolute, tuple(made))


def _intervention(
    turning: Turning, layer: int, neurons: tuple[int, ...], numbers: tuple[float, ...] | float
) -> Intervention:
    common = {"where": turning.where, "before_selection": turning.before_selection}
    if turning.mode == ABLATE:
        return Ablate(layer, neurons, **common)
    kind, name = {
        ADD: (Add, "delta"), SET: (Set, "value"), CLAMP: (Clamp, "maximum"),
        SCALE: (Scale, "factor"),
    }[turning.mode]  # fmt: skip
    return kind(layer, neurons, **{name: numbers}, **common)


def _strength(neuron: Handle, unit: str) -> float:
    """How much 1 of the unit is, in units of activation."""
    if unit == ABSOLUTE:
        return 1.0
    if not is_known(neuron):
        raise ConfigError(
            f"unit={unit!r} needs an analysis of neuron {neuron.name}: make one with python -m"
            " apps.topk.analyze --ckpt CKPT, or give --delta with --unit absolute"
        )
    strength = getattr(neuron, unit)
    if not strength > 0:
        raise ConfigError(
            f"unit={unit!r}: neuron {neuron.name} never fires in the analysis, so nothing is a"
            " multiple of its strength: give --delta with --unit absolute, or another neuron"
        )
    return strength
