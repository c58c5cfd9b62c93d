"""Contexts that overlap, threads, copies, wrappers, compiled models, and settings of generate."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import LogitsProcessorList, StaticCache

from lingua_topk.errors import ConfigError
from lingua_topk.steering import Add, Scale, steer, steerable
from lingua_topk.steering.places import current
from tests.steering.steered_models import MASK, SMALL, exported, steered_model

TOKENS = torch.randint(3, 256, (3, 9), generator=torch.Generator().manual_seed(1))
NEURONS = (3, 5, 7, 9)
SETTINGS = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module")
def model():
    return steered_model(shape=SMALL)


@pytest.fixture(scope="module")
def theirs(model):
    return exported(model, shape=SMALL)


def strong(where):
    return Add(0, NEURONS, 6.0, where=where)


def generated(theirs, use_cache=False, **settings):
    return theirs.generate(TOKENS, use_cache=use_cache, **SETTINGS, **settings)


@pytest.fixture(scope="module")
def expected(theirs):
    """By what acts on the generated alone."""
    with steer(theirs, [strong("generated")]):
        found = generated(theirs, use_cache=True)
    assert not torch.equal(found, generated(theirs))
    return found


# Contexts, threads, copies -----------------------------------------------------------------


def test_an_inner_context_ends_and_the_outer_one_holds(theirs, expected):
    with steer(theirs, [strong("generated")]):
        with steer(theirs, [Scale(0, 4, 1.0, where="generated")]):
            assert torch.equal(generated(theirs), expected)
        assert torch.equal(generated(theirs), expected)
    assert "generate" not in vars(theirs) and current() is None


def test_contexts_that_end_in_another_order(theirs, expected):
    outer, inner = steer(theirs, [strong("prompt")]), steer(theirs, [strong("generated")])
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    assert torch.equal(generated(theirs), expected)
    inner.__exit__(None, None, None)
    assert "generate" not in vars(theirs) and current() is None


def test_a_generate_of_ones_own_is_back(theirs, expected):
    def own(*args, **kwargs):
        return type(theirs).generate(theirs, *args, **kwargs)

    theirs.generate = own
    try:
        with steer(theirs, [strong("generated")]):
            assert torch.equal(generated(theirs), expected)
        assert vars(theirs)["generate"] is own
    finally:
        del theirs.generate


def test_behind_a_pass_nothing_is_told(model):
    with steer(model, [strong("prompt")]), steer(model, [strong(MASK)]):
        model(TOKENS)
        assert current() is None
        with pytest.raises(KeyError):
            model()  # no tokens: the pass does not begin
        assert current() is None


def test_threads_do_not_disturb_one_another(model, theirs):
    def host(n):
        with torch.no_grad():
            return model(TOKENS[:n])

    def generate(n):
        return theirs.generate(TOKENS[:n, : 3 * n], use_cache=False, **SETTINGS)

    with steer(model, [strong("prompt")]), steer(theirs, [strong("generated")]):
        for read in (host, generate):
            alone = [read(n) for n in (1, 2, 3)]
            with ThreadPoolExecutor(3) as pool:
                for n, found in zip((1, 2, 3) * 4, pool.map(read, (1, 2, 3) * 4), strict=True):
                    assert torch.equal(found, alone[n - 1])


def test_a_copy_made_within_stays_steered_and_runs_itself(theirs, expected):
    plain = generated(theirs)
    with steer(theirs, [strong("generated")]):
        copied = copy.deepcopy(theirs)
    assert torch.equal(generated(theirs), plain)
    assert torch.equal(generated(copied), expected)
    copied.lm_head.weight.data.neg_()
    assert not torch.equal(generated(copied), expected)


# Wrappers, compiled and checkpointed models ------------------------------------------------


class Adapted(nn.Module):
    """Passes everything on, as those of adapters do."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def generate(self, *args, **kwargs):
        return self.base.generate(*args, **kwargs)


@pytest.mark.parametrize("wrapper", [Adapted, lambda base: nn.ModuleDict({"base": base})])
def test_whichever_part_is_given_and_generates(theirs, expected, wrapper):
    wrapped = wrapper(theirs)
    generating = [theirs, *([wrapped] if hasattr(wrapped, "generate") else [])]
    for given in (theirs, wrapped):
        with steer(given, [strong("generated")]):
            for one in generating:
                assert torch.equal(generated(one), expected)


@pytest.mark.parametrize("part", ["model", "blocks"])
def test_what_was_compiled_before_is_steered(part):
    model = steered_model(shape=SMALL)
    plain = model(TOKENS)
    with steer(model, [strong("prompt")]):
        expected = model(TOKENS)
    compiled = torch.compile(model, backend="eager") if part == "model" else model
    if part == "blocks":
        for block in model.layers:
            block.compile(backend="eager")
    compiled(TOKENS)
    for given in (model, compiled):
        with steer(given, [strong("prompt")]):
            torch.testing.assert_close(compiled(TOKENS), expected, rtol=0, atol=1e-9)
        torch.testing.assert_close(compiled(TOKENS), plain, rtol=0, atol=1e-9)
    torch.compiler.reset()


def test_blocks_that_run_again_in_the_backward_pass():
    gradients = []
    for wrap in (lambda block: block, checkpoint_wrapper):
        model = steered_model(shape=SMALL).requires_grad_(True)
        for i, block in enumerate(model.layers):
            model.layers[i] = wrap(block)
        with steer(model, [strong("all")]):
            model(TOKENS).square().mean().backward()
        gradients.append([one.grad for one in model.parameters()])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    with steer(model, [strong("prompt")]):
        loss = model(TOKENS).square().mean()
        with pytest.raises(ConfigError, match="does not tell"):  # and not another gradient
            loss.backward()


def test_weights_that_are_stored_in_another_shape(theirs):
    packed = copy.deepcopy(theirs)
    for layer in packed.model.layers:  # as quantizing does
        layer.mlp.gate_proj.weight = nn.Parameter(layer.mlp.gate_proj.weight.reshape(-1, 1))
    for dense in (False, True):
        assert steerable(packed, dense) == steerable(theirs, dense)


# Settings of generate ----------------------------------------------------------------------


def test_a_cache_of_fixed_size(theirs, expected):
    with steer(theirs, [strong("generated")]):
        assert torch.equal(generated(theirs, True, cache_implementation="static"), expected)


def test_a_mask_with_the_empty_slots_of_a_cache(theirs):
    with torch.no_grad(), steer(theirs, [strong(MASK)]):
        expected = generated(theirs, True)
        cache, text, step = StaticCache(config=theirs.config, max_cache_len=20), TOKENS, TOKENS
        for _ in range(6):
            out = theirs(
                step, attention_mask=(torch.arange(20) < text.shape[1]).long().expand(3, 20),
                position_ids=torch.arange(text.shape[1])[None, -step.shape[1] :], cache=cache,
            )  # fmt: skip
            step = out.logits[:, -1:].argmax(-1)
            text = torch.cat((text, step), dim=1)
    assert torch.equal(text, expected)


def test_what_an_assistant_proposes_is_no_prompt(theirs, expected):
    with steer(theirs, [strong("generated")]):
        for how in ({"assistant_model": theirs}, {"prompt_lookup_num_tokens": 3}):
            found = theirs.generate(TOKENS[:1], **SETTINGS, **how)
            assert torch.equal(found, expected[:1])


def test_generating_while_generating(theirs, expected):
    def other(_, scores):
        theirs.generate(TOKENS[:1, :4], use_cache=False, max_new_tokens=2, pad_token_id=0)
        return scores

    with steer(theirs, [strong("generated")]):
        found = generated(theirs, logits_processor=LogitsProcessorList([other]))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("settings", [{"prefill_chunk_size": 4}, {"guidance_scale": 2.0}])
def test_settings_with_which_a_prompt_cannot_be_told(theirs, settings):
    (name,) = settings
    with (
        steer(theirs, [strong("generated")]),
        pytest.raises(ConfigError, match=f"{name}=.*leave it out, or steer with where='all'"),
    ):
        generated(theirs, True, **settings)
    with steer(theirs, [strong("all")]):
        generated(theirs, True, **settings)
