"""Text that is let out token by token is the text of all tokens, up to a stop string."""

import tempfile
from functools import cache
from itertools import chain
from os import path
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apps.topk.stopping import TextStream
from tests.apps.small_models import TOKENIZERS, make_tokenizer

TEXT = "the 漢字 was\n\n naïve 🙂🙂 \\xe6 \ufffd  day, the storm\x1b[0m"


@cache
def tokenizer_of(name):
    with tempfile.TemporaryDirectory() as folder:
        return make_tokenizer(name, Path(folder))


def stream_of(tokenizer, prompt, tokens, stop=()):
    """The stream after all tokens, or those up to a stop string, and its pieces."""
    stream = TextStream(tokenizer.decode, prompt, stop)
    pieces = []
    for token in tokens:
        pieces.append(stream.add(token))
        if stream.is_stopped:
            break
    pieces.append(stream.finish())
    assert stream.text == "".join(pieces)
    return stream, pieces


def added(tokenizer, prompt, tokens):
    before, whole = tokenizer.decode(prompt), tokenizer.decode([*prompt, *tokens])
    return whole[len(path.commonprefix((before, whole))) :]  # noqa: RUF071 (these are no paths)


@st.composite
def cases(draw):
    """A tokenizer, ids of a prompt and ids that follow it: of text, of noise, or of both."""
    tokenizer = tokenizer_of(draw(st.sampled_from(TOKENIZERS)))
    parts = st.one_of(
        st.text(max_size=8),
        st.sampled_from([TEXT, "漢字", "the ", " ", "🙂", "\\xe6", "\ufffd", "\n\n"]),
    ).map(lambda text: tokenizer.encode(text, False, False))
    noise = st.lists(st.integers(0, tokenizer.n_words - 1), max_size=5)
    ids = list(chain.from_iterable(draw(st.lists(st.one_of(parts, noise), max_size=6))))
    cut = draw(st.integers(0, len(ids)))
    return tokenizer, ids[:cut], ids[cut:]


@settings(max_examples=600, deadline=None)
@given(cases())
def test_the_pieces_are_the_text(case):
    stream, _ = stream_of(*case)
    assert stream.text == added(*case)
    assert not stream.is_stopped


@settings(max_examples=600, deadline=None)
@given(cases(), st.data())
def test_one_stop_string(case, data):
    whole = added(*case)
    inside = st.tuples(st.integers(0, len(whole)), st.integers(1, 6)).map(
        lambda place: whole[place[0] : place[0] + place[1]]
    )
    stop = data.draw(st.one_of(inside.filter(bool), st.text(min_size=1, max_size=3)) if whole
                     else st.text(min_size=1, max_size=3))  # fmt: skip
    stream, _ = stream_of(*case, [stop])
    place = whole.find(stop)
    assert stream.text == (whole if place < 0 else whole[:place])
    assert stream.is_stopped == (place >= 0)


@settings(max_examples=400, deadline=None)
@given(cases(), st.data())
def test_several_stop_strings(case, data):
    whole = added(*case)
    some = st.text(alphabet=sorted(set(whole)) or "ab", min_size=1, max_size=4)
    stop = data.draw(st.lists(some, min_size=1, max_size=4))
    stream, _ = stream_of(*case, stop)
    assert whole.startswith(stream.text)
    assert not any(one in stream.text for one in stop)
    rest = whole[len(stream.text) :]
    assert any(rest.startswith(one) for one in stop) if stream.is_stopped else not rest


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_character_comes_whole(name):
    tokenizer = tokenizer_of(name)
    prompt, tokens = tokenizer.encode("a", True, False), tokenizer.encode(" 漢🙂b", False, False)
    _, pieces = stream_of(tokenizer, prompt, tokens)
    assert [piece for piece in pieces if piece.strip()] == ["漢", "🙂", "b"]


def test_no_more_is_held_back_than_could_be_a_stop_string():
    tokenizer = tokenizer_of("bytes")
    _, pieces = stream_of(tokenizer, [256], b"ab\n\nQab", ["\n\nQ:", "abc"])
    assert pieces == ["", "", "ab", "", "", "\n\nQ", "", "ab"]
    stream, pieces = stream_of(tokenizer, [256], b"x\n\nQ:y", ["\n\nQ:", "abc"])
    assert (pieces, stream.is_stopped) == (["x", "", "", "", "", ""], True)


def test_a_stop_string_in_the_middle_of_a_token():
    tokenizer = tokenizer_of("tiktoken")
    tokens = tokenizer.encode(" quiet", False, False)
    assert [tokenizer.decode([token]) for token in tokens[:2]] == [" q", "ui"]
    stream, _ = stream_of(tokenizer, [], tokens, ["u"])
    assert (stream.text, stream.is_stopped) == (" q", True)


def test_the_first_of_overlapping_stop_strings_counts():
    tokenizer = tokenizer_of("tiktoken")
    assert (
        stream_of(tokenizer, [], tokenizer.encode("the", False, False), ["e", "he"])[0].text == "t"
    )
    assert stream_of(tokenizer, [], list(b"aab"), ["ab"])[0].text == "a"


def test_a_stop_string_does_not_begin_in_the_prompt():
    tokenizer = tokenizer_of("bytes")
    stream, _ = stream_of(tokenizer, list(b"a\n"), list(b"\nb"), ["\n\n"])
    assert (stream.text, stream.is_stopped) == ("\nb", False)


def test_what_is_held_back_in_the_end_may_be_a_stop_string():
    tokenizer = tokenizer_of("bytes")
    stream, _ = stream_of(tokenizer, [], [97, 0xE6], ["xe6"])
    assert (stream.text, stream.is_stopped) == ("a\\", True)


def test_spaces_that_follow_a_space_are_kept():
    """A model of SentencePiece's defaults drops all spaces that a text begins with."""
    tokenizer = tokenizer_of("sp-prefix")
    space, word = (tokenizer.sp_model.piece_to_id(piece) for piece in ("\u2581", "\u2581the"))
    assert tokenizer.decode([space, space, word]) == "the"
    case = tokenizer, [1, word], [space, space, word, space, word, word]
    stream, pieces = stream_of(*case)
    assert stream.text == added(*case) == "   the  the the"
    assert pieces == [" ", " ", " the", " ", " the", " the", ""]
