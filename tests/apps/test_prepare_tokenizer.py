"""The tokenizer that prepare trains gives every text back, and is the same every time."""

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from apps.topk.corpus.tokenizer import bytes_per_token, train_tokenizer, vocabulary
from lingua_topk.errors import DataError

DOCUMENTS = [
    f"The harbour was quiet on day {day}.\n\n  Nobody\tspoke of the storm — naïve as it was."
    for day in range(30)
]
SIZE = 360
MODEL = train_tokenizer(DOCUMENTS, SIZE)
TOKENIZER = sentencepiece.SentencePieceProcessor(model_proto=MODEL)

# SentencePiece writes the space as U+2581, so that one character cannot come back.
any_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        " one space before",
        "one after ",
        "two  and   three spaces",
        "\ttabs\t\tand\n\nnewlines\r\n",
        "naïve — 漢字 🙂 \u00a0\u2028\u200b",
        "\x00\x01\x7f",
        "<s> </s> <unk> <0x0A>",
        "ﬁ ① \uff26 e\u0301",  # what normalisation would change
    ],
)
def test_text_comes_back_exactly(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@settings(max_examples=200, deadline=None)
@given(any_text)
def test_any_text_comes_back_exactly(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@settings(max_examples=50, deadline=None)
@given(any_text, any_text)
def test_texts_encoded_apart_decode_together(first, second):
    assert TOKENIZER.decode(TOKENIZER.encode(first) + TOKENIZER.encode(second)) == first + second


def test_ids_and_size():
    assert TOKENIZER.get_piece_size() == SIZE
    assert (TOKENIZER.unk_id(), TOKENIZER.bos_id(), TOKENIZER.eos_id()) == (0, 1, 2)
    assert sum(TOKENIZER.is_byte(i) for i in range(SIZE)) == 256
    assert TOKENIZER.unk_id() not in TOKENIZER.encode("漢 \x00 🙂")


def test_numbers_are_spelled_digit_by_digit():
    pieces = TOKENIZER.encode("2024", out_type=str)
    assert [piece.strip("▁") for piece in pieces if piece.strip("▁")] == list("2024")


def test_training_is_deterministic_and_silent(capfd):
    assert train_tokenizer(iter(DOCUMENTS), SIZE) == MODEL
    with pytest.raises(DataError):
        train_tokenizer(DOCUMENTS, 100_000)
    assert capfd.readouterr() == ("", "")


def test_long_lines_are_learned_from():
    line = "harbour " * 5_000  # longer than SentencePiece takes
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=train_tokenizer([line], 272))
    assert "harbour" in tokenizer.encode(line, out_type=str)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (100_000, r"vocab_size=100000 is more than the training text gives: at most \d+ here"),
        (5, r"vocab_size=5 is too few for the bytes and characters of the text: at least \d+ here"),
    ],
)
def test_sizes_that_the_text_does_not_allow(size, message):
    with pytest.raises(DataError, match=message):
        train_tokenizer(DOCUMENTS, size)


def test_the_smallest_and_largest_named_sizes_are_right():
    for size, word in ((100_000, "at most "), (5, "at least ")):
        with pytest.raises(DataError) as error:
            train_tokenizer(DOCUMENTS, size)
        limit = int(str(error.value).split(word)[1].split()[0])
        model = train_tokenizer(DOCUMENTS, limit)
        assert sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size() == limit


def test_vocabulary_lists_the_pieces_in_order():
    *lines, last = vocabulary(MODEL).split("\n")
    assert last == ""
    assert [line.rsplit("\t", 1)[0] for line in lines] == [
        TOKENIZER.id_to_piece(i) for i in range(SIZE)
    ]


def test_bytes_per_token_counts_all_documents_up_to_the_limit():
    n_tokens = [len(TOKENIZER.encode(text)) for text in DOCUMENTS]
    n_bytes = [len(text.encode()) for text in DOCUMENTS]
    assert bytes_per_token(MODEL, DOCUMENTS) == sum(n_bytes) / sum(n_tokens)
    assert bytes_per_token(MODEL, DOCUMENTS, max_bytes=1) == n_bytes[0] / n_tokens[0]


def test_ctrl_c_anywhere_in_the_text_is_no_error_of_sentencepiece():
    class Interrupted(str):
        def split(self, *arguments):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_tokenizer([Interrupted("a")], 300)
