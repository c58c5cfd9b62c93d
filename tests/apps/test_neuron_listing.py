"""A few neurons by name: of those that their words tell about, the most extreme."""

import numpy as np

from apps.topk.neurons.folder import MeasuredLayer
from apps.topk.neurons.listing import describe, extreme_neurons

WORDS = ["to", "can", "may", "the", "\x1b[31m"]


def layer(index, is_topk=True, **arrays):
    n = len(WORDS)
    found = {
        "n_with_vector": np.full(n, 9), "coverage": np.ones(n),
        "mono_score": np.array([0.9, 0.5, 0.4, 0.1, np.nan]),
        "semantic_entropy": np.array([np.nan, 1.5, 1.0, 2.0, 3.0]),
        "shuffled_mono_score": np.full(n, 0.05), "shuffled_semantic_entropy": np.full(n, 2.5),
    }  # fmt: skip
    words = [[(word, 1.0), ("x", 0.5)] for word in WORDS]
    return MeasuredLayer(
        index, is_topk, "survivors", 100, found | arrays, words, [[] for _ in words]
    )


def test_the_most_extreme_come_first_and_unscored_ones_never():
    found = extreme_neurons([layer(2)], "semantic_entropy", 2)
    assert found == [(2, 2, 1.0, ["may", "x"]), (2, 1, 1.5, ["can", "x"])]
    assert [one[1] for one in extreme_neurons([layer(2)], "mono_score", 9, True)] == [0, 1, 2, 3]


def test_a_neuron_that_mostly_fires_on_no_word_is_not_named():
    """Its score comes from one word that holds a hundredth of what it does."""
    few = layer(1, n_with_vector=np.array([1, 9, 9, 9, 9]))
    elsewhere = layer(1, coverage=np.array([0.01, 1, 1, 1, 1]))
    for one in (few, elsewhere):
        assert extreme_neurons([one], "mono_score", 1, True)[0][1] == 1


def test_layers_without_topk_are_left_out():
    assert extreme_neurons([layer(0, is_topk=False)], "mono_score", 3, True) == []


def test_what_is_shown_is_harmless_and_names_the_control():
    text = describe([layer(3)], 4)
    assert "on shuffled tokens the median is 2.5" in text
    assert "0.05" in text and "\x1b" not in text and "\\x1b[31m, x" in text
    assert "no neuron has enough words for semantic entropy" in describe(
        [layer(3, coverage=np.zeros(len(WORDS)))]
    )
