"""What the program takes on its command line, read and checked."""

import math
from collections.abc import Sequence

from apps.topk.checkpoint import DTYPES
from apps.topk.cli import nearest
from apps.topk.neurons.arguments import listed
from apps.topk.steering.turning import (
    ABLATE,
    ABSOLUTE,
    ADD,
    DEFAULTS,
    MAXIMUM,
    MODES,
    SCALE,
    UNITS,
    Turning,
)
from lingua_topk.errors import ConfigError
from lingua_topk.steering.interventions import WHERE


def turning_of(
    delta: str, unit: str, mode: str, where: str, before_selection: bool, suppress: bool
) -> Turning:
    """How neurons are turned; "" for a delta and a unit that are not given.

    ConfigError for a value that is not allowed, and for flags that contradict one another.
    """
    one_of("mode", mode, MODES)
    one_of("where", where, WHERE)
    if unit:
        one_of("unit", unit, UNITS)
    if suppress and mode != ADD:
        raise ConfigError(
            f"mode={mode!r} with --suppress, which subtracts the deltas: leave one of them out"
        )
    if mode == ABLATE and (delta or unit):
        raise ConfigError("mode='ablate' sets neurons to 0: leave --delta and --unit out")
    if mode == SCALE and unit:
        raise ConfigError(
            f"unit={unit!r} with mode='scale', whose deltas are factors: leave --unit out"
        )
    if unit == ABSOLUTE and not delta:
        raise ConfigError("unit='absolute' needs numbers: give --delta, such as --delta 4,8,16")
    deltas = numbers(delta) if delta else DEFAULTS[mode]
    default_unit = ABSOLUTE if delta or mode in (SCALE, ABLATE) else MAXIMUM
    how = Turning(mode, deltas, unit or default_unit, where, before_selection, suppress)
    check_turning(how)
    return how


def check_turning(how: Turning) -> None:
    """ConfigError for deltas that make no sense in the mode."""
    wrong = [delta for delta in how.deltas if how.suppress and delta < 0]
    if wrong:
        raise ConfigError(
            f"delta={wrong[0]:g} with --suppress, which subtracts it: give numbers from 0"
        )


def numbers(text: str, field: str = "delta") -> tuple[float, ...]:
    """The numbers in a text with commas, each once. ConfigError for one that is none."""
    found = []
    for name in listed(text):
        try:
            number = float(name)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise ConfigError(
                f"{field}={name!r} is not a number: give finite ones with commas, such as 4,8,16"
            )
        found.append(number)
    if not found:
        raise ConfigError(f"{field}={text!r} has no number: give some with commas, such as 4,8,16")
    return tuple(dict.fromkeys(found))


def one_of(field: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise ConfigError(f"{field}={name!r} is not known: {nearest(name, known)}")


def check_combination(
    neuron: str, concept: str, n: int, is_list: bool, interactive: bool, json: str, prompts: int
) -> None:
    """ConfigError for flags that contradict one another. prompts: how many are given."""
    if neuron and concept:
        raise ConfigError(
            f"neuron={neuron!r} and concept={concept!r} both name what is turned: give one"
        )
    if n < 0:
        raise ConfigError(f"n={n} is not allowed: give at least 1")
    if n and neuron:
        raise ConfigError(f"n={n} is of --concept, and the neurons are named: leave one out")
    if is_list and (neuron or interactive or prompts):
        raise ConfigError(
            "--list shows neurons and writes no text: leave --neuron, --prompt, --prompts and"
            " --interactive out"
        )
    if interactive and json:
        raise ConfigError(f"json={json!r} with --interactive: leave one of them out")
    if interactive and prompts > 1:
        raise ConfigError("--interactive begins with one prompt: give --prompt once")


def check_generation(dtype: str, batch_tokens: int) -> None:
    """ConfigError for what texts cannot be made with."""
    if batch_tokens < 1:
        raise ConfigError(f"batch_tokens={batch_tokens} is not allowed: give at least 1")
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} is not known: choose one of {', '.join(DTYPES)}")
