"""The rows that neurons are read on: documents as training packs them, and what tokens spell."""

import json
import re

import numpy as np
import pytest

from apps.topk.checkpoint import open_checkpoint
from apps.topk.neurons.corpus import rows_of_corpus, token_pieces
from lingua_topk.analysis.words import words_of
from lingua_topk.errors import ConfigError, DataError
from tests.apps.real_text import SEQ_LEN, train_on, write_stories
from tests.apps.small_models import TOKENIZERS, WORDS, make_tokenizer

TEXTS = [WORDS * 2, "Größe, naïveté: 漢字 and\n\n  don't (“quoted”) 12 🙂 x\ty", "the storm"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = write_stories(tmp_path_factory.mktemp("corpus"))
    return root, open_checkpoint(train_on(root, root / "run", "steps=2"))


def held_out(root):
    lines = (root / "text" / "text.val.jsonl").read_text().splitlines()
    return [json.loads(line)["text"] for line in lines]


def test_rows_are_the_documents_one_after_another(run):
    root, checkpoint = run
    tokenizer = checkpoint.tokenizer()
    stream = [
        token
        for text in held_out(root)
        for token in tokenizer.encode(text, add_bos=True, add_eos=True)
    ]
    rows = rows_of_corpus(checkpoint, [], 10**9)
    assert rows.tokens.dtype == np.int32
    assert rows.tokens.shape == (len(stream) // SEQ_LEN, SEQ_LEN)
    assert rows.tokens.reshape(-1).tolist() == stream[: rows.tokens.size]
    assert rows.describe() == {
        "sources": {"text": len(held_out(root))}, "rows": len(rows.tokens),
        "row_length": SEQ_LEN, "tokens": rows.tokens.size,
    }  # fmt: skip


def test_no_more_is_read_than_is_asked_for(run):
    root, checkpoint = run
    rows = rows_of_corpus(checkpoint, [], 20 * 32 + 31, row_length=32)
    assert rows.tokens.shape == (20, 32)
    assert 0 < rows.sources["text"] < len(held_out(root))
    whole = rows_of_corpus(checkpoint, [], 10**9)
    assert rows.tokens.reshape(-1).tolist() == whole.tokens.reshape(-1)[:640].tolist()


def test_other_text_by_name(run, tmp_path):
    _, checkpoint = run
    (tmp_path / "mine.txt").write_text("\n\n".join(held_out(run[0])))
    rows = rows_of_corpus(checkpoint, [str(tmp_path / "mine.txt")], 2000)
    assert list(rows.sources) == ["mine.txt"]


def test_sources_are_read_in_turn(run, tmp_path):
    """Else the first, where it is long enough, would be all that is read."""
    _, checkpoint = run
    one, other = (
        write_lines(tmp_path / name, [f"{name} {i} " + WORDS * 4 for i in range(n)])
        for name, n in (("one.jsonl", 9), ("other.jsonl", 2))
    )
    rows = rows_of_corpus(checkpoint, [one, other], 10**9)
    assert rows.sources == {"one.jsonl": 9, "other.jsonl": 2}
    text = b"".join(rows.pieces[i] for i in rows.tokens.reshape(-1)).decode(errors="ignore")
    names = re.findall(r"(one|other)\.jsonl", text)
    assert names[:6] == ["one", "other", "one", "other", "one", "one"]


def write_lines(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.mark.parametrize(
    "tokens, row_length, said",
    [(100, None, "tokens=100 is too few"), (9999, 1, "row_length=1 is not allowed"),
     (9999, SEQ_LEN + 1, f"give 2 to {SEQ_LEN}")],
)  # fmt: skip
def test_what_is_not_allowed(run, tokens, row_length, said):
    with pytest.raises(ConfigError, match=said):
        rows_of_corpus(run[1], [], tokens, row_length)


def test_too_little_text(run, tmp_path):
    (tmp_path / "short.txt").write_text("Anna.")
    with pytest.raises(DataError, match="has 0 rows of 96 tokens"):
        rows_of_corpus(run[1], [str(tmp_path / "short.txt")], 2000)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_spell_the_text(name, tmp_path):
    """All pieces in a row are the text's bytes, but for the space that SentencePiece may add."""
    tokenizer = make_tokenizer(name, tmp_path)
    pieces = token_pieces(tokenizer, tokenizer.n_words + 5)
    assert len(pieces) == tokenizer.n_words + 5 and pieces[-5:] == [b""] * 5
    for text in TEXTS:
        ids = tokenizer.encode(text, add_bos=True, add_eos=True)
        spelled = b"".join(pieces[i] for i in ids).decode("utf-8")
        if name == "sp-prefix":  # it drops spaces at the ends and adds one in front
            spelled, text = " ".join(spelled.split()), " ".join(text.split())
        assert spelled.lstrip(" ") == text.lstrip(" ")


@pytest.mark.parametrize("name", TOKENIZERS)
def test_words_are_whole_whatever_the_pieces(name, tmp_path):
    tokenizer = make_tokenizer(name, tmp_path)
    ids = tokenizer.encode(" ".join(TEXTS), add_bos=True, add_eos=True)
    words = words_of(np.array([ids], dtype=np.int32), token_pieces(tokenizer, tokenizer.n_words))
    for word in ("harbour", "größe", "naïveté", "don't", "quoted", "storm"):
        assert word in words.words
