"""apps.main.transformer: the language model against a Llama written here, and its plans."""

import math
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask

from apps.main.transformer import (
    LMTransformer,
    LMTransformerArgs,
    attention_flops_per_token,
    build_fsdp_grouping_plan,
    create_causal_mask,
    get_no_recompute_ops,
    get_num_flop_per_token,
    tp_parallelize,
)
from lingua.distributed import DistributedArgs, get_module
from lingua.errors import ConfigError
from lingua.metrics import get_num_params
from lingua.transformer import causal_mask, generate_doc_mask_mod, lengths_to_local_ids

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without")


def small_args(**values) -> LMTransformerArgs:
    settings = {"dim": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 19, "multiple_of": 8}
    return LMTransformerArgs(**{**settings, "max_seqlen": 64, **values})


def small_model(**values) -> LMTransformer:
    torch.manual_seed(0)
    model = LMTransformer(small_args(**values)).double()
    model.init_weights()
    return model


def tokens(batch: int = 2, length: int = 12) -> Tensor:
    return torch.randint(19, (batch, length), generator=torch.Generator().manual_seed(1))


def llama(weights: dict[str, Tensor], ids: Tensor, args: LMTransformerArgs, window: int) -> Tensor:
    """Logits [B, S, V] by plain matrix products, a sequence and a head at a time."""
    head_dim = args.head_dim or args.dim // args.n_heads
    group = args.n_heads // (args.n_kv_heads or args.n_heads)
    positions = torch.arange(ids.shape[1])
    distance = positions[:, None] - positions[None, :]
    unseen = (distance < 0) | (distance >= window)
    pairs = torch.arange(0, head_dim, 2).float() / head_dim
    angles = torch.outer(positions.float(), 1 / args.rope_theta**pairs)
    turn = torch.complex(angles.cos().double(), angles.sin().double())  # [S, E / 2]

    def norm(x, name):
        return x / (x.square().mean(1, keepdim=True) + args.norm_eps).sqrt() * weights[name]

    def rotate(x):
        return torch.view_as_real(torch.view_as_complex(x.reshape(len(x), -1, 2)) * turn).flatten(1)

    def one_sequence(row):
        x = weights["tok_embeddings.weight"][row]  # [S, D]
        for i in range(args.n_layers):
            at, ff = f"layers.{i}.attention", f"layers.{i}.feed_forward"
            y = norm(x, f"layers.{i}.attention_norm.weight")
            q, k, v = (y @ weights[f"{at}.{name}.weight"].T for name in ("wq", "wk", "wv"))
            heads = []
            for h in range(args.n_heads):
                own, shared = (slice(n * head_dim, (n + 1) * head_dim) for n in (h, h // group))
                scores = rotate(q[:, own]) @ rotate(k[:, shared]).T / math.sqrt(head_dim)
                heads.append(scores.masked_fill(unseen, -math.inf).softmax(1) @ v[:, shared])
            x = x + torch.cat(heads, 1) @ weights[f"{at}.wo.weight"].T
            y = norm(x, f"layers.{i}.ffn_norm.weight")
            gate = y @ weights[f"{ff}.w1.weight"].T
            up = y @ weights[f"{ff}.w3.weight"].T
            x = x + (gate * gate.sigmoid() * up) @ weights[f"{ff}.w2.weight"].T
        name = "output.tied_module.weight" if args.weight_tying else "output.weight"
        return norm(x, "norm.weight") @ weights[name].T

    return torch.stack([one_sequence(row) for row in ids])


VARIANTS = {
    "plain": {},
    "grouped": {"n_kv_heads": 2, "rope_theta": 500.0},
    "wide-heads": {"head_dim": 12, "n_kv_heads": 1, "ffn_dim_multiplier": 1.3},
    "tied": {"weight_tying": True, "norm_eps": 0.1},
    "window": {"sliding_window": 3},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_gradients_are_those_of_a_llama(variant):
    model = small_model(**VARIANTS[variant])
    weights = {name: x.detach().clone() for name, x in model.state_dict().items()}
    if model.weight_tying:
        weights["output.tied_module.weight"] = weights["tok_embeddings.weight"]
    own = {name: weights[name].requires_grad_() for name, _ in model.named_parameters()}
    expected = llama(weights, tokens(), small_args(**VARIANTS[variant]), model.sliding_window or 99)
    logits = model(tokens())
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)

    target = tokens().roll(-1, dims=1)
    loss = model(tokens(), target)
    expected_loss = -expected.log_softmax(-1).gather(-1, target[..., None]).mean()
    torch.testing.assert_close(loss, expected_loss, rtol=0, atol=1e-10)
    loss.backward()
    expected_loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, own[name].grad, rtol=0, atol=1e-10)


def test_names_and_shapes_of_the_state_dict():
    model = small_model(n_kv_heads=2, head_dim=10)
    shapes = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    hidden = model.layers[0].feed_forward.hidden_dim
    block = {
        "attention.wq.weight": (40, 32),
        "attention.wk.weight": (20, 32),
        "attention.wv.weight": (20, 32),
        "attention.wo.weight": (32, 40),
        "feed_forward.w1.weight": (hidden, 32),
        "feed_forward.w3.weight": (hidden, 32),
        "feed_forward.w2.weight": (32, hidden),
        "attention_norm.weight": (32,),
        "ffn_norm.weight": (32,),
    }
    assert shapes == {
        **{f"layers.{i}.{name}": shape for i in range(2) for name, shape in block.items()},
        "tok_embeddings.weight": (19, 32),
        "norm.weight": (32,),
        "output.weight": (19, 32),
    }


def test_a_tied_output_is_stored_under_both_names_and_counted_once():
    model = small_model(weight_tying=True)
    state = model.state_dict()
    assert "output.weight" not in state
    assert (
        state["output.tied_module.weight"].data_ptr() == state["tok_embeddings.weight"].data_ptr()
    )
    assert "output.tied_module.weight" not in dict(model.named_parameters())
    assert get_num_params(small_model()) - get_num_params(model) == 19 * 32


def test_a_later_token_changes_nothing_earlier():
    model, ids = small_model(), tokens()
    changed = ids.clone()
    changed[:, 7] = (ids[:, 7] + 1) % 19
    difference = (model(ids) - model(changed)).abs().amax(-1)  # [B, S]
    assert difference[:, :7].max() < 1e-13
    assert difference[:, 7:].min() > 1e-6


@pytest.mark.parametrize("sliding_window", [None, 1, 5])
def test_flex_attention_equals_sdpa(sliding_window):
    model = small_model(n_kv_heads=2, sliding_window=sliding_window).requires_grad_(False)
    logits = model(tokens())
    torch.testing.assert_close(model(tokens(), attn_impl="flex_attention"), logits)


@pytest.mark.parametrize("window", [1, 3, 100])
def test_a_token_sees_itself_and_window_minus_one_before_it(window):
    mask = create_causal_mask(8, "sdpa", window)
    assert mask.tolist() == [[0 <= q - k < window for k in range(8)] for q in range(8)]


def test_without_a_window_sdpa_needs_no_mask_tensor():
    assert create_causal_mask(8, "sdpa", None) == "causal"


def test_packed_documents_give_the_logits_of_each_alone():
    model = small_model().requires_grad_(False)
    first, second = tokens(1, 5), tokens(1, 9)
    lengths = torch.tensor([5, 9])
    mask_mod = generate_doc_mask_mod(causal_mask, lengths)
    logits = model(
        torch.cat([first, second], dim=1),
        tok_idx=lengths_to_local_ids(lengths)[1],
        mask=create_block_mask(mask_mod, None, None, 14, 14, device="cpu"),
        attn_impl="flex_attention",
    )
    torch.testing.assert_close(logits, torch.cat([model(first), model(second)], dim=1))


def test_a_bool_mask_and_positions_are_taken_as_they_are():
    model = small_model()
    mask = torch.ones(12, 12, dtype=torch.bool).tril()
    logits = model(tokens(), tok_idx=torch.arange(12), mask=mask)
    torch.testing.assert_close(logits, model(tokens()))


def test_logits_have_the_dtype_of_the_weights_and_the_loss_has_float32():
    model = small_model().to(torch.bfloat16)
    logits, loss = model(tokens()), model(tokens(), tokens())
    assert (logits.dtype, loss.dtype, loss.dim()) == (torch.bfloat16, torch.float32, 0)


@pytest.mark.parametrize("tied", [False, True])
def test_embedding_and_output_have_the_spread_of_the_width(tied):
    model = small_model(dim=256, vocab_size=400, init_base_std=0.5, weight_tying=tied)
    for module in (model.tok_embeddings, *([] if tied else [model.output])):
        std = 256**-0.5
        assert module.weight.std().item() == pytest.approx(0.9866 * std, rel=0.015)
        assert module.weight.abs().max() <= 3 * std
    assert (model.norm.weight == 1).all()


@pytest.mark.parametrize("tied", [False, True])
def test_init_weights_fills_everything_after_meta(tied):
    args = small_args(weight_tying=tied, n_kv_heads=2, init_std_factor="current_depth")
    with torch.device("meta"):
        model = LMTransformer(args)
    model.to_empty(device="cpu")
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.fill_(math.nan)
    torch.manual_seed(5)
    model.init_weights()
    plain = LMTransformer(args)
    torch.manual_seed(5)
    plain.init_weights()
    for name, expected in [*plain.named_parameters(), *plain.named_buffers()]:
        assert torch.equal(get_tensor(model, name), expected), name


def get_tensor(model: nn.Module, path: str) -> Tensor:
    parent, _, name = path.rpartition(".")
    return getattr(model.get_submodule(parent), name)


def test_size_and_cost_of_linguas_debug_model():
    with torch.device("meta"):
        model = LMTransformer(
            LMTransformerArgs(dim=1024, n_layers=8, n_heads=8, vocab_size=258, max_seqlen=2048)
        )
    n_params = get_num_params(model)
    assert n_params == 103_306_240
    assert get_num_flop_per_token(n_params - 258 * 1024, 8, 1024, 2048) == 735_692_800


def test_a_causal_mask_halves_the_cost_of_attention():
    full = attention_flops_per_token(8, 2048, 1024, causal=False)
    assert full == 3.5 * 4 * 8 * 2048 * 1024
    assert attention_flops_per_token(8, 2048, 1024, causal=True) == full / 2


@pytest.mark.parametrize("tied", [False, True])
def test_the_fsdp_plan_names_modules_of_the_model(tied):
    model, args = small_model(weight_tying=tied), small_args()
    plan = build_fsdp_grouping_plan(args)
    assert plan == [
        ("tok_embeddings", False), ("layers.0", False), ("layers.1", False), ("output", True)
    ]  # fmt: skip
    for path, _ in plan:
        assert isinstance(get_module(model, path), nn.Module)
    assert get_no_recompute_ops() is None


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"vocab_size": -1}, r"model\.vocab_size=-1"),
        ({"vocab_size": 0}, r"model\.vocab_size=0"),
        ({"sliding_window": 0}, r"model\.sliding_window=0 is too small"),
    ],
)
def test_values_that_are_not_allowed_are_named(values, text):
    with pytest.raises(ConfigError, match=text):
        LMTransformer(small_args(**values))


def test_a_sequence_longer_than_the_model_takes_is_an_error():
    model = small_model(max_seqlen=12)
    model(tokens(length=12))
    with pytest.raises(ValueError, match=r"13 tokens is longer than model\.max_seqlen=12"):
        model(tokens(length=13))


def test_an_unknown_implementation_has_no_mask():
    with pytest.raises(NotImplementedError, match="flash"):
        create_causal_mask(8, "flash", None)


def test_fmha_without_xformers_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "xformers", None)
    with pytest.raises(ConfigError, match="needs xformers"):
        create_causal_mask(8, "fmha", None)


def test_tensor_parallelism_is_refused():
    with pytest.raises(ConfigError, match=r"distributed\.tp_size=2 is not offered"):
        tp_parallelize(None, None, small_args(), DistributedArgs(tp_size=2))
