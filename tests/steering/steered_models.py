"""The models that are steered in these tests, and their twins of transformers."""

import torch

from apps.topk.model import TopKTransformerArgs
from lingua_topk import TopKArgs
from lingua_topk.hf.convert import to_hf_config, to_hf_weights
from lingua_topk.hf.modeling_topk_lm import TopKLMForCausalLM
from lingua_topk.steering import Ablate, Add, AddDirection, Clamp, Scale, Set
from tests.apps.small_models import small_model

VOCAB = 258
WIDTH = 32
SHAPE = {"dim": WIDTH, "n_layers": 4, "n_heads": 4, "multiple_of": 16, "max_seqlen": 64}
SMALL = {**SHAPE, "n_layers": 2}  # for generating, where every token is a forward pass
SITES = ("residual", "mlp")
MANY = tuple(range(1, 25, 2))  # so that some of them fire


def topk_args(site):
    return TopKArgs(k=6, n_last_nontopk=1, site=site)  # in all layers but the last


def steered_model(site="residual", shape=SHAPE):
    return small_model(topk=topk_args(site), **shape)


def plain_args(site, shape=SHAPE):
    n_layers = shape["n_layers"]
    return {
        "n_layers": n_layers, "n_heads": 4, "theta": 10_000.0, "eps": 1e-5, "k": 6,
        "topk_layers": range(n_layers - 1), "site": site,
    }  # fmt: skip


def exported(model, site="residual", shape=SHAPE):
    """The same model as transformers runs it."""
    args = TopKTransformerArgs(vocab_size=VOCAB, topk=topk_args(site), **shape)
    hidden = model.layers[0].feed_forward.hidden_dim
    config = to_hf_config(args, args.topk, hidden)
    config.dtype = torch.float64
    weights = to_hf_weights(model.state_dict(), config)
    found = TopKLMForCausalLM.from_pretrained(
        None, config=config, state_dict=weights, dtype=torch.float64
    )
    return found.eval()


# How x, [S, D], becomes another, in words of plain torch.
def _set(x, places, neurons, values):
    y = x.clone()
    for neuron, value in zip(neurons, values, strict=True):
        y[places, neuron] = value(x[places, neuron])
    return y


def add(x, places):
    return _set(x, places, (3,), (lambda v: v + 6.0,))


def add_several(x, places):
    return _set(x, places, (3, 5), (lambda v: v + 6.0, lambda v: v - 4.0))


def set_to(x, places):
    return _set(x, places, (3, 5), (lambda v: torch.full_like(v, 8.0),) * 2)


def clamp(x, places):
    def bounded(v):
        return torch.where(v > 0.5, 0.5, torch.where(v < 0.25, 0.25, v))

    return _set(x, places, MANY, (bounded,) * len(MANY))


def scale(x, places):
    return _set(x, places, MANY, (lambda v: v * -3.0,) * len(MANY))


def ablate(x, places):
    return _set(x, places, MANY, (torch.zeros_like,) * len(MANY))


def direction(x, places):
    step = 2.0 * torch.linspace(-1, 1, x.shape[1], dtype=x.dtype)
    return x + places[:, None] * step


# By name: the intervention of a layer of that width, and what it means.
KINDS = {
    "add": (lambda layer, width, **rest: Add(layer, 3, 6.0, **rest), add),
    "add-several": (
        lambda layer, width, **rest: Add(layer, (3, 5), (6.0, -4.0), **rest),
        add_several,
    ),
    "set": (lambda layer, width, **rest: Set(layer, (3, 5), 8.0, **rest), set_to),
    "clamp": (
        lambda layer, width, **rest: Clamp(layer, MANY, minimum=0.25, maximum=0.5, **rest),
        clamp,
    ),
    "scale": (lambda layer, width, **rest: Scale(layer, MANY, -3.0, **rest), scale),
    "ablate": (lambda layer, width, **rest: Ablate(layer, MANY, **rest), ablate),
    "direction": (
        lambda layer, width, **rest: AddDirection(
            layer, torch.linspace(-1, 1, width, dtype=torch.float64), 2.0, **rest
        ),
        direction,
    ),
}
MASK = torch.tensor([False, True, True, False, True, False, False, True, True])
WHERE = {"all": "all", "prompt": "prompt", "generated": "generated", "mask": MASK}


def places_of(where, prompt_length, length):
    """Where it acts in one text: bool [S]."""
    positions = range(length)
    if where == "all":
        return torch.tensor([True for _ in positions])
    if where == "prompt":
        return torch.tensor([p < prompt_length for p in positions])
    if where == "generated":
        return torch.tensor([p >= prompt_length for p in positions])
    return torch.tensor([p < len(MASK) and bool(MASK[p]) for p in positions])
