"""Sparse decoding beside the dense forward of the same model, in float64."""

import contextlib
import copy

import pytest
import torch
from torch import nn

from lingua.transformer import RMSNorm
from lingua_topk import TopKArgs, topk_handle
from lingua_topk.errors import ConfigError
from lingua_topk.sparse import SparseDecoding, feed_forward, projections
from lingua_topk.sparse.copies import FeatureMajor
from lingua_topk.steering import Add, Clamp, steer
from tests.apps.small_models import small_model

SHAPES = {
    "residual": {"topk": TopKArgs(k=8, n_last_nontopk=1)},
    "grouped": {"topk": TopKArgs(k=8, n_last_nontopk=1), "n_kv_heads": 2, "head_dim": 12},
    "one layer": {"topk": TopKArgs(k=8, layers=[1])},
    "the last": {"topk": TopKArgs(k=8, layers=[2])},
    "all that is positive": {"topk": TopKArgs(k=32, n_last_nontopk=0)},
    "mlp": {"topk": TopKArgs(k=8, n_last_nontopk=1, site="mlp")},
    "one mlp": {"topk": TopKArgs(k=8, layers=[2], site="mlp"), "n_kv_heads": 1},
}
LAYERS = {"one layer": [2], "the last": [], "mlp": [0, 1], "one mlp": [2]}
TOLERANCE = {"rtol": 0, "atol": 1e-9}
TOKENS = torch.tensor([[5], [77], [200]])  # one of each row, as in decoding


@pytest.fixture
def always(monkeypatch):
    """Gather whatever it costs; the widths of x that were asked about are noted."""
    asked = []

    def pays_off(x, n_outputs, k, *_):
        asked.append((tuple(x.shape), n_outputs, k))
        return True

    for part in (projections, feed_forward):
        monkeypatch.setattr(part, "pays_off", pays_off)
    return asked


@pytest.fixture
def products(monkeypatch):
    """The gathered products: what was gathered for."""
    seen = []

    def noting(own):
        return lambda x, *weights: seen.append(x) or own(x, *weights)

    monkeypatch.setattr(projections, "gathered", noting(projections.gathered))
    monkeypatch.setattr(feed_forward, "gathered_gate", noting(feed_forward.gathered_gate))
    return seen


def run(model, tokens=TOKENS):
    with torch.no_grad():
        return model(tokens)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [TOKENS, TOKENS.t(), TOKENS[:1]], ids=["rows", "row", "one"])
def test_the_logits_are_the_dense_ones(shape, tokens, always, products):
    model = small_model(**SHAPES[shape])
    expected, decoding = run(model, tokens), SparseDecoding(model)
    assert decoding.layers == LAYERS.get(shape, [1, 2])
    with decoding.active():
        found = run(model, tokens)
    torch.testing.assert_close(found, expected, **TOLERANCE)
    assert len(products) == len(decoding.layers)
    assert all((x == 0).any() for x in products)
    products.clear()
    assert torch.equal(run(model, tokens), expected) and not products  # given back


def test_what_is_asked_of_the_rule(always):
    model = small_model(**SHAPES["grouped"])
    with SparseDecoding(model).active():
        run(model)
    assert always == [((3, 1, 32), 4 * 12 + 2 * 2 * 12, 8)] * 2
    always.clear()
    model = small_model(**SHAPES["mlp"])
    with SparseDecoding(model).active():
        run(model)
    assert always == [((3, 1, 96), 32 + 32, 8)] * 2


@pytest.fixture(params=["residual", "mlp"])
def model(request):
    return small_model(**SHAPES[request.param])


def test_small_models_stay_dense(model, products):
    decoding = SparseDecoding(model)
    with decoding.active():
        run(model)
    assert not products and decoding.copied_bytes == 0


def test_the_rule_decides_at_every_call(products, monkeypatch):
    """A model that is wide enough: one token is gathered, a prompt is not."""
    model = small_model(
        dim=256, multiple_of=32, max_seqlen=256, topk=TopKArgs(k=8, n_last_nontopk=1)
    )
    with SparseDecoding(model).active():
        expected = run(model, torch.arange(200)[None])
        assert not products
        run(model)
    assert [x.shape for x in products] == [(3, 1, 256)] * 2
    assert torch.equal(run(model, torch.arange(200)[None]), expected)


@pytest.mark.parametrize(
    "one",
    [
        Add(0, (1, 5, 9), 4.0),
        Clamp(1, tuple(range(32)), 0.7),
        Add(1, (2,), 30.0, before_selection=True),
    ],
    ids=["add", "all neurons", "before"],
)
def test_steered_values_are_looked_at(model, one, always, products):
    plain = run(model)
    with steer(model, [one]):
        expected = run(model)
        with SparseDecoding(model).active():
            found = run(model)
    torch.testing.assert_close(found, expected, **TOLERANCE)
    assert not torch.allclose(expected, plain, **TOLERANCE) and len(products) == 2
    with SparseDecoding(model).active(), steer(model, [one]):
        torch.testing.assert_close(run(model), expected, **TOLERANCE)


def test_norms_have_weights(model, always, products):
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.weight.data.normal_(generator=torch.Generator().manual_seed(3))
            module.weight.data[::4] = 0.0
    expected = run(model)
    with SparseDecoding(model).active():
        torch.testing.assert_close(run(model), expected, **TOLERANCE)


def test_hooks_on_the_projections_act_and_see(always, products):
    model = small_model(**SHAPES["residual"])
    attention = model.layers[1].attention
    seen = {}

    def halve(module, inputs, output):
        seen[module] = inputs[0]
        return output / 2

    for linear in (attention.wq, attention.wk, attention.wv):
        linear.register_forward_hook(halve)
    expected, dense = run(model), dict(seen)
    with SparseDecoding(model).active():
        torch.testing.assert_close(run(model), expected, **TOLERANCE)
    for linear, x in dense.items():
        torch.testing.assert_close(seen[linear], x, **TOLERANCE)
    assert len(products) == 1  # of the other block


@pytest.mark.parametrize("name", ["wq", "wk", "wv"])
def test_hooks_that_change_the_input_in_place_act(name, always, products):
    model = small_model(**SHAPES["residual"])
    plain = run(model)
    linear = getattr(model.layers[1].attention, name)
    linear.register_forward_pre_hook(lambda _, inputs: inputs[0].mul_(2.0).dim() // 9 or None)
    expected = run(model)
    with SparseDecoding(model).active():
        torch.testing.assert_close(run(model), expected, **TOLERANCE)
    assert not torch.allclose(expected, plain, **TOLERANCE) and len(products) == 1


def test_hooks_on_the_feed_forward_see_the_product_that_is_gathered_no_more(always, products):
    model = small_model(**SHAPES["mlp"])
    part, seen = model.layers[1].feed_forward, []
    for linear in (part.w1, part.w2, part.w3, part.topk, part):
        linear.register_forward_hook(lambda module, inputs, output: seen.append(module))
    expected = run(model)
    with SparseDecoding(model).active():
        torch.testing.assert_close(run(model), expected, **TOLERANCE)
    assert len(seen) == 10 and len(products) == 1  # of the other block
    part.w2._forward_hooks.clear()
    part.w3._forward_hooks.clear()
    with SparseDecoding(model).active():
        torch.testing.assert_close(run(model), expected, **TOLERANCE)
    assert len(seen) == 13 and len(products) == 3


def test_another_input_gets_a_product_of_its_own(always):
    model = small_model(**SHAPES["residual"])
    attention = model.layers[1].attention
    x, other = torch.randn(2, 3, 1, 32, dtype=torch.float64)
    with torch.no_grad(), SparseDecoding(model).active():
        attention.wq(x)
        torch.testing.assert_close(attention.wk(other), other @ attention.wk.weight.t())
        torch.testing.assert_close(attention.wv(x.view_as(x)), x @ attention.wv.weight.t())
        x.add_(1.0)  # the product of what it was has been taken
        torch.testing.assert_close(attention.wv(x), x @ attention.wv.weight.t())
        x = torch.randn(32, 32, dtype=torch.float64)
        attention.wq(x)
        for same_start in (x[:5], x.t()):
            torch.testing.assert_close(
                attention.wk(same_start), same_start @ attention.wk.weight.t()
            )


def test_rows_with_nan_are_nan(model, always, products):
    model.tok_embeddings.weight.data[77] = float("nan")
    expected = run(model)
    with SparseDecoding(model).active():
        found = run(model)
    torch.testing.assert_close(found, expected, equal_nan=True, **TOLERANCE)
    assert found[1].isnan().all() and not found[0].isnan().any() and products


def test_what_stays_dense(model, always, products):
    decoding = SparseDecoding(model)
    topk_handle(model).alpha = 0.5
    expected = run(model)
    with decoding.active():
        assert torch.equal(run(model), expected)
        topk_handle(model).alpha = 0.0
        model(TOKENS)  # outside of no_grad: gradients could be asked for
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            model(TOKENS)
        assert not products
        run(model)
    assert len(products) == 2


def test_copies_of_weights_are_made_once_and_anew_when_they_change(always):
    model = small_model(**SHAPES["residual"])
    decoding = SparseDecoding(model)
    assert decoding.copied_bytes == 0
    with decoding.active():
        run(model)
    assert decoding.copied_bytes == 2 * 3 * 32 * 32 * 8
    copies = [part.copy.get() for part in decoding._parts.values()]
    with decoding.active():
        run(model)
    for part, copied in zip(decoding._parts.values(), copies, strict=True):
        assert part.copy.get() is copied
    other = small_model(**SHAPES["residual"], seed=1)
    for change in (
        lambda: model.load_state_dict(other.state_dict()),
        lambda: model.layers[1].attention.wv.weight.mul_(2.0),
        lambda: setattr(model.layers[2].attention.wq.weight, "data", torch.ones(32, 32).double()),
    ):
        change()
        expected = run(model)
        with decoding.active():
            torch.testing.assert_close(run(model), expected, **TOLERANCE)
    decoding.forget()
    assert decoding.copied_bytes == 0
    model = small_model(**SHAPES["mlp"])
    decoding = SparseDecoding(model)
    for _ in range(2):
        expected = run(model)
        with decoding.active():
            torch.testing.assert_close(run(model), expected, **TOLERANCE)
        model.layers[0].feed_forward.w2.weight.mul_(2.0)
    assert decoding.copied_bytes == 2 * 32 * 96 * 8


def test_a_weight_in_the_memory_of_another_is_seen():
    linear = nn.Linear(512, 512, bias=False)
    copied, addresses = FeatureMajor([linear]), set()
    for _ in range(10):
        addresses.add(linear.weight.data_ptr())
        copied.forget_if_changed()
        assert torch.equal(copied.get().t(), linear.weight)
        linear.weight = None  # its memory is given to the next
        linear.weight = nn.Parameter(torch.randn(512, 512))
    assert len(addresses) < 10


def test_after_a_fused_step_the_copies_are_to_be_forgotten(always):
    model = small_model(**SHAPES["residual"]).requires_grad_(True)
    decoding = SparseDecoding(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    with decoding.active():
        run(model)
    model(TOKENS).square().mean().backward()
    optimizer.step()
    expected = run(model)
    decoding.forget()
    with decoding.active():
        torch.testing.assert_close(run(model), expected, **TOLERANCE)


def test_of_weights_made_in_inference_mode_a_copy_is_kept_too(always):
    with torch.inference_mode():
        model = small_model(**SHAPES["residual"])
        decoding = SparseDecoding(model)
        expected = model(TOKENS)
        for _ in range(2):
            with decoding.active():
                torch.testing.assert_close(model(TOKENS), expected, **TOLERANCE)
            copies = [part.copy.get() for part in decoding._parts.values()]
        with decoding.active():
            pass
        for part, copied in zip(decoding._parts.values(), copies, strict=True):
            assert part.copy.get() is copied
        model.layers[1].attention.wv.weight.mul_(2.0)
        expected = model(TOKENS)
        decoding.forget()  # which torch does not count
        with decoding.active():
            torch.testing.assert_close(model(TOKENS), expected, **TOLERANCE)


def test_all_is_given_back_after_an_exception_and_contexts_nest(model, always, products):
    decoding = SparseDecoding(model)
    with contextlib.suppress(RuntimeError), decoding.active():
        raise RuntimeError
    assert not any("forward" in vars(module) for module in model.modules())
    with decoding.active(), SparseDecoding(model).active():
        with decoding.active():
            pass
        run(model)
    assert len(products) == 2
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("how", ["copied", "saved"])
def test_a_copy_of_the_model_made_within_is_dense(how, model, always, products, tmp_path):
    expected = run(model)
    with SparseDecoding(model).active():
        if how == "copied":
            twin = copy.deepcopy(model)
        else:
            torch.save(model, tmp_path / "model")
            twin = torch.load(tmp_path / "model", weights_only=False)
        assert torch.equal(run(twin), expected) and not products
        run(model)
    assert len(products) == 2
    own = copy.deepcopy(model)
    for parameter in (*twin.layers.parameters(), *own.layers.parameters()):
        parameter.mul_(1.5)
    changed = run(own)
    assert not torch.allclose(changed, expected, **TOLERANCE)
    for one in (twin, copy.deepcopy(twin)):
        assert torch.equal(run(one), changed)
        with SparseDecoding(one).active():
            torch.testing.assert_close(run(one), changed, **TOLERANCE)
    assert torch.equal(run(model), expected)


class Adapted(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class OtherTensor(torch.Tensor):
    """As sharded weights are: a parameter that is no plain one."""


def adapt(module):
    module.__class__ = Adapted


def bias(module):
    module.bias = nn.Parameter(torch.ones(module.out_features).double())


def other_weight(module):
    module.weight = nn.Parameter(module.weight.detach().as_subclass(OtherTensor))


def mark_compiled(module):
    module._compiled_call_impl = module._call_impl


def replace_forward(module):
    own = module.forward
    module.forward = lambda *inputs, **more: own(*inputs, **more)


def hook_everywhere(_):
    return torch.nn.modules.module.register_module_forward_pre_hook(lambda *_: None)


def of_the_block(model, site):
    """What is gathered with in layers.1, and what its forward is replaced of."""
    block = model.layers[1]
    if site == "mlp":
        return [block.feed_forward.w2, block.feed_forward.w3], block.feed_forward
    return [block.attention.wq, block.attention.wk, block.attention.wv], None


@pytest.mark.parametrize("site", ["residual", "mlp"])
@pytest.mark.parametrize(
    "change", [adapt, bias, other_weight, mark_compiled, replace_forward], ids=lambda f: f.__name__
)
def test_what_is_no_plain_product_any_more_stays_dense(site, change, always, products):
    """Each of the projections in turn, changed after the decoding was made; the others gather."""
    for place in range(3 if site == "residual" else 2):
        model = small_model(**SHAPES[site])
        decoding = SparseDecoding(model)
        change(of_the_block(model, site)[0][place])
        expected = run(model)
        with decoding.active():
            torch.testing.assert_close(run(model), expected, **TOLERANCE)
        assert len(products) == 1
        products.clear()


@pytest.mark.parametrize("change", [mark_compiled, replace_forward], ids=lambda f: f.__name__)
def test_a_feed_forward_that_is_not_its_own_stays_dense(change, always, products):
    model = small_model(**SHAPES["mlp"])
    change(model.layers[1].feed_forward)
    expected = run(model)
    with SparseDecoding(model).active():
        torch.testing.assert_close(run(model), expected, **TOLERANCE)
    assert len(products) == 1


@pytest.mark.parametrize("site", ["residual", "mlp"])
def test_parts_that_were_replaced_are_seen(site, always, products):
    for place in range(3 if site == "residual" else 2):
        model = small_model(**SHAPES[site])
        decoding = SparseDecoding(model)
        with decoding.active():
            run(model)
        products.clear()
        old = of_the_block(model, site)[0][place]
        owner = model.layers[1].attention if site == "residual" else model.layers[1].feed_forward
        name = next(name for name, one in owner.named_children() if one is old)
        new = nn.Linear(old.in_features, old.out_features, bias=False, dtype=torch.float64)
        setattr(owner, name, new.requires_grad_(False))
        expected = run(model)
        with decoding.active():
            torch.testing.assert_close(run(model), expected, **TOLERANCE)
        assert len(products) == 1
        products.clear()


def test_a_model_whose_topk_was_taken_out_is_dense(model, always, products):
    decoding = SparseDecoding(model)
    topk_handle(model).restore()
    expected = run(model)
    with decoding.active():
        assert torch.equal(run(model), expected)
    assert not products


def test_hooks_on_all_modules_are_called(model, always, products):
    handle = hook_everywhere(model)
    try:
        expected = run(model)
        with SparseDecoding(model).active():
            assert torch.equal(run(model), expected)
    finally:
        handle.remove()
    assert not products


def test_what_was_compiled_is_left_alone(model, always, products):
    decoding = SparseDecoding(model)
    expected = run(model)
    mark_compiled(model.layers[1])
    with decoding.active():
        torch.testing.assert_close(run(model), expected, **TOLERANCE)
    assert len(products) == 1
    mark_compiled(model)
    with decoding.active():
        assert torch.equal(run(model), expected)
    assert len(products) == 1


def test_what_is_compiled_around_the_model_is_dense(model, always, products):
    expected = run(model)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with SparseDecoding(model).active():
        found = run(compiled)
    assert not products
    torch.testing.assert_close(found, expected, **TOLERANCE)
    for parameter in model.layers.parameters():
        parameter.mul_(1.5)
    torch.testing.assert_close(run(compiled), run(model), **TOLERANCE)


def test_models_that_are_not_known():
    with pytest.raises(ConfigError, match="TopKTransformer has no TopK"):
        SparseDecoding(small_model())
    model = small_model(**SHAPES["residual"])
    model.layers[2].attention.wk = nn.Linear(32, 32)
    with pytest.raises(ConfigError, match=r"layers.2.attention.wk is an nn.Linear with more"):
        SparseDecoding(model)
    model.layers[2].attention.wk = nn.Identity()
    with pytest.raises(ConfigError, match=r"layers.2.attention.wk is a Identity: decoding"):
        SparseDecoding(model)
    mlp = small_model(**SHAPES["mlp"])
    mlp.layers[0].feed_forward.w3 = nn.Identity()
    with pytest.raises(ConfigError, match=r"layers.0.feed_forward.w3 is a Identity: decoding"):
        SparseDecoding(mlp)
    del model.layers[2].attention
    with pytest.raises(ConfigError, match=r"layers.2.attention.wq is a NoneType: decoding"):
        SparseDecoding(model)
