"""TopKArgs: the published defaults, and one line for whatever is out of range."""

import math

import numpy as np
import pytest
from omegaconf import OmegaConf

from lingua_topk import TopKArgs
from lingua_topk.errors import ConfigError


def test_defaults_are_the_published_ones():
    args = TopKArgs()
    args.validate(n_layers=24)
    assert (args.k, args.n_last_nontopk, args.site, args.activation) == (64, 2, "residual", "relu")
    assert (args.anneal_ratio, args.anneal_schedule, args.layers) == (0.2, "linear", None)


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("k", 0, "give k >= 1"),
        ("k", -1, "give k >= 1"),
        ("k", 1.5, "give an integer >= 1"),
        ("k", None, "give an integer >= 1"),
        ("n_last_nontopk", -1, "give at least 0"),
        ("n_last_nontopk", None, "give at least 0"),
        ("n_last_nontopk", 0.5, "give at least 0"),
        ("site", "attention", "choose one of residual, mlp"),
        ("activation", "tanh", "choose one of relu, identity, gelu, silu"),
        ("anneal_ratio", -0.1, r"[0, 1]"),
        ("anneal_ratio", 1.1, r"[0, 1]"),
        ("anneal_ratio", math.nan, r"[0, 1]"),
        ("anneal_ratio", "0.2", r"[0, 1]"),
        ("anneal_schedule", "cubic", "choose one of linear, cosine, exponential, step"),
        ("annealed", "layers", "choose one of alpha, k"),
        ("layers", [], "list at least one"),
        ("layers", [0, 0], "give different indices"),
        ("layers", [-1], "counted from 0"),
        ("layers", [0.5], "counted from 0"),
        ("layers", ["0"], "counted from 0"),
        ("layers", "0", "give one, as in [0, 3]"),
        ("layers", 3, "give one, as in [0, 3]"),
        ("dead_window", 0, "give at least 1"),
        ("dead_window", None, "give at least 1"),
    ],
)
def test_every_field_is_validated(field, value, allowed):
    with pytest.raises(ConfigError) as error:
        TopKArgs(**{field: value}).validate()
    message = str(error.value)
    shown = value if field == "k" and isinstance(value, int) else repr(value)
    assert message.startswith(f"model.topk.{field}={shown} ") and allowed in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, (0, 1, 2, 3)),
        ({"n_last_nontopk": 0}, (0, 1, 2, 3, 4, 5)),
        ({"n_last_nontopk": 5}, (0,)),
        ({"layers": [5, 0, 3]}, (0, 3, 5)),
        ({"layers": [5], "n_last_nontopk": 6}, (5,)),  # not used with `layers`
    ],
)
def test_which_layers(arguments, expected):
    args = TopKArgs(**arguments)
    args.validate(n_layers=6)
    assert args.topk_layers(6) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_last_nontopk": 6}, "n_last_nontopk=6 leaves no TopK block .* of 6: give at most 5"),
        ({"n_last_nontopk": 9}, "n_last_nontopk=9 leaves no TopK block .* of 6: give at most 5"),
        ({"layers": [0, 6]}, r"layers=\[0, 6\] names a block .* give indices in 0\.\.5"),
    ],
)
def test_layers_that_the_model_does_not_have(arguments, message):
    args = TopKArgs(**arguments)
    args.validate()
    with pytest.raises(ConfigError, match=message):
        args.validate(n_layers=6)
    with pytest.raises(ConfigError, match=message):
        args.topk_layers(6)


def test_edges_and_numbers_of_numpy_are_allowed():
    for ratio in (0, 1, 0.0, 1.0, np.float32(0.5)):
        TopKArgs(anneal_ratio=ratio).validate()
    TopKArgs(k=np.int64(1), n_last_nontopk=0, layers=[np.int64(0)], dead_window=1).validate()
    TopKArgs(layers=(0, 2)).validate(n_layers=3)


def test_omegaconf_reads_it():
    merged = OmegaConf.merge(OmegaConf.structured(TopKArgs), {"layers": [2, 0], "k": "8"})
    args = OmegaConf.to_object(merged)
    assert args == TopKArgs(layers=[2, 0], k=8)
    assert args.topk_layers(3) == (0, 2)
