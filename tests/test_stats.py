"""What fires, against a count by hand."""

import math

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager
from torch.utils.checkpoint import checkpoint

from lingua_topk.nn import TopK
from lingua_topk.stats import FiringStats

WIDTH = 6


def batch(seed: int, *shape: int) -> torch.Tensor:
    """Outputs of which about every third value is 0."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(*shape, WIDTH, generator=generator)
    return y * (torch.rand(y.shape, generator=generator) > 0.35)


def count_by_hand(batches) -> tuple[list[int], list[int]]:
    survivors = tokens = 0
    idle = [0] * WIDTH
    for y in batches:
        rows = y.reshape(-1, WIDTH).tolist()
        tokens += len(rows)
        survivors += sum(value != 0 for row in rows for value in row)
        for neuron in range(WIDTH):
            fired = any(row[neuron] != 0 for row in rows)
            idle[neuron] = 0 if fired else idle[neuron] + len(rows)
    return [survivors, tokens], idle


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 4), (2, 1, 3)], ids=str)
def test_counts(shape):
    batches = [batch(seed, *shape) for seed in range(5)]
    batches[2][..., 4] = batches[3][..., 4] = batches[4][..., 4] = 0.0
    stats = FiringStats(WIDTH, "cpu")
    for y in batches:
        stats.update(y)
    counts, idle = count_by_hand(batches)
    assert stats.counts.tolist() == counts and stats.idle.tolist() == idle
    assert idle[4] >= 3 * math.prod(shape)
    assert stats.l0 == counts[0] / counts[1]


def test_reset_counts_keeps_the_idle_counts():
    stats = FiringStats(WIDTH, "cpu")
    assert math.isnan(stats.l0)
    stats.update(torch.zeros(5, WIDTH))
    assert stats.l0 == 0.0
    stats.reset_counts()
    assert stats.counts.tolist() == [0, 0] and stats.idle.tolist() == [5] * WIDTH
    assert math.isnan(stats.l0)


def test_no_tokens_change_nothing():
    stats = FiringStats(WIDTH, "cpu")
    stats.update(torch.zeros(2, WIDTH))
    stats.update(torch.zeros(0, WIDTH))
    assert stats.counts.tolist() == [0, 2] and stats.idle.tolist() == [2] * WIDTH


def test_negative_values_and_nan_fire():
    stats = FiringStats(4, "cpu")
    stats.update(torch.tensor([[-1.0, math.nan, -0.0, 0.0]], dtype=torch.bfloat16))
    assert stats.counts.tolist() == [2, 1] and stats.idle.tolist() == [0, 0, 1, 1]


def test_counts_are_whole_beyond_what_float32_can_count():
    stats = FiringStats(WIDTH, "cpu")
    stats.idle.fill_(2**40)
    stats.counts.fill_(2**40)
    stats.update(torch.zeros(1, WIDTH))
    assert stats.idle.tolist() == [2**40 + 1] * WIDTH
    assert stats.counts.tolist() == [2**40, 2**40 + 1]


def counting_module() -> TopK:
    module = TopK(k=2)
    module.stats = FiringStats(WIDTH, "cpu")
    return module


def test_ties_are_seen_in_the_count():
    module = counting_module()
    module(torch.tensor([[3.0, 2.0, 2.0, 2.0, 1.0, 0.0]]))
    assert module.stats.l0 == 4.0


def test_it_counts_the_sum_and_in_both_modes():
    module = counting_module()
    h, update = batch(0, 4), batch(1, 4)
    for mode in (True, False):
        y = module.train(mode)(h, update)
    assert (module.stats.counts.tolist(), module.stats.idle.tolist()) == count_by_hand([y, y])
    assert torch.equal(y, TopK(k=2)(h + update))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_what_checkpointing_recomputes_is_counted_once(use_reentrant):
    module = counting_module()
    x = batch(0, 4).requires_grad_()
    # exp saves its output, for which everything before it is computed again.
    y = checkpoint(lambda x: module(x).exp(), x, use_reentrant=use_reentrant)
    y.sum().backward()
    assert x.grad.any()
    assert module.stats.counts[1] == 4 and module.stats.idle.max() <= 4


def test_compiled_it_counts_the_same_and_compiles_once():
    module, plain, compilations = counting_module(), counting_module(), []

    def backend(graph, inputs):
        compilations.append(graph)
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    for seed in range(4):
        x = batch(seed, 3).requires_grad_()
        plain(x)
        compiled(x).sum().backward()
    torch._dynamo.reset()
    assert torch.equal(module.stats.counts, plain.stats.counts)
    assert torch.equal(module.stats.idle, plain.stats.idle)
    assert len(compilations) == 1
