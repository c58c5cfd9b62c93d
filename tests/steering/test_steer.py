"""steer() in single forward passes, against a model that is written out in plain torch."""

import copy
import json
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from lingua_topk import topk_handle
from lingua_topk.errors import ConfigError
from lingua_topk.steering import (
    Ablate,
    Add,
    AddDirection,
    Clamp,
    Places,
    Scale,
    Set,
    in_units_of,
    reading,
    steer,
    steerable,
)  # fmt: skip
from lingua_topk.steering.interventions import describe
from tests.apps.small_models import small_model
from tests.steering.plain_model import plain_logits
from tests.steering.steered_models import (
    KINDS,
    MASK,
    SHAPE,
    SITES,
    WHERE,
    exported,
    places_of,
    plain_args,
    steered_model,
)  # fmt: skip

TOKENS = torch.randint(3, 258, (3, 14), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=SITES)
def site(request):
    return request.param


@pytest.fixture(scope="module")
def model(site):
    return steered_model(site)


@pytest.fixture(scope="module")
def theirs(model, site):
    return exported(model, site)


@pytest.fixture(scope="module")
def residual():
    return steered_model("residual")


@pytest.fixture(scope="module")
def exported_residual(residual):
    return exported(residual)


def expected_logits(model, site, edit, where, before_selection, layer=1):
    def edited(index, x):
        return edit(x, places_of(where, len(x), len(x))) if index == layer else x

    edits = {"before" if before_selection else "after": edited}
    rows = [plain_logits(model.state_dict(), row, plain_args(site), **edits) for row in TOKENS]
    return torch.stack(rows)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("before_selection", [False, True], ids=["after", "before"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_forward_pass_is_the_plain_one(model, site, kind, before_selection, where):
    make, edit = KINDS[kind]
    one = make(1, steerable(model)[1], where=WHERE[where], before_selection=before_selection)
    expected = expected_logits(model, site, edit, where, before_selection)
    plain = model(TOKENS)
    with steer(model, [one]):
        found = model(TOKENS)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    if where != "generated":  # of which a forward pass has none
        assert not torch.allclose(found, plain, rtol=0, atol=1e-6)
    assert torch.equal(model(TOKENS), plain)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("before_selection", [False, True], ids=["after", "before"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_exported_model_is_steered_alike(model, theirs, kind, before_selection, where):
    assert steerable(theirs) == steerable(model)
    make, _ = KINDS[kind]
    one = make(1, steerable(model)[1], where=WHERE[where], before_selection=before_selection)
    with torch.no_grad(), steer(theirs, [one]), steer(model, [one]):
        found, expected = theirs(TOKENS).logits, model(TOKENS)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_several_layers_and_order(residual):
    def edited(index, x):
        y = x.clone()
        if index == 0:
            y[:, 4] = y[:, 4] + 1.0
        if index == 2:
            y[:, 4] = (y[:, 4] + 3.0) * 2.0
        return y

    args = plain_args("residual")
    rows = [plain_logits(residual.state_dict(), row, args, after=edited) for row in TOKENS]
    steps = [Add(2, 4, 3.0), Add(0, 4, 1.0), Scale(2, 4, 2.0)]
    with steer(residual, steps):
        torch.testing.assert_close(residual(TOKENS), torch.stack(rows), rtol=0, atol=1e-9)
    with steer(residual, steps[:2]), steer(residual, steps[2:]):  # nested, the inner one last
        torch.testing.assert_close(residual(TOKENS), torch.stack(rows), rtol=0, atol=1e-9)


@pytest.mark.parametrize("before_selection", [False, True], ids=["after", "before"])
@pytest.mark.parametrize(
    "make",
    [
        lambda **rest: Add(1, (3, 4), 0.0, **rest),
        lambda **rest: Add(1, (3, 4), (0.0, -0.0), **rest),
        lambda **rest: Scale(1, 3, 1.0, **rest),
        lambda **rest: Clamp(1, 3, **rest),
        lambda **rest: AddDirection(1, torch.ones(32), 0.0, **rest),
    ],
    ids=["add", "add-several", "scale", "clamp", "direction"],
)
def test_what_changes_nothing_changes_no_bit(residual, make, before_selection):
    seen = []
    handle = residual.layers[1].topk.register_forward_hook(lambda *a: seen.append(a[2]))
    plain = residual(TOKENS)
    handle.remove()
    with steer(residual, [make(before_selection=before_selection)]):
        handle = residual.layers[1].topk.register_forward_hook(lambda *a: seen.append(a[2]))
        found = residual(TOKENS)
        handle.remove()
    bits = [one.view(torch.int64) for one in (plain, found, *seen)]
    assert torch.equal(bits[0], bits[1]) and torch.equal(bits[2], bits[3])


@pytest.mark.parametrize("of_transformers", [False, True], ids=["ours", "of transformers"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_half_precision_the_sum_that_is_selected_on_is_the_same(
    residual, dtype, of_transformers
):
    def logits_of(model):
        found = model(TOKENS)
        return found.logits if of_transformers else found

    model = (exported(residual) if of_transformers else copy.deepcopy(residual)).to(dtype)
    one = Add(1, (3, 4), 0.0, before_selection=True)
    with torch.no_grad():
        plain = logits_of(model)
        with steer(model, [one]):
            found = logits_of(model)
    assert found.dtype == plain.dtype == dtype and torch.equal(found, plain)


def test_a_negative_zero_stays_one():
    x = torch.tensor([[[-0.0, 0.0, -0.0]]])
    y = Add(0, (0, 1, 2), 0.0).applied(x, None)
    assert torch.equal(y.view(torch.int32), x.view(torch.int32))


@pytest.mark.parametrize("kind", KINDS)
def test_no_other_bit_is_touched(kind):
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(2))
    x[0, 3, 7], x[1, 2, 9], x[1, 1, 30] = math.nan, math.inf, -0.0
    make, _ = KINDS[kind]
    one = make(0, 32, where=MASK)
    positions = torch.arange(9).expand(2, 9)
    y = one.applied(x, Places(positions))
    may_change = torch.zeros(2, 9, 32, dtype=torch.bool)
    columns = list(range(32)) if kind == "direction" else list(one.neurons)
    may_change[..., columns] = MASK[None, :, None]
    same = y.view(torch.int32) == x.view(torch.int32)
    assert same[~may_change].all()
    assert not same[may_change].all()


def test_ablate_is_a_column_of_zeros(residual):
    def zeroed(module, inputs, output):
        return output * (torch.arange(32) != 3)

    handle = residual.layers[1].register_forward_hook(zeroed)
    expected = residual(TOKENS)
    handle.remove()
    with steer(residual, [Ablate(1, 3)]):
        assert torch.equal(residual(TOKENS), expected)


@pytest.mark.parametrize("position", [0, 5, 13])
def test_a_position_changes_nothing_before_it(residual, position):
    mask = torch.arange(14) == position
    plain = residual(TOKENS)
    with steer(residual, [Add(1, 3, 5.0, where=mask)]):
        found = residual(TOKENS)
    assert torch.equal(found[:, :position], plain[:, :position])
    assert not torch.equal(found[:, position], plain[:, position])


def test_each_text_can_have_its_own_mask(residual):
    masks = torch.rand(3, 10, generator=torch.Generator().manual_seed(3)) < 0.4
    with steer(residual, [Add(1, 3, 5.0, where=masks)]):
        together = residual(TOKENS)
    for i in range(3):
        with steer(residual, [Add(1, 3, 5.0, where=masks[i])]):
            alone = residual(TOKENS[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-9)
    few = Add(1, 3, 5.0, where=masks[:2])
    with steer(residual, [few]), pytest.raises(ConfigError, match="2 rows"):
        residual(TOKENS)


def test_the_columns_of_padding_are_not_positions(exported_residual):
    theirs = exported_residual
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    where = torch.tensor([True, False, True])
    with torch.no_grad(), steer(theirs, [Add(1, 3, 5.0, where=where)]):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        found = theirs(TOKENS[:2, :9], attention_mask=mask, position_ids=positions).logits
        alone = theirs(TOKENS[1:2, 4:9]).logits
    torch.testing.assert_close(found[1, 4:], alone[0], rtol=0, atol=1e-9)


# What is before is there again -------------------------------------------------------------


def test_all_is_as_before_whatever_happens(model):
    parts = [part for part in model.modules() if part._forward_hooks or part._forward_pre_hooks]
    plain, names = model(TOKENS), set(vars(model))

    class Failure(Exception):
        pass

    with pytest.raises(Failure), steer(model, [Add(1, 3, 5.0, where="prompt")]):
        assert not torch.equal(model(TOKENS), plain)
        raise Failure
    assert torch.equal(model(TOKENS), plain) and set(vars(model)) == names

    def failing(*_):
        raise Failure

    handle = model.layers[2].register_forward_hook(failing)
    with steer(model, [Add(1, 3, 5.0, where="prompt")]):
        with pytest.raises(Failure):
            model(TOKENS)
        handle.remove()
        # The pass that failed is over for whoever asks where tokens stand.
        with steer(model, [Add(0, 3, 1.0, where="prompt")]):
            model(TOKENS[:1])
    assert torch.equal(model(TOKENS), plain)
    after = [part for part in model.modules() if part._forward_hooks or part._forward_pre_hooks]
    assert after == parts


def test_the_own_generate_is_back(exported_residual):
    theirs = exported_residual
    with steer(theirs, [Add(1, 3, 5.0, where="generated")]):
        assert "generate" in vars(theirs)
    assert "generate" not in vars(theirs)


def test_statistics_count_what_topk_selected(residual):
    handle = topk_handle(residual)
    stats = handle.start_stats()
    residual(TOKENS)
    expected = {layer: one.l0 for layer, one in stats.items()}
    stats = handle.start_stats()
    with steer(residual, [Set(2, tuple(range(32)), 1.0)]):
        residual(TOKENS)
    assert {layer: one.l0 for layer, one in stats.items()} == expected
    handle.stop_stats()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_plain_model(kind):
    model = steered_model().requires_grad_(True)
    make, edit = KINDS[kind]
    with steer(model, [make(1, 32, where=MASK)]):
        model(TOKENS[:1]).square().mean().backward()
    weights = {name: p.detach().requires_grad_(True) for name, p in model.named_parameters()}

    def edited(index, x):
        return edit(x, places_of("mask", len(x), len(x))) if index == 1 else x

    plain_logits(
        weights, TOKENS[0], plain_args("residual"), after=edited
    ).square().mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, weights[name].grad, rtol=0, atol=1e-9)


# Models without TopK, wrappers -------------------------------------------------------------


def test_a_vanilla_model_is_steered_where_that_is_asked_for():
    model = small_model(**SHAPE)
    with pytest.raises(ConfigError, match="no TopK layer"), steer(model, [Add(1, 3, 1.0)]):
        pass
    handle = model.layers[3].register_forward_hook(lambda m, i, o: o + 2 * (torch.arange(32) == 3))
    expected = model(TOKENS)
    handle.remove()
    with steer(model, [Add(3, 3, 2.0)], dense=True):
        assert torch.equal(model(TOKENS), expected)
    assert steerable(model, dense=True) == dict.fromkeys(range(4), 32)
    with (
        pytest.raises(ConfigError, match="before_selection"),
        steer(model, [Add(3, 3, 2.0, before_selection=True)], dense=True),
    ):
        pass


def test_a_wrapped_model_is_found(residual):
    wrapper = nn.ModuleDict({"inner": residual})
    assert steerable(wrapper) == steerable(residual) == {0: 32, 1: 32, 2: 32}


def test_blocks_that_are_called_alone_have_to_tell(residual):
    block, h = residual.layers[1], torch.randn(1, 5, 32, dtype=torch.float64)
    freqs = residual.rope_embeddings(5)
    with steer(residual, [Add(1, 3, 5.0, where="prompt")]):
        with pytest.raises(ConfigError, match="does not tell"):
            block(h, freqs, mask="causal")
        with reading(Places(torch.arange(5)[None], torch.tensor([2]))):
            found = block(h, freqs, mask="causal")
    plain = block(h, freqs, mask="causal")
    expected = torch.zeros(1, 5, 32, dtype=torch.float64)
    expected[0, :2, 3] = 5.0
    torch.testing.assert_close(found - plain, expected)


# Mistakes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Add(-1, 3, 1.0), "layer=-1"),
        (lambda: Add(1.0, 3, 1.0), "layer=1.0"),
        (lambda: Add(1, -3, 1.0), "neuron=-3"),
        (lambda: Add(1, (), 1.0), "neuron=()"),
        (lambda: Add(1, "3", 1.0), "neuron='3'"),
        (lambda: Add(1, (3, 3), 1.0), "names one twice"),
        (lambda: Add(1, 3, math.nan), "delta=nan"),
        (lambda: Add(1, 3, math.inf), "delta=inf"),
        (lambda: Add(1, 3, "8"), "delta='8'"),
        (lambda: Add(1, 3, None), "delta=None"),
        (lambda: Add(1, 3, True), "delta=True"),
        (lambda: Add(1, 3, 10**400), "delta=1000"),
        (lambda: Add(1, b"3", 1.0), "neuron=b'3'"),
        (lambda: Add(1, (3, 4), (1.0,)), "1 numbers for 2 neurons"),
        (lambda: Set(1, 3, math.nan), "value=nan"),
        (lambda: Scale(1, 3, math.inf), "factor=inf"),
        (lambda: Clamp(1, 3, minimum=2.0, maximum=1.0), "minimum=2.0 is above"),
        (lambda: Clamp(1, 3, minimum=math.nan), "minimum=nan"),
        (lambda: Add(1, 3, 1.0, where="later"), "where='later'"),
        (lambda: Add(1, 3, 1.0, where=torch.ones(3)), "torch.float32"),
        (lambda: Add(1, 3, 1.0, where=np.array([True, False])), "where=array"),
        (lambda: Add(1, 3, 1.0, before_selection=1), "before_selection=1"),
        (lambda: AddDirection(1, torch.ones(2, 3), 1.0), r"\[2, 3\]"),
        (lambda: AddDirection(1, torch.tensor([math.nan]), 1.0), "finite"),
        (lambda: AddDirection(1, [1.0, 2.0], 1.0), "direction is a list"),
        (lambda: AddDirection(1, torch.ones(32), (1.0,)), "delta=(1.0,)"),
    ],
)  # fmt: skip
def test_an_intervention_that_is_not_one(make, said):
    with pytest.raises(ConfigError, match=said.replace("(", r"\(").replace(")", r"\)")):
        make()


@pytest.mark.parametrize(
    ("one", "said"),
    [
        (Add(3, 3, 1.0), "layer=3 is not a TopK layer: those are 0 to 2; the nearest is 2"),
        (Add(9, 3, 1.0), "layer=9 is not there: the model has 0 to 3"),
        (Add(1, 40, 1.0), "layer 1 has 0 to 31; the nearest is 31"),
        (Add(1, (0, 32), 1.0), "neuron=32 is not there"),
        (AddDirection(1, torch.ones(31), 1.0), "has 31 numbers"),
    ],
)
def test_what_is_not_in_the_model(residual, exported_residual, one, said):
    for model in (residual, exported_residual):
        with pytest.raises(ConfigError, match=said), steer(model, [Ablate(0, 1), one]):
            pass
    assert not residual.layers[0].topk._forward_hooks


@pytest.mark.parametrize("given", [Add(1, 3, 1.0), ["Add"], None])
def test_something_that_is_no_list_of_interventions(residual, given):
    with pytest.raises(ConfigError, match="interventions: got"), steer(residual, given):
        pass


def test_something_that_is_no_model():
    with pytest.raises(ConfigError, match="no `layers`"), steer(nn.Linear(2, 2), []):
        pass
    odd = nn.Module()
    odd.layers = nn.ModuleList([nn.Linear(2, 2)])
    with pytest.raises(ConfigError, match="no block that is known"), steer(odd, []):
        pass


# Units, and JSON ---------------------------------------------------------------------------


def test_multiples_of_a_neurons_strength():
    strengths = {1: torch.tensor([0.0, 2.0, 4.0]), 2: [1.0, math.inf]}
    steps = [
        Add(1, 1, 3.0), Add(1, (1, 2), -1.5), Set(1, (1, 2), (1.0, 2.0)),
        Clamp(1, 2, maximum=0.5), Scale(1, 2, 7.0), Ablate(1, 0),
    ]  # fmt: skip
    found = in_units_of(steps, strengths)
    assert found[0].delta == 6.0 and found[1].delta == (-3.0, -6.0)
    assert found[2].value == (2.0, 8.0)
    assert (found[3].minimum, found[3].maximum) == (-math.inf, 2.0)
    assert found[4].factor == 7.0 and found[5].neuron == 0
    for never in (Add(1, 0, 1.0), Add(1, 3, 1.0), Add(2, 1, 1.0), Add(0, 0, 1.0)):
        with pytest.raises(ConfigError, match=f"neuron {never.layer}:{never.neuron} was not seen"):
            in_units_of([never], strengths)


def test_an_intervention_as_json():
    assert describe(Add(1, (3, 4), 2.0, where=MASK)) == {
        "kind": "Add", "layer": 1, "neuron": [3, 4], "delta": 2.0, "where": "tensor [9]",
        "before_selection": False,
    }  # fmt: skip
    assert describe(Clamp(1, 3, maximum=2.0)) == {
        "kind": "Clamp", "layer": 1, "neuron": 3, "maximum": 2.0, "where": "all",
        "before_selection": False,
    }  # fmt: skip
    assert describe(Clamp(1, (3, 4), (-math.inf, 0.0)))["minimum"] == [None, 0.0]


def test_numbers_and_indices_of_any_kind(residual):
    given = [3, 4]
    kinds = [
        Add(np.int64(1), (np.int32(3), np.int64(4)), (np.float32(0.5), np.float64(2))),
        Add(1, range(3, 5), [Fraction(1, 2), 2]),
        Add(1, given, torch.tensor([0.5, 2.0]).tolist()),
    ]
    given.clear()  # what was given is not looked at again
    expected = Add(1, (3, 4), (0.5, 2.0))
    with steer(residual, [expected]):
        logits = residual(TOKENS)
    for one in kinds:
        assert json.dumps(describe(one)) == json.dumps(describe(expected))
        with steer(residual, [one]):
            assert torch.equal(residual(TOKENS), logits)
