"""The words that tell a neuron apart, against the formula written out in loops."""

import math

import numpy as np
import pytest
import torch

from lingua_topk.analysis.distinctive import distinctive_words
from lingua_topk.analysis.words import Words
from tests.analysis.recorded import TOKENS, Fake, recorded, sparse

WORDS = ["the", "sea", "harbour", "storm"]


@pytest.fixture(scope="module")
def words():
    index = np.random.default_rng(3).integers(-1, len(WORDS), TOKENS.numel(), dtype=np.int32)
    return Words(WORDS, index)


@pytest.fixture(scope="module")
def outputs():
    return sparse(seed=4)


@pytest.fixture(scope="module")
def blocks(outputs, tmp_path_factory):
    fake = Fake({0: outputs})
    recording = recorded(fake, tmp_path_factory.mktemp("recording") / "r")
    return list(recording.layer(0).blocks())


def plain(y, words, neuron):
    """[(word, bits, mean)] of one neuron, y [N, S, D]."""
    values = [float(v) for v in y.reshape(-1, y.shape[-1])[:, neuron]]
    total = sum(abs(v) for v in values)
    found = []
    for i, word in enumerate(words.words):
        mine = [v for v, at in zip(values, words.index, strict=True) if at == i and v != 0]
        if not mine:
            continue
        p = sum(abs(v) for v in mine) / total
        q = sum(at == i for at in words.index) / len(words.index)
        bits = p * math.log2(p / q)
        if bits > 0:
            found.append((word, bits, sum(mine) / len(mine)))
    return sorted(found, key=lambda one: -one[1])


def test_they_are_by_the_formula(blocks, outputs, words):
    found = [some for block in blocks for some in distinctive_words(block, words)]
    assert len(found) == outputs.shape[-1]
    assert found[2] == []  # never fires
    for neuron, some in enumerate(found):
        expected = plain(outputs, words, neuron)
        assert [one.word for one in some] == [word for word, _, _ in expected]
        for one, (_, bits, mean) in zip(some, expected, strict=True):
            assert one.bits == pytest.approx(bits, rel=1e-5)
            assert one.mean == pytest.approx(mean, rel=1e-5)
    assert any(one.mean < 0 for some in found for one in some)


def test_at_most_so_many(blocks, words):
    whole = [some for block in blocks for some in distinctive_words(block, words)]
    found = [some for block in blocks for some in distinctive_words(block, words, 1)]
    assert [some[:1] for some in whole] == found
    assert max(map(len, whole)) > 1


def test_a_rare_word_with_the_largest_value_does_not_come_first(tmp_path):
    y = torch.zeros(7, 6, 10)
    y[:3, :, 0] = 1.0  # at the 18 places of "sea"
    y[6, 5, 0] = 2.0  # once, at one of the two of "storm"
    index = np.zeros(TOKENS.numel(), dtype=np.int32)
    index[:18], index[40:] = 1, 3
    recording = recorded(Fake({0: y}), tmp_path / "r")
    first = distinctive_words(next(iter(recording.layer(0).blocks())), Words(WORDS, index))[0]
    assert [one.word for one in first] == ["sea", "storm"]


def test_no_words_at_all(blocks):
    nothing = Words([], np.full(TOKENS.numel(), -1, dtype=np.int32))
    assert all(some == [] for some in distinctive_words(blocks[0], nothing))
