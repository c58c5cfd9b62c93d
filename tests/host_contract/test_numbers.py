"""The embedded host computes what Meta Lingua computes: gradients, training, initial weights.

Both have the same weights, drawn by numpy and loaded by key, and run in a process of their own.
What Lingua does beyond the calls of `compute_numbers.py` is unchanged, `.float()` of a float64
tensor excepted (see there). A difference is relative to the largest magnitude in its tensor, or
in its column of steps, unless said otherwise.
"""

import os
import zlib
from itertools import product

import numpy as np
import pytest
import torch

from apps.topk.model import TopKTrainArgs, TopKTransformer
from lingua.args import dataclass_from_dict
from lingua.transformer import InitStdFactor
from tests.host_contract.on_host import run_on_host

pytestmark = pytest.mark.skipif(
    not os.environ.get("LINGUA_HOME"), reason="LINGUA_HOME names no checkout of Meta Lingua"
)

FLOAT64, FLOAT32 = 1e-8, 1e-5
B, S, STEPS, VOCAB = 3, 20, 20, 47
MODEL = {
    "dim": 32,
    "n_layers": 3,
    "n_heads": 4,
    "multiple_of": 16,
    "max_seqlen": 24,
    "vocab_size": VOCAB,
}
# Neither host scales RoPE otherwise than by theta; a window acts in xformers' attention only.
MODELS = {
    "plain": {},
    "grouped": {"n_kv_heads": 2},
    "tied": {"weight_tying": True},
    "one-key-tied": {"n_kv_heads": 1, "weight_tying": True, "rope_theta": 500000.0},
    "wide-heads": {"head_dim": 12, "n_kv_heads": 2, "ffn_dim_multiplier": 1.3, "norm_eps": 1e-3},
    "narrow-heads": {"n_heads": None, "head_dim": 4, "rope_theta": 100.0},
    "packed": {"n_kv_heads": 2},
}
# Dead here is what did not fire in the last batch, so that there are some.
TOPK = {"k": 4, "n_last_nontopk": 1, "anneal_ratio": 0.5, "dead_window": 1}
VARIANTS = {  # dtype, alpha, the section model.topk
    "twin": ("float64", None, None),
    "twin-float32": ("float32", None, None),
    "topk": ("float64", 0.0, TOPK),
    "annealed": ("float64", 0.3, TOPK),
    "mlp": ("float64", 0.3, {**TOPK, "site": "mlp", "activation": "silu"}),
}
OUTPUTS = list(product(MODELS, VARIANTS))
TRAINED = {  # model, the section model.topk, the section optim
    "topk": ({"n_kv_heads": 2}, TOPK, {"scheduler": "cosine"}),
    "topk-tied": (
        {"weight_tying": True},
        {**TOPK, "anneal_schedule": "cosine"},
        {"scheduler": "linear"},
    ),
    "mlp": (
        {},
        {**TOPK, "site": "mlp", "anneal_schedule": "exponential"},
        {"scheduler": "wsd", "decay_fraction": 0.4},
    ),
    "twin": ({"n_kv_heads": 2}, None, {"scheduler": "inv_sqrt"}),
    "twin-tied": ({"weight_tying": True}, None, {"scheduler": "constant"}),
}
INITIAL = {  # fields of the section model
    f"{factor.value} {base_std} {n_layers}": {
        "init_std_factor": factor.value,
        "init_base_std": base_std,
        "n_layers": n_layers,
        "n_kv_heads": 2,
        "weight_tying": n_layers == 4,
    }
    for factor, base_std, n_layers in product(InitStdFactor, (None, 0.05), (1, 4))
}


def random(*words):
    """A generator of its own for what the words name."""
    return np.random.default_rng(zlib.crc32(" ".join(words).encode()))


def section(fields, topk):
    """The section `model`."""
    return {**MODEL, **fields, "topk": topk}


def weights_for(config, dtype):
    """A state dict: matrices with the spread of their width, norms around one; tied ones once."""
    model = TopKTransformer(dataclass_from_dict(TopKTrainArgs, config).model).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = random("weights", name).standard_normal(tuple(parameter.shape))
            scale = 0.2 if drawn.ndim == 1 else drawn.shape[-1] ** -0.5
            parameter.copy_(torch.from_numpy(scale * drawn + (drawn.ndim == 1)))
    return {name: w.to(getattr(torch, dtype)) for name, w in model.state_dict().items()}


def inputs_for(model):
    """Keywords of the model's forward; for "packed" two documents a row, side by side.

    Positions of the second are two apart: what counts is how far apart they are, so that
    positions from the first document on would do as well as its own.
    """
    tokens = random("tokens").integers(VOCAB, size=(2, B, S))
    tokens[1, :, 3] = -100  # these targets do not count
    given = {"token_values": torch.from_numpy(tokens[0]), "target": torch.from_numpy(tokens[1])}
    if model == "packed":
        place = torch.arange(S)
        document = place >= 8  # [S]
        together = document[:, None] == document[None, :]  # [S, S]
        given["mask"] = together & torch.ones(S, S).tril().bool()
        given["tok_idx"] = torch.where(document, 2 * (place - 8), place)
    return given


def output_job(model, variant):
    dtype, alpha, topk = VARIANTS[variant]
    config = {"model": section(MODELS[model], topk)}
    return {
        "kind": "outputs",
        "config": config,
        "dtype": dtype,
        "alpha": alpha,
        "weights": weights_for(config, dtype),
        "inputs": inputs_for(model),
    }


def training_job(fields, topk, optim):
    """A run that learns to go on in a few fixed sentences, fast enough to get far in its steps."""
    optim = {"lr": 1e-2, "warmup": 4, "clip": 1.0, "lr_min_ratio": 0.05, **optim}
    config = {"model": section(fields, topk), "optim": optim, "steps": STEPS}
    sentences = random("sentences").integers(VOCAB, size=(8, S + 1))
    rows = random("rows").integers(8, size=(STEPS, B))
    batches = np.stack((sentences[rows, :-1], sentences[rows, 1:]), axis=-1)  # [T, B, S, 2]
    return {
        "kind": "training",
        "config": config,
        "dtype": "float64",
        "weights": weights_for(config, "float64"),
        "batches": torch.from_numpy(batches),
    }


def initial_job(fields):
    topk = {**TOPK, "layers": [0]}
    return {"kind": "initial weights", "config": {"model": section(fields, topk)}}


def jobs():
    return {
        **{f"output {m} {v}": output_job(m, v) for m, v in OUTPUTS},
        **{f"trained {name}": training_job(*case) for name, case in TRAINED.items()},
        **{f"initial {name}": initial_job(fields) for name, fields in INITIAL.items()},
    }


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    """{job: {quantity: tensor}} of Lingua, and of the embedded host."""
    folder = tmp_path_factory.mktemp("numbers")
    torch.save(jobs(), folder / "jobs.pt")
    for host in ("lingua", "embedded"):
        run_on_host(host, "compute_numbers.py", folder / "jobs.pt", folder / f"{host}.pt")
    return [torch.load(folder / f"{h}.pt", weights_only=True) for h in ("lingua", "embedded")]


def difference(found, expected):
    """The largest, relative to the largest magnitude of `expected`, which is not zero."""
    assert found.dtype == expected.dtype and found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def too_far_apart(numbers, job, tolerance):
    """{quantity: difference} of those of a job that differ by more; NaN included."""
    theirs, ours = (host[job] for host in numbers)
    assert theirs.keys() == ours.keys()
    differences = {name: difference(ours[name], theirs[name]) for name in theirs}
    return {name: d for name, d in differences.items() if not d <= tolerance}


@pytest.mark.parametrize(("model", "variant"), OUTPUTS)
def test_logits_and_gradients_are_those_of_lingua(numbers, model, variant):
    dtype = VARIANTS[variant][0]
    theirs = numbers[0][f"output {model} {variant}"]
    assert theirs["logits"].dtype == getattr(torch, dtype)
    assert len([quantity for quantity in theirs if quantity.startswith("gradient of ")]) >= 29
    tolerance = FLOAT64 if dtype == "float64" else FLOAT32
    assert not too_far_apart(numbers, f"output {model} {variant}", tolerance)


@pytest.mark.parametrize("name", TRAINED)
def test_twenty_steps_are_those_of_lingua(numbers, name):
    """Loss, gradient norm, learning rate, alpha, survivors and dead neurons; the final weights."""
    theirs, ours = (host[f"trained {name}"] for host in numbers)
    assert theirs["loss"].shape == (STEPS,) and theirs["loss"].dtype == torch.float64
    assert theirs["loss"][-1] < theirs["loss"][0] - 0.5, "it learned next to nothing"
    assert len([quantity for quantity in theirs if quantity.startswith("final ")]) >= 29
    assert (ours["loss"] - theirs["loss"]).abs().max() <= FLOAT64  # absolute
    assert not too_far_apart(numbers, f"trained {name}", FLOAT64)


@pytest.mark.parametrize("name", [name for name, (_, topk, _) in TRAINED.items() if topk])
def test_alpha_falls_alike_on_both_hosts(numbers, name):
    theirs, ours = (host[f"trained {name}"]["alpha"] for host in numbers)
    assert torch.equal(ours, theirs)
    assert theirs[0] == 1 and theirs[STEPS // 2 - 1] > 0 and (theirs[STEPS // 2 :] == 0).all()
    assert (theirs.diff()[: STEPS // 2] < 0).all()


@pytest.mark.parametrize("name", INITIAL)
def test_initial_weights_are_to_the_last_bit_those_of_lingua(numbers, name):
    """And with them mean, spread, least and largest, which a failure shows."""
    theirs, ours = (host[f"initial {name}"] for host in numbers)
    assert theirs.keys() == ours.keys() and len(theirs) >= 12
    unlike = {name for name in theirs if not torch.equal(ours[name], theirs[name])}
    assert not {name: (statistics(ours[name]), statistics(theirs[name])) for name in unlike}


def statistics(tensor):
    return tensor.mean().item(), tensor.std().item(), tensor.min().item(), tensor.max().item()
