"""inference.hidden_states against the model's own forward, in float64."""

import pytest
import torch

from apps.topk.inference import CAUSAL, KVCache, hidden_states, visible, window_of
from tests.apps.small_models import SHAPES, small_model

TOLERANCE = {"rtol": 0, "atol": 1e-11}


@pytest.fixture(params=SHAPES)
def model(request):
    return small_model(**SHAPES[request.param])


def tokens(rows=3, length=17):
    return torch.randint(0, 258, (rows, length), generator=torch.Generator().manual_seed(1))


def in_order(x):
    return torch.arange(x.shape[1]).expand_as(x)


def mask_of(model, positions):
    return visible(positions, positions, window_of(model))


def test_the_logits_are_those_of_the_models_own_forward(model):
    x = tokens()
    h = hidden_states(model, x, in_order(x), mask_of(model, in_order(x)))
    assert h.shape == (3, 17, 32) and h.dtype == torch.float64
    torch.testing.assert_close(model.output(h), model(x), **TOLERANCE)


@pytest.mark.parametrize("name", sorted(set(SHAPES) - {"sliding"}))
def test_causal_is_the_mask_of_a_row_in_order(name):
    model, x = small_model(**SHAPES[name]), tokens()
    h = hidden_states(model, x, in_order(x), CAUSAL)
    torch.testing.assert_close(model.output(h), model(x), **TOLERANCE)


def test_positions_and_not_places_decide(model):
    x = tokens()
    generator = torch.Generator().manual_seed(2)
    orders = torch.stack([torch.randperm(17, generator=generator) for _ in range(3)])  # [B, S]
    h = hidden_states(model, x.gather(1, orders), orders, mask_of(model, orders))
    torch.testing.assert_close(model.output(h), model(x).gather(1, orders[..., None].expand(
        -1, -1, 258
    )), **TOLERANCE)  # fmt: skip


def test_what_is_masked_has_no_effect(model):
    """Two texts in one row behind a context that both see: each as if it were alone."""
    x = tokens(1, 12)
    segments = torch.tensor([[0] * 4 + [1] * 5 + [2] * 3])
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8, 4, 5, 6]])
    own = segments[:, :, None] == segments[:, None, :]
    mask = mask_of(model, positions) & ((segments == 0)[:, None] | own)
    logits = model.output(hidden_states(model, x, positions, mask))
    torch.testing.assert_close(logits[:, :9], model(x[:, :9]), **TOLERANCE)
    second = torch.cat((x[:, :4], x[:, 9:]), dim=1)
    torch.testing.assert_close(logits[:, 9:], model(second)[:, 4:], **TOLERANCE)


@pytest.mark.parametrize("sizes", [(17,), (1,) * 17, (5, 1, 7, 4), (16, 1)])
def test_a_cache_is_filled_in_pieces(model, sizes):
    x, cache, found = tokens(), KVCache(3, 20), []
    for piece, positions in zip(x.split(sizes, 1), in_order(x).split(sizes, 1), strict=True):
        slots = torch.arange(positions.max() + 1)[None]
        mask = visible(positions, slots, window_of(model))
        found.append(hidden_states(model, piece, positions, mask, cache))
    torch.testing.assert_close(model.output(torch.cat(found, 1)), model(x), **TOLERANCE)


def test_rows_of_a_cache_that_are_kept_go_on_in_their_new_order(model):
    x, cache = tokens(4, 12), KVCache(3, 12)
    lengths = torch.tensor([3, 7, 9, 5])
    start = in_order(x)[:, :9]
    hidden_states(model, x[:, :9], start, mask_of(model, start[:1]), cache)
    kept = torch.tensor([3, 1])
    cache.keep_rows(kept)
    x, lengths = x[kept], lengths[kept]
    for step in range(3):  # what stands behind a row's last token is written over
        positions = (lengths + step)[:, None]
        mask = visible(positions, torch.arange(positions.max() + 1)[None], window_of(model))
        h = hidden_states(model, x.gather(1, positions), positions, mask, cache)
        for row, position in enumerate(positions[:, 0].tolist()):
            expected = model(x[row : row + 1, : position + 1])[0, -1]
            torch.testing.assert_close(model.output(h)[row, 0], expected, **TOLERANCE)


def test_visible():
    here = torch.tensor([[2, 0]])
    there = torch.tensor([[0, 1, 2, 3]])
    assert visible(here, there).int().tolist() == [[[1, 1, 1, 0], [1, 0, 0, 0]]]
    assert visible(here, there, window=2).int().tolist() == [[[0, 1, 1, 0], [1, 0, 0, 0]]]


def test_attention_is_the_models_own_again_after_an_exception():
    model, x = small_model(**SHAPES["residual"]), tokens()
    expected = model(x)

    def fail(*_):
        raise RuntimeError("stop here")

    hook = model.layers[1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="stop here"):
        hidden_states(model, x, in_order(x), CAUSAL)
    hook.remove()
    assert not any("forward" in vars(block.attention) for block in model.layers)
    assert torch.equal(model(x), expected)
