"""The key `steer` of an evaluation: interventions as a config gives them, and as results tell them.

Everything that can be wrong with them is found before the model is loaded.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from apps.topk import cli
from apps.topk.checkpoint import Checkpoint
from apps.topk.model import TopKTransformer
from apps.topk.neurons.folder import read_analysis
from apps.topk.steering.bench import analysis_folder
from apps.topk.steering.handles import Handles, parse_name, read_handles
from lingua_topk.errors import CheckpointError, ConfigError, DataError, UserError
from lingua_topk.steering import Ablate, Add, Clamp, Scale, Set, in_units_of, steer, steerable
from lingua_topk.steering.interventions import WHERE, Intervention, describe
from lingua_topk.steering.sites import check_layer, check_neuron

logger = logging.getLogger(__name__)

EXAMPLE = """steer='[{neuron: "3:417", delta: 8}]'"""
# By mode: what it is, and the keys of its numbers.
MODES: dict[str, tuple[type[Intervention], tuple[str, ...]]] = {
    "add": (Add, ("delta",)),
    "set": (Set, ("value",)),
    "clamp": (Clamp, ("minimum", "maximum")),
    "scale": (Scale, ("factor",)),
    "ablate": (Ablate, ()),
}
HAVE_UNIT = ("add", "set", "clamp")
ABSOLUTE = "absolute"
UNITS = (ABSOLUTE, "mean", "maximum")
NUMBERS = tuple(name for _, names in MODES.values() for name in names)
KEYS = ("neuron", "mode", *NUMBERS, "unit", "where", "before_selection")


@dataclass(frozen=True)
class Steering:
    """What a model is evaluated under.

    Attributes:
        interventions: each on one neuron, in absolute units, in the order in which they act.
        analysis: the folder that other units are from; None where none was needed.
    """

    interventions: tuple[Intervention, ...]
    analysis: str | None = None

    @property
    def told(self) -> str:
        """For people: `3:417 + 8, 2:5 ablated`."""
        return ", ".join(map(_told, self.interventions))

    def describe(self) -> dict[str, Any]:
        """JSON for the results."""
        return {
            "told": self.told,
            "interventions": [describe(one) for one in self.interventions],
            "analysis": self.analysis,
        }

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Within it the model is steered. ConfigError where it gives no numbers then."""
        try:
            with steer(model, self.interventions):
                yield
        except CheckpointError as error:
            # Its weights are finite: that was checked when they were loaded.
            raise ConfigError(
                f"steer: steered by {self.told} the model gives no usable numbers ({error}): give"
                " numbers of smaller size, or dtype=fp32"
            ) from None


def read_steering(asked: Any, checkpoint: Checkpoint, analysis: str | None = None) -> Steering:
    """The interventions that the key `steer` asks for.

    asked: a list of mappings; see `KEYS`. analysis: a folder of apps.topk.analyze that `unit` is
    taken from, by default that in the checkpoint's run. ConfigError that names the entry and its
    key; DataError for an analysis that is not there, or of another model.
    """
    if not isinstance(asked, list) or not asked:
        raise ConfigError(
            f"steer={_shown(asked)} is no list of interventions: write for example {EXAMPLE}, or"
            " null for the model as it is"
        )
    if checkpoint.model_args.topk is None:
        raise ConfigError(
            f"steer: the model in {checkpoint.folder} has no TopK layer, whose neurons could be"
            " steered: evaluate a TopK model, or leave steer out"
        )
    reader = _Reader(checkpoint, analysis)
    found = tuple(reader.intervention(_Entry(one, f"steer[{i}]")) for i, one in enumerate(asked))
    return Steering(found, reader.analysis)


class _Entry:
    """One mapping of the list, whose mistakes are named by their place."""

    def __init__(self, content: Any, place: str):
        if not isinstance(content, dict):
            raise ConfigError(
                f"{place}={_shown(content)} is no intervention: write for example {EXAMPLE}"
            )
        self.content = content
        self.place = place
        for key in map(str, content):
            if key not in KEYS:
                raise ConfigError(f"{place}.{key} is no known key: {cli.nearest(key, KEYS)}")
        self.mode = self.choice("mode", tuple(MODES))
        self.kind, self.names = MODES[self.mode]
        self._check_fitting()

    def _check_fitting(self) -> None:
        """No key that the mode would leave without effect."""
        has_unit = self.mode in HAVE_UNIT
        takes = [*self.names, *(["unit"] if has_unit else [])]
        for key in (*NUMBERS, "unit"):
            if key in self.content and key not in takes:
                instead = f"give {' or '.join(self.names)}" if self.names else "leave it out"
                raise ConfigError(
                    f"{self.place}.{key} has no meaning with mode={self.mode}: {instead}"
                )

    def choice(self, key: str, allowed: tuple[str, ...]) -> str:
        """One of `allowed`, the first where nobody says."""
        value = self.content.get(key, allowed[0])
        if value not in allowed:
            raise ConfigError(
                f"{self.place}.{key}={_shown(value)} is not known:"
                f" {cli.nearest(str(value), allowed)}"
            )
        return value

    def neuron(self) -> tuple[int, int]:
        """Layer and neuron."""
        value = self.content.get("neuron")
        if not isinstance(value, str):
            # YAML reads 3:17 without quotes as a number, of minutes and seconds.
            given = "is missing" if value is None else f"={_shown(value)} is no text"
            raise ConfigError(
                f"{self.place}.neuron{' ' if value is None else ''}{given}: give LAYER:NEURON in"
                ' quotes, such as "3:417"'
            )
        return parse_name(value, f"{self.place}.neuron")

    def numbers(self) -> dict[str, float]:
        """Those of the mode, by their keys."""
        given = {name: self._number(name) for name in self.names if name in self.content}
        if self.names and not given:
            raise ConfigError(
                f"{self.place}.{self.names[0]} is missing: mode={self.mode} needs"
                f" {' or '.join(self.names)}, a number"
            )
        return given

    def _number(self, key: str) -> float:
        value = self.content[key]
        try:
            number = float(value) if isinstance(value, int | float) else math.nan
        except OverflowError:
            number = math.inf
        if isinstance(value, bool) or not math.isfinite(number):
            raise ConfigError(
                f"{self.place}.{key}={_shown(value)} is not a number: give a finite one, such as 8"
            )
        return number

    def before_selection(self) -> bool:
        value = self.content.get("before_selection", False)
        if not isinstance(value, bool):
            raise ConfigError(
                f"{self.place}.before_selection={_shown(value)} is not known: give true or false"
            )
        return value


class _Reader:
    """Makes interventions of entries, for one model."""

    def __init__(self, checkpoint: Checkpoint, analysis: str | None):
        self.checkpoint = checkpoint
        self.analysis: str | None = None
        self._given = analysis
        self._handles: Handles | None = None
        with torch.device("meta"):
            self._widths = steerable(TopKTransformer(checkpoint.model_args))

    def intervention(self, entry: _Entry) -> Intervention:
        layer, neuron = entry.neuron()
        unit = entry.choice("unit", UNITS)
        where, before = entry.choice("where", WHERE), entry.before_selection()
        numbers = entry.numbers()
        with _named(f"{entry.place}.neuron"):
            check_layer(layer, list(self._widths), self.checkpoint.model_args.n_layers)
            check_neuron(layer, neuron, self._widths[layer])
        with _named(entry.place):
            one = entry.kind(layer, neuron, **numbers, where=where, before_selection=before)
        if unit == ABSOLUTE:
            return one
        with _named(f"{entry.place}.unit={unit}"):
            handles = self._needed_handles()
            handles.named(f"{layer}:{neuron}")
            return in_units_of([one], handles.strengths(unit))[0]

    def _needed_handles(self) -> Handles:
        """The analysis, read once; whether it is of this model."""
        if self._handles is not None:
            return self._handles
        folder = analysis_folder(self.checkpoint, self._given or "")
        if folder is None:
            raise ConfigError(
                f"there is no analysis of {self.checkpoint.folder}: make one with python -m"
                f" apps.topk.analyze --ckpt {self.checkpoint.folder}, give analysis=FOLDER, or"
                " unit: absolute"
            )
        handles = read_handles(folder)
        for layer in handles.layers:
            analysed, here = len(layer.arrays["counts"]), self._widths.get(layer.index)
            if here not in (None, analysed):
                raise DataError(
                    f"analysis={folder} is of another model: its layer {layer.index} has {analysed}"
                    f" neurons, that of the checkpoint {here}: give the one of this model"
                )
        self._warn_of_another_step(folder)
        self._handles, self.analysis = handles, str(folder.resolve())
        return handles

    def _warn_of_another_step(self, folder: Path) -> None:
        step = read_analysis(folder).get("step")
        if step != self.checkpoint.step:
            logger.warning(
                "the analysis in %s is of step %s, the checkpoint of step %s: neurons may have"
                " become stronger or weaker", folder, step, self.checkpoint.step,
            )  # fmt: skip


@contextmanager
def _named(place: str) -> Iterator[None]:
    """A user's mistake within it is told with its place in front."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"{place}: {error}") from None


def _shown(value: Any) -> str:
    return cli.one_line(repr(value))[:60]


def _told(one: Intervention) -> str:
    marks = [] if one.where == "all" else [one.where]
    marks += ["before selection"] if one.before_selection else []
    return f"{one.layer}:{one.neuron} {_turned(one)}" + (f" ({', '.join(marks)})" if marks else "")


def _turned(one: Intervention) -> str:
    match one:
        case Add():
            return f"{'-' if one.delta < 0 else '+'} {abs(one.delta):.6g}"
        case Set():
            return f"= {one.value:.6g}"
        case Scale():
            return f"times {one.factor:.6g}"
        case Clamp():
            ends = {"at least": one.minimum, "at most": one.maximum}
            given = (f"{name} {end:.6g}" for name, end in ends.items() if math.isfinite(end))
            return " and ".join(given)
        case _:
            return "ablated"
