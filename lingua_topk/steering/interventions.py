"""What can be done to neurons, as data; `steer` puts it into a model.

An intervention acts on the values x, [B, S, D], of one layer: the output of its TopK, or with
`before_selection` what TopK selects from. It changes the columns of its neurons at the
positions of `where`, and no other bit.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any, ClassVar

import torch
from torch import Tensor

from lingua_topk.errors import ConfigError
from lingua_topk.steering.places import Places

WHERE = ("all", "prompt", "generated")


@dataclass(frozen=True, kw_only=True, eq=False)
class Intervention:
    """What all of them have.

    Attributes:
        where: "all" positions; the hidden states of the tokens of the "prompt", or of those that
            were "generated" (so that the first generated token, which the last one of the prompt
            predicts, is as without); or a bool tensor, [T] for all texts or [B, T], over the
            positions of a text, from 0 at its first token (bos, where there is one). Positions
            beyond T are left alone. What a plain forward pass reads is a prompt.
        before_selection: act on what TopK selects from: the neuron then has to be among the k
            largest. Otherwise on what it gives, where a neuron takes part that was not selected.
    """

    layer: int
    where: str | Tensor = "all"
    before_selection: bool = False

    def __post_init__(self):
        self._become(layer=_index("layer", self.layer))
        _check_where(self.where)
        if not isinstance(self.before_selection, bool):
            raise ConfigError(f"before_selection={self.before_selection!r}: give True or False")

    def _become(self, **fields: Any) -> None:
        """Fields as they were checked: plain numbers and tuples, whatever was given."""
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def applied(self, x: Tensor, places: Places | None) -> Tensor:
        """x, [B, S, D], with the intervention; x itself is not changed."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class _OnNeurons(Intervention):
    """An intervention on one neuron or several, with numbers that are one's or each neuron's own.

    `_units` names the fields that are in units of activation: see `in_units_of`.
    """

    layer: int
    neuron: int | Sequence[int]
    _units: ClassVar[tuple[str, ...]] = ()
    _numbers: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self):
        super().__post_init__()
        self._become(neuron=_neurons(self.neuron))
        for name in self._numbers:
            numbers = _as_numbers(name, getattr(self, name), len(self.neurons))
            self._become(**{name: numbers})

    @property
    def neurons(self) -> tuple[int, ...]:
        """Their indices, also where there is one."""
        return (self.neuron,) if isinstance(self.neuron, int) else self.neuron

    def applied(self, x: Tensor, places: Places | None) -> Tensor:
        index = torch.tensor(self.neurons, device=x.device)
        before = x[..., index]  # [B, S, n]
        after = self._changed(before)
        chosen = chosen_places(self.where, places, x)
        if chosen is not None:
            after = torch.where(chosen[..., None], after, before)
        y = x.clone()
        y[..., index] = after
        return y

    def _changed(self, values: Tensor) -> Tensor:
        """The neurons' values, [B, S, n], as they become."""
        raise NotImplementedError

    def _number(self, name: str, like: Tensor) -> Tensor:
        """A field as [] or [n], in the dtype and on the device of `like`."""
        return torch.as_tensor(getattr(self, name), dtype=like.dtype, device=like.device)


@dataclass(frozen=True, eq=False)
class Add(_OnNeurons):
    """y_n + delta, the paper's. 0 changes nothing, not even the sign of a zero."""

    delta: float | Sequence[float]
    _units = ("delta",)
    _numbers = ("delta",)

    def _changed(self, values: Tensor) -> Tensor:
        delta = self._number("delta", values)
        return torch.where(delta == 0, values, values + delta)


@dataclass(frozen=True, eq=False)
class Set(_OnNeurons):
    """y_n = value."""

    value: float | Sequence[float]
    _units = ("value",)
    _numbers = ("value",)

    def _changed(self, values: Tensor) -> Tensor:
        return self._number("value", values).expand_as(values)


@dataclass(frozen=True, eq=False)
class Clamp(_OnNeurons):
    """y_n, raised to the minimum and lowered to the maximum. NaN stays NaN."""

    minimum: float | Sequence[float] = -math.inf
    maximum: float | Sequence[float] = math.inf
    _units = ("minimum", "maximum")
    _numbers = ("minimum", "maximum")

    def __post_init__(self):
        super().__post_init__()
        lows, highs = torch.broadcast_tensors(
            *(torch.as_tensor(one, dtype=torch.float64) for one in (self.minimum, self.maximum))
        )
        if (lows > highs).any():
            raise ConfigError(
                f"minimum={self.minimum} is above maximum={self.maximum}: give at most as much"
            )

    def _changed(self, values: Tensor) -> Tensor:
        return values.clamp(self._number("minimum", values), self._number("maximum", values))


@dataclass(frozen=True, eq=False)
class Scale(_OnNeurons):
    """y_n * factor; 1 changes nothing."""

    factor: float | Sequence[float]
    _numbers = ("factor",)

    def _changed(self, values: Tensor) -> Tensor:
        return values * self._number("factor", values)


@dataclass(frozen=True, eq=False)
class Ablate(_OnNeurons):
    """y_n = 0."""

    def _changed(self, values: Tensor) -> Tensor:
        return torch.zeros_like(values)


@dataclass(frozen=True, eq=False)
class AddDirection(Intervention):
    """y + delta * direction, [D]: what is done to models without neurons that can be read."""

    layer: int
    direction: Tensor
    delta: float

    def __post_init__(self):
        super().__post_init__()
        self._become(delta=_number("delta", self.delta))
        if not isinstance(self.direction, Tensor):
            raise ConfigError(f"direction is a {type(self.direction).__name__}: give a tensor, [D]")
        if self.direction.dim() != 1 or not self.direction.isfinite().all():
            raise ConfigError(
                f"direction has the shape {list(self.direction.shape)}: give finite numbers, [D]"
            )

    def applied(self, x: Tensor, places: Places | None) -> Tensor:
        if self.delta == 0:
            return x
        y = x + self.delta * self.direction.to(x)
        chosen = chosen_places(self.where, places, x)
        return y if chosen is None else torch.where(chosen[..., None], y, x)


def in_units_of(
    interventions: Iterable[Intervention], strengths: Mapping[int, Sequence[float] | Any]
) -> list[Intervention]:
    """Interventions whose deltas, values and bounds are multiples of their neurons' strengths.

    Args:
        interventions: those of a factor, of nothing or of a direction stay as they are.
        strengths: by layer, [D]: what 1 is of each neuron, such as its mean or its maximum where
            it is active.

    ConfigError for a neuron that has no such strength: one that never fires.
    """
    return [_in_units(one, strengths) for one in interventions]


def _in_units(one: Intervention, strengths: Mapping[int, Any]) -> Intervention:
    units = getattr(one, "_units", ())
    if not units:
        return one
    here = strengths.get(one.layer, ())
    for neuron in one.neurons:
        if neuron >= len(here) or not 0 < float(here[neuron]) < math.inf:
            raise ConfigError(
                f"neuron {one.layer}:{neuron} was not seen to fire, so nothing is a multiple of its"
                " strength: give an absolute number, or another neuron"
            )
    own = [float(here[neuron]) for neuron in one.neurons]
    return replace(one, **{name: _multiplied(getattr(one, name), own) for name in units})


def _multiplied(numbers: float | Sequence[float], own: list[float]) -> float | tuple[float, ...]:
    listed = [numbers] * len(own) if isinstance(numbers, Real) else numbers
    products = tuple(number * strength for number, strength in zip(listed, own, strict=True))
    return products[0] if len(products) == 1 else products


def chosen_places(where: str | Tensor, places: Places | None, x: Tensor) -> Tensor | None:
    """At which places of x, [B, S, D], something acts: bool [B, S]; None for all."""
    if isinstance(where, str) and where == "all":
        return None
    if places is None or places.positions.shape != x.shape[:2]:
        raise ConfigError(
            f"where={_named(where)} needs to know where the tokens stand, and this forward pass"
            " does not tell: call the model itself, or its blocks within reading(Places(...))"
        )
    positions = places.positions.to(x.device)  # [B, S]
    if isinstance(where, Tensor):
        return _looked_up(where.to(x.device), positions, places.texts)
    if places.prompt_lengths is None:
        is_prompt = torch.ones_like(positions, dtype=torch.bool)
    else:
        is_prompt = positions < places.prompt_lengths.to(x.device)[:, None]
    return (is_prompt if where == "prompt" else ~is_prompt) & (positions >= 0)


def _looked_up(mask: Tensor, positions: Tensor, texts: Tensor | None) -> Tensor:
    """A mask over positions, [T] or [B, T], at `positions` [B, S]: bool [B, S]."""
    length = mask.shape[-1]
    is_inside = (positions >= 0) & (positions < length)
    where = positions.clamp(0, max(length - 1, 0))
    if not length:
        return is_inside
    if mask.dim() == 1:
        return mask[where] & is_inside
    rows = torch.arange(len(positions)) if texts is None else texts
    rows = rows.to(positions.device)[:, None]  # [B, 1]
    if int(rows.max()) >= len(mask):
        raise ConfigError(
            f"where has {len(mask)} rows, and text {int(rows.max())} is being read: give a row for"
            " each text, or one mask [T] for all"
        )
    return mask[rows, where] & is_inside


def _named(where: str | Tensor) -> str:
    return repr(where) if isinstance(where, str) else f"a mask of shape {list(where.shape)}"


def _check_where(where: Any) -> None:
    if isinstance(where, Tensor):
        if where.dtype != torch.bool or where.dim() not in (1, 2):
            raise ConfigError(
                f"where is a tensor of {where.dtype} and shape {list(where.shape)}: give bool, [T]"
                " or [B, T]"
            )
    elif not isinstance(where, str) or where not in WHERE:
        raise ConfigError(
            f"where={where!r} is not known: choose one of {', '.join(WHERE)}, or give a bool tensor"
        )


def _index(name: str, index: Any) -> int:
    if not isinstance(index, Integral) or isinstance(index, bool) or index < 0:
        raise ConfigError(f"{name}={index!r} is not allowed: give a number from 0")
    return int(index)


def _neurons(neuron: Any) -> int | tuple[int, ...]:
    if isinstance(neuron, Integral):
        return _index("neuron", neuron)
    if isinstance(neuron, str | bytes) or not isinstance(neuron, Sequence) or not neuron:
        raise ConfigError(f"neuron={neuron!r} is not allowed: give a number, or several")
    listed = tuple(_index("neuron", one) for one in neuron)
    if len(set(listed)) < len(listed):
        raise ConfigError(f"neuron={neuron!r} names one twice: name each once")
    return listed


def _as_numbers(name: str, numbers: Any, n_neurons: int) -> float | tuple[float, ...]:
    """A number, or one a neuron; infinite ones where they bound something."""
    if isinstance(numbers, str | bytes) or not isinstance(numbers, Sequence):
        return _number(name, numbers)
    listed = tuple(_number(name, one) for one in numbers)
    if len(listed) != n_neurons:
        raise ConfigError(
            f"{name} has {len(listed)} numbers for {n_neurons} neurons: give one, or one each"
        )
    return listed


def _number(name: str, number: Any) -> float:
    is_number = isinstance(number, Real) and not isinstance(number, bool)
    try:
        value = float(number) if is_number else math.nan
    except OverflowError:  # a whole number beyond all floats
        value = math.inf
    is_bound = name in ("minimum", "maximum")
    if math.isnan(value) or (math.isinf(value) and not is_bound):
        raise ConfigError(f"{name}={number!r} is not a number: give a finite one")
    return value


def describe(one: Intervention) -> dict[str, Any]:
    """An intervention as JSON; a mask and a direction by their shape."""
    content: dict[str, Any] = {"kind": type(one).__name__}
    for field in fields(one):
        value = getattr(one, field.name)
        if isinstance(value, Tensor):
            value = f"tensor {list(value.shape)}"
        if value in (-math.inf, math.inf):
            continue
        content[field.name] = _listed(value) if isinstance(value, tuple) else value
    return content


def _listed(numbers: tuple) -> list:
    """Null for what bounds nothing: JSON has no infinity."""
    return [None if math.isinf(one) else one for one in numbers]
