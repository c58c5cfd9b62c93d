"""The exported architecture against our own model, on weights of every shape there is."""

import copy
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import lingua_topk
from apps.topk.model import TopKTransformer, TopKTransformerArgs
from lingua_topk import TopKArgs, topk_handle
from lingua_topk.errors import CheckpointError, ConfigError
from lingua_topk.hf import TopKLMConfig, TopKLMForCausalLM, register
from lingua_topk.hf.convert import from_hf_weights, to_halves, to_hf_config, to_hf_weights, to_pairs
from lingua_topk.hf.modeling_topk_lm import TopKLMTopK, topk
from lingua_topk.ops.definition import topk_sum_definition

VOCAB = 101
SHAPES = {
    "plain": {},
    "grouped": {"n_kv_heads": 2, "head_dim": 24, "rope_theta": 5e4},
    "tied": {"weight_tying": True, "n_kv_heads": 1, "norm_eps": 1e-3},
}


def our_model(topk=None, **shape):
    args = {"dim": 64, "n_layers": 4, "n_heads": 4, "multiple_of": 16, "max_seqlen": 128, **shape}
    torch.manual_seed(0)
    model = TopKTransformer(TopKTransformerArgs(vocab_size=VOCAB, topk=topk, **args))
    model.init_weights()
    for parameter in model.parameters():  # the rotary table stays in float32
        parameter.data = parameter.data.double()
    model.args = TopKTransformerArgs(vocab_size=VOCAB, topk=topk, **args)
    return model.eval()


def their_model(ours, alpha=0.0):
    hidden = ours.layers[0].feed_forward.hidden_dim
    config = to_hf_config(ours.args, ours.args.topk, hidden, alpha=alpha)
    config.dtype = torch.float64
    weights = to_hf_weights(ours.state_dict(), config)
    kind = LlamaForCausalLM if ours.args.topk is None else TopKLMForCausalLM
    return kind.from_pretrained(None, config=config, state_dict=weights, dtype=torch.float64).eval()


def tokens(rows=3, length=40):
    return torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("activation", ["relu", "identity", "gelu", "silu"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_operator_is_ours(activation, alpha):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-6, 7, (50, 12), generator=generator).double() / 3  # many ties
    x[3, 4], x[7, 2], x[8, 1] = math.nan, math.inf, -math.inf
    for k in (1, 5, 12, 20):
        one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, expected = topk(one, k, activation, alpha), lingua_topk.topk(other, k, alpha, activation)
        assert torch.equal(y.nan_to_num(7), expected.nan_to_num(7))
        y.sum().backward()
        expected.sum().backward()
        assert torch.equal(one.grad.nan_to_num(7), other.grad.nan_to_num(7))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("site", ["residual", "mlp"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_logits_in_float64(shape, site, activation):
    args = TopKArgs(k=8, layers=[0, 2], site=site, activation=activation)
    ours = our_model(args, **shape)
    x = tokens()
    with torch.no_grad():
        difference = (their_model(ours)(x).logits - ours(x)).abs().max()
        topk_handle(ours).alpha = 0.4
        annealed = (their_model(ours, alpha=0.4)(x).logits - ours(x)).abs().max()
    assert max(difference, annealed) < 1e-12


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_names_and_rows_come_back(shape):
    ours = our_model(**shape)
    config = to_hf_config(ours.args, None, ours.layers[0].feed_forward.hidden_dim)
    back = from_hf_weights(to_hf_weights(ours.state_dict(), config), config)
    assert back.keys() == ours.state_dict().keys()
    assert all(torch.equal(back[name], weight) for name, weight in ours.state_dict().items())


def test_the_order_of_rows():
    rows = torch.arange(8)[:, None]  # one head of 8: the pairs (0, 1), (2, 3) ...
    assert to_halves(rows, 8)[:, 0].tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert torch.equal(to_pairs(to_halves(rows, 4), 4), rows)


def test_gradients_are_those_of_our_model():
    """People fine-tune: the loss and the gradient of every weight, in float64."""
    ours = our_model(TopKArgs(k=8, n_last_nontopk=1), **SHAPES["grouped"])
    theirs = their_model(ours)
    x = tokens()
    loss = theirs(x, labels=x).loss
    loss.backward()
    expected = ours(x[:, :-1], x[:, 1:])
    expected.backward()
    # transformers takes the loss in float32.
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    back = from_hf_weights(gradients, theirs.config)
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(back[name], parameter.grad, rtol=1e-5, atol=1e-8)


def test_gradient_checkpointing_changes_nothing():
    theirs = their_model(our_model(TopKArgs(k=8))).train()
    x, gradients = tokens(), []
    for _ in range(2):
        theirs.zero_grad()
        theirs(x, labels=x, use_cache=False).loss.backward()
        gradients.append([p.grad.clone() for p in theirs.parameters()])
        theirs.activation_checkpointing_enable()
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_hidden_states_are_what_our_blocks_return():
    ours = our_model(TopKArgs(k=8, n_last_nontopk=1))
    seen = []
    for layer in ours.layers:
        layer.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    x = tokens()
    with torch.no_grad():
        ours(x)
        hidden = their_model(ours)(x, output_hidden_states=True).hidden_states
        last = ours.norm(seen[-1])
    assert len(hidden) == 5
    for theirs, block in zip(hidden[1:-1], seen[:-1], strict=True):
        assert torch.equal(theirs != 0, block != 0)
        assert ((theirs != 0).sum(-1) <= 8).all()
        torch.testing.assert_close(theirs, block, rtol=0, atol=1e-12)
    torch.testing.assert_close(hidden[-1], last, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [TopKArgs(k=8), TopKArgs(k=8, site="mlp"), None])
def test_generation_is_greedy_search_in_our_model(kind):
    ours, x = our_model(kind), tokens(2, 7)
    theirs = their_model(ours)
    # eos is unknown to these models: generation ends at the length.
    settings = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    cached = theirs.generate(x, **settings)
    expected = x
    with torch.no_grad():
        for _ in range(24):
            following = ours(expected)[:, -1].argmax(-1, keepdim=True)
            expected = torch.cat((expected, following), dim=1)
    assert torch.equal(cached, expected)
    assert torch.equal(theirs.generate(x, use_cache=False, **settings), expected)


# transformers' eager attention is not one for float64: it takes the softmax in float32, in which
# the mask of a row of padding is -inf throughout, and the row NaN.
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("attention", "dtype", "tolerance"),
    [("sdpa", torch.float64, 1e-12), ("eager", torch.float32, 1e-4)],
)
def test_padding_changes_no_logits(side, attention, dtype, tolerance):
    theirs = their_model(our_model(TopKArgs(k=8))).to(dtype)
    theirs.set_attn_implementation(attention)
    x, lengths = tokens(3, 20), (20, 13, 1)
    mask = torch.zeros(3, 20, dtype=torch.long)
    padded = torch.zeros(3, 20, dtype=torch.long)
    places = [slice(20 - n, 20) if side == "left" else slice(0, n) for n in lengths]
    for row, (place, n) in enumerate(zip(places, lengths, strict=True)):
        padded[row, place], mask[row, place] = x[row, :n], 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)  # as generate() counts them
    with torch.no_grad():
        logits = theirs(padded, attention_mask=mask, position_ids=positions).logits
        assert logits.isfinite().all()
        for row, (place, n) in enumerate(zip(places, lengths, strict=True)):
            alone = theirs(x[row : row + 1, :n]).logits[0]
            torch.testing.assert_close(logits[row, place], alone, rtol=0, atol=tolerance)


def test_a_padded_batch_generates_what_its_rows_do_alone():
    theirs, x = their_model(our_model(TopKArgs(k=8))), tokens(2, 9)
    settings = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    padded, mask = x.clone(), torch.ones_like(x)
    padded[1, :5], mask[1, :5] = 0, 0
    together = theirs.generate(padded, attention_mask=mask, **settings)
    assert torch.equal(together[0], theirs.generate(x[:1], **settings)[0])
    assert torch.equal(together[1, 5:], theirs.generate(x[1:, 5:], **settings)[0])


def test_registered_classes_load_without_remote_code(tmp_path):
    register()
    register()
    theirs = their_model(our_model(TopKArgs(k=8, activation="silu"), weight_tying=True))
    theirs.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is TopKLMForCausalLM
    assert loaded.config.topk_layers == [0, 1] and loaded.config.topk_activation == "silu"
    x = tokens()
    with torch.no_grad():
        assert torch.equal(loaded(x).logits, theirs(x).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_a_block_selects_on_the_sum_as_in_training(dtype, alpha):
    generator = torch.Generator().manual_seed(0)
    h, update = torch.randn(2, 64, 256, generator=generator).to(dtype).unbind()
    config = TopKLMConfig(topk_k=32, topk_alpha=alpha, hidden_size=256)
    y = TopKLMTopK(config)(h, update)
    assert y.dtype == dtype
    assert torch.equal(y, topk_sum_definition(h, update, 32, alpha, "relu"))
    if dtype == torch.bfloat16:  # the sum as Llama's block takes it would keep others
        assert not torch.equal(y, topk_sum_definition(h + update, 0 * h, 32, alpha, "relu"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs(dtype):
    theirs = their_model(our_model(TopKArgs(k=8))).to(dtype)
    logits = theirs(tokens()).logits
    assert logits.dtype == dtype and logits.isfinite().all()


@pytest.mark.parametrize(
    "field",
    [
        {"topk_k": 0},
        {"topk_layers": [4]},
        {"topk_layers": [-1]},
        {"topk_site": "attention"},
        {"topk_activation": "tanh"},
        {"topk_alpha": 1.5},
    ],
)
def test_a_config_out_of_range_is_refused(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        TopKLMConfig(num_hidden_layers=4, **field)


def test_what_llama_does_not_have_is_refused():
    args = copy.copy(our_model().args)
    args.sliding_window = 8
    with pytest.raises(ConfigError, match="sliding_window=8"):
        to_hf_config(args, None, 176)
    config = to_hf_config(our_model().args, None, 176)
    with pytest.raises(CheckpointError, match="bias"):
        to_hf_weights({"layers.0.attention.wq.bias": torch.zeros(64)}, config)
