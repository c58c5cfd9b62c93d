"""Which documents are held out, and that it depends on their content and the seed alone."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apps.topk.corpus.draws import content_hash
from apps.topk.corpus.split import split
from lingua_topk.errors import DataError

TEXTS = [f"document number {number}" for number in range(200)]


def test_every_document_is_in_one_part():
    parts = split(TEXTS, 0.1, seed=0)
    assert len(parts.validation) == 20
    assert sorted(parts.train + parts.validation) == sorted(TEXTS)
    assert parts.duplicates == 0


def test_the_order_of_reading_plays_no_part():
    documents = [*TEXTS, *(text.replace(" ", "  ") for text in TEXTS[:50])]
    expected = split(documents, 0.1, seed=3)
    for seed in range(3):
        random.Random(seed).shuffle(documents)
        assert split(documents, 0.1, seed=3) == expected


def test_duplicates_are_dropped_before_the_split():
    documents = [variant for text in TEXTS for variant in (text, f" {text}\n", text + "\u00a0")]
    parts = split(documents, 0.5, seed=0)
    assert parts.duplicates == 400
    words = [" ".join(text.split()) for text in parts.train + parts.validation]
    assert sorted(words) == sorted(TEXTS)


def test_seeds_differ_and_documents_are_shuffled():
    first, second = split(TEXTS, 0.1, seed=0), split(TEXTS, 0.1, seed=1)
    assert set(first.validation) != set(second.validation)
    assert first.train != sorted(first.train)
    both = [text for text in first.train if text in second.train]
    assert both != [text for text in second.train if text in first.train]


def test_the_order_of_training_does_not_follow_the_draw_for_validation():
    # With one draw for both, a larger share would take the first training documents.
    small, large = split(TEXTS, 0.1, seed=0), split(TEXTS, 0.2, seed=0)
    assert set(small.validation) < set(large.validation)
    moved = set(large.validation) - set(small.validation)
    assert moved != set(small.train[: len(moved)])


@given(st.integers(2, 50), st.floats(0, 1, exclude_min=True, exclude_max=True))
def test_a_share_and_never_all(count, share):
    parts = split(TEXTS[:count], share, seed=0)
    assert parts.train and parts.validation
    assert abs(len(parts.validation) - share * count) <= 1


def test_a_cap():
    parts = split(TEXTS, 0.5, seed=0, val_documents=7)
    assert parts.validation == split(TEXTS, 0.5, seed=0).validation[:7]
    assert sorted(parts.train + parts.validation) == sorted(TEXTS)


@pytest.mark.parametrize("documents", [[], ["one"], ["one two", "one\ntwo"]])
def test_fewer_than_two_documents(documents):
    with pytest.raises(DataError, match=r"holds [01] distinct document"):
        split(documents, 0.5, seed=0)


def test_words_and_their_order_make_the_hash():
    assert content_hash("a b") == content_hash("\ta \n b ")
    assert len({content_hash(text) for text in ("a b", "b a", "ab", "A b", "a b b")}) == 5
