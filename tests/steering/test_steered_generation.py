"""The same tokens whoever generates: with a cache or without, in a batch or alone, ours or theirs.

In float64, for all interventions and all places, against greedy search in a model that is written
out in plain torch. Then float32, where a near-tie at the threshold may swap a neuron: that is
counted, and every text that differs is traced to one.
"""

import pytest
import torch

from apps.topk.generation import Generator
from apps.topk.sampling import Sampling
from lingua.tokenizer import ByteTokenizer
from lingua_topk.steering import Add, steer, steerable
from tests.apps.near_ties import least_gap
from tests.steering.plain_model import plain_greedy
from tests.steering.steered_models import (
    KINDS,
    SITES,
    SMALL,
    WHERE,
    exported,
    places_of,
    plain_args,
    steered_model,
)  # fmt: skip

TEXTS = ["The harbour", "a", "Every good boy did", "xyz"]
ALONE = TEXTS[:2]  # a long one and a short one
LENGTH = 6
LAYER = 0
STRONG = (3, 5, 7, 9)  # neurons
GREEDY = Sampling(max_tokens=LENGTH, ignore_eos=True)
DRAWN = Sampling(max_tokens=LENGTH, ignore_eos=True, temperature=0.9, top_k=50, seed=5)
NEAR_TIE = 1e-5


@pytest.fixture(scope="module", params=SITES)
def site(request):
    return request.param


@pytest.fixture(scope="module")
def model(site):
    return steered_model(site, SMALL)


@pytest.fixture(scope="module")
def theirs(model, site):
    return exported(model, site, SMALL)


def prompts_of(tokenizer):
    return [tokenizer.encode(text, True, False) for text in TEXTS]


def banned(tokenizer):
    return [tokenizer.bos_id, tokenizer.eos_id]


def ours(model, sampling=GREEDY, texts=TEXTS, **how):
    generator = Generator(model, ByteTokenizer(), **how)
    return [one.tokens for one in generator.generate(texts, sampling)]


def generated_by_theirs(theirs, prompts, use_cache):
    """Of left-padded prompts, in one batch."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(one)) + one for one in prompts])
    mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in prompts])
    found = theirs.generate(
        ids, attention_mask=mask, max_new_tokens=LENGTH, do_sample=False, pad_token_id=0,
        use_cache=use_cache, suppress_tokens=banned(ByteTokenizer()),
    )  # fmt: skip
    return found[:, longest:].tolist()


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("before_selection", [False, True], ids=["after", "before"])
@pytest.mark.parametrize("kind", KINDS)
def test_all_generate_the_same(model, theirs, site, kind, before_selection, where):
    prompts = prompts_of(ByteTokenizer())
    make, edit = KINDS[kind]
    width = steerable(model)[LAYER]
    one = make(LAYER, width, where=WHERE[where], before_selection=before_selection)

    def greedy(prompt, tokens):
        def edited(layer, x):
            return edit(x, places_of(where, len(prompt), len(x))) if layer == LAYER else x

        edits = {"before" if before_selection else "after": edited}
        return plain_greedy(
            model.state_dict(), prompt, tokens, banned(ByteTokenizer()), plain_args(site, SMALL),
            **edits,
        )  # fmt: skip

    with steer(model, [one]):
        expected = ours(model)
        assert ours(model, use_cache=False) == expected
        assert ours(model, batch_tokens=60) == expected  # two at a time
        alone = ours(model, texts=ALONE, batch_tokens=7)  # and the prompts in pieces of 7 tokens
        assert alone == expected[: len(ALONE)]
    assert list(map(greedy, prompts, expected)) == expected
    with steer(theirs, [one]):
        for use_cache in (True, False):
            assert generated_by_theirs(theirs, prompts, use_cache) == expected
        assert generated_by_theirs(theirs, prompts[:1], True) == expected[:1]
        assert generated_by_theirs(theirs, prompts[1:2], False) == expected[1:2]


@pytest.mark.parametrize("where", WHERE)
def test_drawn_texts_are_the_same(model, where):
    with steer(model, [Add(LAYER, STRONG, 6.0, where=WHERE[where])]):
        expected = ours(model, DRAWN, use_cache=False)
        for how in ({}, {"batch_tokens": 1}, {"batch_tokens": 60}):
            assert ours(model, DRAWN, **how) == expected
        again = ours(model, DRAWN)
    assert again == expected
    assert len({tuple(one) for one in expected}) == len(TEXTS)


def test_the_places_differ(model):
    """So that the table above is not one in which they do not matter."""
    texts = []
    for where in WHERE.values():
        with steer(model, [Add(LAYER, STRONG, 6.0, where=where)]):
            texts.append(ours(model))
    texts.append(ours(model))
    for i in range(len(TEXTS)):
        assert len({tuple(one[i]) for one in texts}) > 2


def test_the_first_generated_token_is_not_reached_by_what_acts_on_the_generated(model):
    with steer(model, [Add(LAYER, STRONG, 6.0, where="generated")]):
        steered = ours(model)
    plain = ours(model)
    assert [one[0] for one in steered] == [one[0] for one in plain]
    assert steered != plain


def test_a_mask_for_each_text_in_batches_of_any_size(model):
    masks = torch.rand(len(TEXTS), 20, generator=torch.Generator().manual_seed(4)) < 0.5
    expected = []
    for i, text in enumerate(TEXTS):
        with steer(model, [Add(LAYER, STRONG, 6.0, where=masks[i])]):
            expected += Generator(model, ByteTokenizer()).generate([text], GREEDY)
    with steer(model, [Add(LAYER, STRONG, 6.0, where=masks)]):
        for how in ({}, {"batch_tokens": 1}, {"batch_tokens": 60}, {"use_cache": False}):
            assert ours(model, **how) == [one.tokens for one in expected]


def test_beams_and_own_loops_of_theirs(theirs):
    tokenizer = ByteTokenizer()
    ids = torch.tensor(prompts_of(tokenizer)[:1])
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad(), steer(theirs, [Add(LAYER, STRONG, 6.0, where="generated")]):
        expected = theirs.generate(ids, **settings)
        # A loop of one's own, with a cache, is told apart by what the cache holds.
        step, out, found = ids, None, ids
        for _ in range(8):
            cache = {} if out is None else {"past_key_values": out.past_key_values}
            out = theirs(step, use_cache=True, **cache)
            step = out.logits[:, -1:].argmax(-1)
            found = torch.cat((found, step), dim=1)
        assert torch.equal(found, expected)
        with_cache = theirs.generate(ids, num_beams=3, **settings)
        assert torch.equal(
            theirs.generate(ids, num_beams=3, use_cache=False, **settings), with_cache
        )
    plain = theirs.generate(ids, num_beams=3, **settings)
    assert not torch.equal(plain, with_cache)


def test_in_float32_what_differs_is_traced_to_a_near_tie():
    model = steered_model(shape=SMALL).float()
    theirs = exported(steered_model(shape=SMALL), shape=SMALL).float()
    prompts = prompts_of(ByteTokenizer())
    flips = total = 0
    for neuron in range(0, 32, 4):
        one = Add(LAYER, neuron, 3.0)
        with steer(model, [one]), steer(theirs, [one]):
            ways = [
                ours(model), ours(model, batch_tokens=1), ours(model, use_cache=False),
                generated_by_theirs(theirs, prompts, True),
                generated_by_theirs(theirs, prompts, False),
            ]  # fmt: skip
            for texts in zip(prompts, *ways, strict=True):
                prompt, first, *others = texts
                total += len(others)
                for other in others:
                    if other != first:
                        flips += 1
                        common = next(
                            i for i, (a, b) in enumerate(zip(first, other, strict=True)) if a != b
                        )
                        assert least_gap(model, prompt + first[:common]) < NEAR_TIE
    assert total == 8 * 4 * 4
    assert flips <= total // 10
