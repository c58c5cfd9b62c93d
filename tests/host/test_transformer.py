"""lingua.transformer: each part against its plain definition."""

import math
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask

from lingua.errors import ConfigError
from lingua.transformer import (
    Attention,
    BaseTransformer,
    BaseTransformerArgs,
    FeedForward,
    RMSNorm,
    RotaryEmbedding,
    TiedLinear,
    TransformerBlock,
    apply_rotary_emb,
    attend,
    causal_mask,
    cross_entropy,
    generate_doc_mask_mod,
    lengths_to_local_ids,
    lengths_to_start_ids,
    precompute_freqs_cis,
    repeat_kv,
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def normal(*shape: int, dtype=torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def test_cross_entropy_is_minus_the_mean_log_probability_of_the_targets():
    pred, target = normal(2, 3, 5), torch.tensor([[0, 4, 2], [1, 1, 3]])
    probabilities = pred.exp() / pred.exp().sum(-1, keepdim=True)
    expected = -probabilities.gather(-1, target[..., None]).log()
    torch.testing.assert_close(cross_entropy(pred, target), expected.mean())
    each = cross_entropy(pred, target, reduction="none")
    torch.testing.assert_close(each, expected.flatten())


def test_cross_entropy_ignores_minus_100():
    pred, target = normal(1, 3, 5), torch.tensor([[1, -100, 2]])
    kept = cross_entropy(pred[:, [0, 2]], target[:, [0, 2]])
    torch.testing.assert_close(cross_entropy(pred, target), kept)


def test_cross_entropy_of_half_precision_is_computed_in_float32():
    pred, target = normal(1, 40, 300, dtype=torch.bfloat16) * 10, torch.arange(40)[None]
    loss = cross_entropy(pred, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(
        loss.double(), cross_entropy(pred.double(), target), rtol=1e-6, atol=0
    )


def test_rms_norm():
    norm = RMSNorm(6, eps=0.01).double()
    norm.weight.data = normal(6)
    x = normal(2, 3, 6)
    expected = x / (x.pow(2).sum(-1, keepdim=True) / 6 + 0.01).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)


def test_rms_norm_of_half_precision_rounds_once():
    norm = RMSNorm(64).to(torch.bfloat16)
    norm.weight.data = normal(64, dtype=torch.bfloat16)
    x = normal(50, 64, dtype=torch.bfloat16)
    exact = norm.double()(x.double())
    assert torch.equal(norm.to(torch.bfloat16)(x), exact.to(torch.bfloat16))


def test_repeat_kv_repeats_each_head_in_place():
    x = normal(2, 3, 2, 4)
    repeated = repeat_kv(x, 3, dim=2)
    assert torch.equal(repeated, x[:, :, [0, 0, 0, 1, 1, 1]])
    with pytest.raises(ValueError, match="dim=1"):
        repeat_kv(x, 2, dim=1)


def complex_rotations(head_dim: int, positions: Tensor, theta: float) -> Tensor:
    """e^(i position theta^(-2 j / head_dim)), [S, E / 2]."""
    frequencies = theta ** (-2 * torch.arange(head_dim // 2, dtype=torch.float64) / head_dim)
    angles = positions.double()[:, None] * frequencies
    return torch.polar(torch.ones_like(angles), angles)


def test_rotary_table_holds_rotation_matrices():
    table = precompute_freqs_cis(8, 50, theta=500.0)
    assert table.shape == (50, 4, 2, 2) and table.dtype == torch.float32
    z = complex_rotations(8, torch.arange(50), 500.0)
    expected = torch.stack((z.real, -z.imag, z.imag, z.real), dim=-1).view(50, 4, 2, 2)
    torch.testing.assert_close(table.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_rotary_table_is_to_the_last_bit_the_one_of_other_llamas(theta):
    frequencies = 1.0 / (theta ** (torch.arange(0, 128, 2, dtype=torch.int64).float() / 128))
    angles = torch.arange(4096).float()[:, None] * frequencies[None, :]
    table = precompute_freqs_cis(128, 4096, theta)
    assert torch.equal(table[..., 0, 0], angles.cos())
    assert torch.equal(table[..., 1, 0], angles.sin())


def test_rotary_embedding_turns_interleaved_pairs_as_complex_numbers():
    xq, xk = normal(2, 7, 4, 8), normal(2, 7, 2, 8)
    rotated = apply_rotary_emb(xq, xk, 1, precompute_freqs_cis(8, 7, 100.0).double())
    z = complex_rotations(8, torch.arange(7), 100.0)[None, :, None]
    for x, turned in zip((xq, xk), rotated, strict=True):
        expected = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * z
        torch.testing.assert_close(
            turned, torch.view_as_real(expected).flatten(-2), rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16])
def test_rotary_embedding_computes_in_float32_and_returns_the_dtype_of_its_input(table_dtype):
    x, table = normal(1, 9, 1, 64, dtype=torch.bfloat16), precompute_freqs_cis(64, 9)
    table = table.to(table_dtype)
    turned, _ = apply_rotary_emb(x, x, 1, table)
    exact, _ = apply_rotary_emb(x.double(), x.double(), 1, table.double())
    assert torch.equal(turned, exact.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strided", [False, True])
def test_both_forms_of_the_rotation_are_one(monkeypatch, dtype, strided):
    """As complex numbers, and written out as for a compiler: results and gradients."""
    x, table = normal(2, 7, 3, 8, dtype=dtype), precompute_freqs_cis(8, 7, 100.0)
    if strided:  # an odd number of values between the heads
        x = nn.functional.pad(x, (0, 1))[..., :8]
    gradient = normal(2, 7, 3, 8, dtype=dtype)
    found = []
    for is_compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda answer=is_compiling: answer)
        given = x.detach().requires_grad_()
        turned, _ = apply_rotary_emb(given, given.detach(), 1, table)
        found.append((turned, *torch.autograd.grad(turned, given, gradient)))
    for one, other in zip(*found, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one, other, rtol=1e-6 if dtype.itemsize > 2 else 0, atol=1e-6)


def test_rotary_positions_can_be_chosen():
    rope = RotaryEmbedding(10_000.0, 8, max_seqlen=16)
    assert torch.equal(rope(seqlen=5), rope.freqs_cis[:5])
    assert torch.equal(rope(tok_idx=torch.tensor([3, 0, 15])), rope.freqs_cis[[3, 0, 15]])
    assert rope.state_dict() == {}


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        ({"seqlen": 17}, r"17 tokens is longer than model\.max_seqlen=16"),
        ({"tok_idx": torch.zeros(2, 3, dtype=torch.int64)}, r"\(2, 3\)"),
        ({}, "needs seqlen or tok_idx"),
    ],
)
def test_rotary_embedding_says_what_is_wrong(wanted, text):
    with pytest.raises(ValueError, match=text):
        RotaryEmbedding(10_000.0, 8, max_seqlen=16)(**wanted)


def test_too_few_rotary_positions_are_an_error():
    x = normal(1, 5, 2, 8)
    with pytest.raises(ValueError, match="4 rotary positions for 5 tokens"):
        apply_rotary_emb(x, x, 1, precompute_freqs_cis(8, 4))


def test_lengths_of_packed_documents():
    lengths = torch.tensor([3, 1, 2])
    assert lengths_to_start_ids(lengths).tolist() == [0, 3, 4]
    document, position = lengths_to_local_ids(lengths)
    assert document.tolist() == [0, 0, 0, 1, 2, 2]
    assert position.tolist() == [0, 1, 2, 0, 0, 1]


def as_matrix(mask_mod, n_q: int, n_kv: int) -> list[str]:
    """Rows of 1 and 0, a row a query."""
    q, kv = torch.arange(n_q), torch.arange(n_kv)
    seen = torch.vmap(torch.vmap(lambda i, j: mask_mod(0, 0, i, j), (None, 0)), (0, None))(q, kv)
    return ["".join(str(int(x)) for x in row) for row in seen]


def test_packed_documents_do_not_see_each_other_nor_what_is_behind_them():
    mask_mod = generate_doc_mask_mod(causal_mask, torch.tensor([2, 3]))
    expected = ["100000", "110000", "001000", "001100", "001110", "000000"]
    assert as_matrix(mask_mod, 6, 6) == expected


def test_packed_queries_and_keys_may_differ_in_length():
    mask_mod = generate_doc_mask_mod(causal_mask, torch.tensor([1, 2]), torch.tensor([3, 2]))
    assert as_matrix(mask_mod, 3, 5) == ["10000", "00010", "00011"]


def naive_attention(xq: Tensor, xk: Tensor, xv: Tensor, allowed: Tensor) -> Tensor:
    """Softmax attention, a head at a time. xq, xk, xv: [B, S, H, E], allowed: [S, S]."""
    heads = []
    for h in range(xq.shape[2]):
        q, k, v = xq[:, :, h], xk[:, :, h], xv[:, :, h]  # [B, S, E]
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~allowed, -math.inf)
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        heads.append(weights @ v)
    return torch.stack(heads, dim=2)


LENGTHS = torch.tensor([60, 100, 40])
TRIANGLE = torch.ones(200, 200, dtype=torch.bool).tril()
DOCUMENTS = torch.block_diag(*(torch.ones(n, n) for n in LENGTHS)).bool() & TRIANGLE


def block_mask(mask_mod):
    return create_block_mask(mask_mod, None, None, 200, 200, device="cpu")


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize(
    ("attn_impl", "make_mask", "allowed"),
    [
        ("sdpa", lambda: None, torch.ones_like(TRIANGLE)),
        ("sdpa", lambda: "causal", TRIANGLE),
        ("sdpa", lambda: DOCUMENTS, DOCUMENTS),
        ("flex_attention", lambda: None, torch.ones_like(TRIANGLE)),
        ("flex_attention", lambda: block_mask(causal_mask), TRIANGLE),
        (
            "flex_attention",
            lambda: block_mask(generate_doc_mask_mod(causal_mask, LENGTHS)),
            DOCUMENTS,
        ),
    ],
    ids=["sdpa", "sdpa-causal", "sdpa-documents", "flex", "flex-causal", "flex-documents"],
)
def test_attention_is_softmax_over_what_the_mask_allows(attn_impl, make_mask, allowed):
    xq, xk, xv = normal(2, 200, 3, 8), normal(2, 200, 3, 8), normal(2, 200, 3, 8)
    out = attend(xq, xk, xv, make_mask(), attn_impl)
    torch.testing.assert_close(out, naive_attention(xq, xk, xv, allowed))


@pytest.mark.parametrize(
    ("attn_impl", "mask", "text"),
    [
        ("sdpa", "casual", "not 'casual'"),
        ("sdpa", 3, "not int"),
        ("flex_attention", "causal", "BlockMask as mask, not 'causal'"),
    ],
)
def test_a_mask_of_another_implementation_is_an_error(attn_impl, mask, text):
    x = normal(1, 2, 1, 8)
    with pytest.raises(TypeError, match=text):
        attend(x, x, x, mask, attn_impl)


def test_an_unknown_implementation_is_an_error():
    x = normal(1, 2, 1, 8)
    with pytest.raises(NotImplementedError, match=r"attn_impl='flash'.* sdpa"):
        attend(x, x, x, None, "flash")


def test_fmha_without_xformers_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "xformers", None)
    x = normal(1, 2, 1, 8)
    with pytest.raises(ConfigError, match="needs xformers"):
        attend(x, x, x, None, "fmha")


def test_grouped_queries_share_the_keys_of_their_group():
    attention = Attention(dim=24, head_dim=8, n_heads=6, n_kv_heads=2, rope_theta=1e4).double()
    attention.reset_parameters()
    x, table = normal(2, 5, 24), precompute_freqs_cis(8, 5).double()
    xq = attention.wq(x).view(2, 5, 6, 8)
    xk, xv = attention.wk(x).view(2, 5, 2, 8), attention.wv(x).view(2, 5, 2, 8)
    xq, xk = apply_rotary_emb(xq, xk, 1, table)
    group = [h // 3 for h in range(6)]
    heads = naive_attention(xq, xk[:, :, group], xv[:, :, group], TRIANGLE[:5, :5])
    expected = attention.wo(heads.flatten(-2))
    torch.testing.assert_close(attention(x, table, mask="causal"), expected)
    longer_table = precompute_freqs_cis(8, 9).double()
    torch.testing.assert_close(attention(x, longer_table, mask="causal"), expected)


def test_attention_asks_its_kv_cache_for_keys_and_values():
    class Cache(nn.Module):
        def update(self, k, v, tok_idx):
            self.seen = (k, v, tok_idx)
            return torch.cat([k, k], dim=1), torch.cat([v, v], dim=1)

    attention = Attention(dim=16, head_dim=8, n_heads=2, n_kv_heads=1, rope_theta=1e4).double()
    x, table, tok_idx = normal(1, 3, 16), precompute_freqs_cis(8, 3).double(), torch.arange(3)
    without = attention(x, table, tok_idx, mask=None)
    attention.kv_cache = Cache()
    # Every key twice: each has half the weight, the sum is the same.
    torch.testing.assert_close(attention(x, table, tok_idx, mask=None), without)
    assert attention.kv_cache.seen[0].shape == (1, 3, 1, 8)
    assert attention.kv_cache.seen[2] is tok_idx


@pytest.mark.parametrize(
    ("dim", "multiplier", "multiple_of", "hidden"),
    [
        (1024, None, 256, 2816),
        (4096, 1.0, 256, 11008),
        (2048, 1.3, 1024, 7168),
        (96, None, 1, 256),
        (96, 0.5, 1, 128),
    ],
)
def test_width_of_the_feed_forward(dim, multiplier, multiple_of, hidden):
    with torch.device("meta"):
        ffn = FeedForward(dim, 4 * dim, multiple_of, multiplier)
    assert ffn.hidden_dim == hidden
    assert [tuple(w.weight.shape) for w in (ffn.w1, ffn.w3, ffn.w2)] == [
        (hidden, dim), (hidden, dim), (dim, hidden)
    ]  # fmt: skip


def test_feed_forward_is_a_gated_silu():
    ffn = FeedForward(6, 24, 4, None).double()
    x = normal(2, 3, 6)
    gate = x @ ffn.w1.weight.T
    expected = (gate / (1 + (-gate).exp()) * (x @ ffn.w3.weight.T)) @ ffn.w2.weight.T
    torch.testing.assert_close(ffn(x), expected)


def test_block_is_pre_norm_with_two_residuals():
    block = TransformerBlock(BaseTransformerArgs(dim=16, n_heads=2, multiple_of=8)).double()
    x, table = normal(2, 5, 16), precompute_freqs_cis(8, 5).double()
    h = x + block.attention(block.attention_norm(x), table, mask="causal")
    expected = h + block.feed_forward(block.ffn_norm(h))
    torch.testing.assert_close(block(x, table, mask="causal"), expected)


def test_tied_linear_uses_the_weight_of_the_other_module():
    embedding = nn.Embedding(5, 4).double()
    x = normal(3, 4)
    torch.testing.assert_close(TiedLinear(embedding)(x), x @ embedding.weight.T)
    with pytest.raises(ValueError, match="SiLU has no weight"):
        TiedLinear(nn.SiLU())


DIVISORS = {  # of the two layers
    "disabled": (1.0, 1.0),
    "global_depth": (math.sqrt(6), math.sqrt(6)),
    "current_depth": (math.sqrt(2), 2.0),
    "dim_ratio": (256 / 4096, 256 / 4096),
}


@pytest.mark.parametrize("base_std", [None, 0.02])
@pytest.mark.parametrize("factor", DIVISORS)
def test_initial_weights_have_the_spread_of_the_table(factor, base_std):
    args = BaseTransformerArgs(
        dim=256, n_layers=2, n_heads=4, init_std_factor=factor, init_base_std=base_std
    )
    model = BaseTransformer(args)
    model.init_weights()
    std = base_std or 256**-0.5
    for layer, divisor in zip(model.layers, DIVISORS[factor], strict=True):
        attention, ffn = layer.attention, layer.feed_forward
        for linear in (attention.wq, attention.wk, attention.wv, ffn.w1, ffn.w3):
            assert_cut_normal(linear.weight, std, 3 * std)
        assert_cut_normal(attention.wo.weight, std / divisor, 3 * std)
        out_std = (base_std or ffn.hidden_dim**-0.5) / divisor
        assert_cut_normal(ffn.w2.weight, out_std, 3 * out_std)
        assert (layer.attention_norm.weight == 1).all() and (layer.ffn_norm.weight == 1).all()


def assert_cut_normal(weight: Tensor, std: float, bound: float) -> None:
    """At least 65,536 samples: the measured std has a relative error of about 0.3%."""
    weight = weight.detach()
    assert weight.abs().max() <= bound
    assert abs(weight.mean()) < 0.02 * std
    cut = bound / std
    density, inside = math.exp(-(cut**2) / 2) / math.sqrt(2 * math.pi), math.erf(cut / math.sqrt(2))
    expected = std * math.sqrt(1 - 2 * cut * density / inside)  # 0.9866 std at a cut of 3
    assert weight.std().item() == pytest.approx(expected, rel=0.015)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({}, r"model\.n_heads and model\.head_dim are both unset"),
        ({"n_heads": 0}, r"model\.n_heads=0 is too small"),
        ({"n_heads": 5}, r"model\.n_heads=5 does not divide model\.dim=64"),
        ({"n_heads": 5, "head_dim": 16}, r"model\.n_heads=5 does not divide model\.dim=64"),
        ({"n_heads": 4, "n_kv_heads": 3}, r"model\.n_kv_heads=3 does not divide model\.n_heads=4"),
        ({"head_dim": 128}, r"model\.head_dim=128 gives 0 heads"),
        ({"head_dim": 20}, r"model\.head_dim=20 gives 3 heads"),
        ({"n_heads": 64}, r"model\.head_dim=1 is odd"),
        ({"n_heads": 4, "dim": 0}, r"model\.dim=0 is too small"),
        ({"n_heads": 4, "n_layers": 0}, r"model\.n_layers=0 is too small"),
        ({"n_heads": 4, "max_seqlen": 0}, r"model\.max_seqlen=0 is too small"),
        ({"n_heads": 4, "multiple_of": 0}, r"model\.multiple_of=0 is too small"),
        ({"n_heads": 4, "ffn_dim_multiplier": 0.0}, r"model\.ffn_dim_multiplier=0\.0 leaves"),
        ({"n_heads": 4, "init_std_factor": "depth"}, r"'depth' is not known.* current_depth"),
    ],
)
def test_dimensions_that_do_not_fit_are_named(values, text):
    with pytest.raises(ConfigError, match=text):
        BaseTransformer(BaseTransformerArgs(**{"dim": 64, **values}))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"n_heads": 4}, (16, 4, 4)),
        ({"head_dim": 16}, (16, 4, 4)),
        ({"n_heads": 4, "head_dim": 24, "n_kv_heads": 2}, (24, 4, 2)),
    ],
)
def test_heads_follow_from_what_is_given(values, expected):
    block = TransformerBlock(BaseTransformerArgs(dim=64, **values))
    assert (block.head_dim, block.n_heads, block.n_kv_heads) == expected
    head_dim, n_heads, n_kv_heads = expected
    assert block.attention.wq.weight.shape == (n_heads * head_dim, 64)
    assert block.attention.wv.weight.shape == (n_kv_heads * head_dim, 64)
    assert block.attention.wo.weight.shape == (64, n_heads * head_dim)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compiled_flex_attention_on_cuda_equals_sdpa():
    xq, xk, xv = (normal(2, 256, 4, 64, dtype=torch.float32).cuda() for _ in range(3))
    mask = create_block_mask(causal_mask, None, None, 256, 256, device="cuda")
    out = attend(xq, xk, xv, mask, "flex_attention")
    torch.testing.assert_close(out, attend(xq, xk, xv, "causal", "sdpa"), rtol=1e-3, atol=1e-3)
