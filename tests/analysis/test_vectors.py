"""Vectors of words: files by hand, files that are wrong, a real file, and stand-ins for models."""

import gzip
import importlib
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from lingua_topk.analysis.vectors import (
    from_embeddings,
    from_sentence_transformer,
    from_text,
    read_vectors,
)
from lingua_topk.errors import ConfigError, DataError

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
GLOVE = DATA / "vectors" / "glove.6B.50d.head.txt"
GLOVE_TEXT = "the 3 4\ncat 0 -2\n"


@pytest.fixture
def write(tmp_path):
    def written(content: str | bytes, name: str = "vectors.txt") -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return written


@pytest.mark.parametrize(
    "content",
    [
        GLOVE_TEXT,
        f"2 2\n{GLOVE_TEXT}",
        "2 2\r\nthe 3 4 \r\ncat 0 -2 \r\n\r\n",  # word2vec ends lines in a space
        "the\t3\t4\ncat\t0\t-2",
        gzip.compress(GLOVE_TEXT.encode(), mtime=0),
    ],
    ids=["glove", "word2vec", "spaces", "tabs", "gzip"],
)
def test_text_by_hand(write, content):
    found = from_text(write(content), ["cat", "dog", "the"])
    np.testing.assert_allclose(found.vectors, [[0, -1], [0, 0], [0.6, 0.8]], atol=1e-7)
    assert found.found.tolist() == [True, False, True]
    assert found.vectors.dtype == np.float32 and found.found.dtype == bool
    assert found.source == "vectors.txt (2 dimensions)"


def test_the_first_of_equal_lines_counts_and_the_exact_one_before_another_case(write):
    path = write("The 1 0\nTHE 0 1\nPARIS 0 1\nParis 1 0\nthe -1 0\nthe 0 -1\n")
    found = from_text(path, ["the", "paris"])
    assert found.vectors.tolist() == [[-1, 0], [0, 1]]


def test_words_of_a_file_that_hold_spaces_or_are_no_utf8_are_passed_over(write):
    found = from_text(write(b"the 1 0\n. . . 1 2\nat a@b.c 1 2\n\xff\xfe 1 2\nna\xc3\xafve 0 1"),
                      ["the", "na\u00efve"])  # fmt: skip
    assert found.vectors.tolist() == [[1, 0], [0, 1]]


def test_zeros_are_no_vector_and_any_size_is_scaled(write):
    found = from_text(write("a 0 0\nb 1e30 1e30\nc 1e-30 0\n"), ["a", "b", "c"])
    assert found.found.tolist() == [False, True, True]
    np.testing.assert_allclose(found.vectors, [[0, 0], [0.5**0.5] * 2, [1, 0]], rtol=1e-6)


def test_numbers_of_other_words_are_not_read(write):
    assert from_text(write("x nan one\nthe 1 0\n"), ["the"]).found.all()


def test_no_words_are_wanted(write):
    assert from_text(write(GLOVE_TEXT), []).vectors.shape == (0, 2)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("the 1 2\ncat 1\n", r"\.txt:2 has 1 numbers, the lines before have 2"),
        ("the 1 2\n\ncat 1 2 3\n", r"\.txt:3 has 3 numbers, the lines before have 2"),
        ("2 3\nthe 1 2\ncat 1 2\n", r"\.txt:2 has 2 numbers, the first line says 3"),
        ("3 2\nthe 1 2\ncat 1 2\n", r"\.txt has 2 vectors, its first line says 3"),
        ("1 2\nthe 1 2\ncat 1 2\n", r"\.txt has 2 vectors, its first line says 1"),
        ("the 1 2\ncat 1 two\n", r"\.txt:2 has 'two', which is no finite number"),
        ("the 1 nan\n", r"\.txt:1 has 'nan', which is no finite number"),
        ("the 1 -inf\n", r"\.txt:1 has '-inf', which is no finite number"),
        ("the 1 1e60\n", r"\.txt:1 has '1e60', which is no finite number"),
        ("dog 1 2\n", r"\.txt has a vector for none of the 2 words"),
        ("the 0 0\n", r"\.txt has a vector for none of the 2 words"),
        ("the\ncat\n", r"\.txt:1 has a word and no numbers"),
        ("", r"\.txt has no vector"),
        ("\n\n", r"\.txt has no vector"),
        ("0 5\n", r"\.txt has no vector"),
        (b"1 2\nthe " + np.float32([1, 2]).tobytes(), r"\.txt is not text: .* text form"),
        (gzip.compress(GLOVE_TEXT.encode() * 99, mtime=0)[:-12], r"\.txt cannot be read"),
        (b"\x1f\x8bno gzip", r"\.txt cannot be read"),
        (gzip.compress(b"the 1 2\n", mtime=0)[:10] + b"\xff\xff\xff", r"\.txt cannot be read"),
    ],
)
def test_files_that_are_wrong(write, content, says):
    with pytest.raises(DataError, match=says) as caught:
        from_text(write(content), ["the", "cat"])
    assert "\n" not in str(caught.value)


def test_a_word_of_one_token_has_its_embedding_and_others_have_none():
    """Two words that share a token would be alike by that alone."""
    embedding = torch.tensor([[3.0, 0], [0, 4], [-3, 0], [0, 0]], dtype=torch.bfloat16)
    tokens = {"ab": [0, 1], "a": [0], "gone": [0, 2], "zero": [3], "": []}
    found = from_embeddings(embedding, tokens.__getitem__, list(tokens))
    expected = [[0, 0], [1, 0], [0, 0], [0, 0], [0, 0]]
    np.testing.assert_allclose(found.vectors, expected, atol=1e-7)
    assert found.found.tolist() == [False, True, False, False, False]
    assert "circular" in found.source
    assert from_embeddings(embedding, tokens.__getitem__, []).vectors.shape == (0, 2)


def test_a_tokenizer_of_another_model():
    with pytest.raises(DataError, match="tokens 0 to 9, and the model has embeddings of 0 to 3"):
        from_embeddings(torch.ones(4, 2), lambda word: [0, 9], ["a"])


# ----- sentence-transformers -----


@pytest.fixture
def folder(tmp_path):
    """What is taken for a model; the stand-in for the package does not look into it."""
    (tmp_path / "mini").mkdir()
    (tmp_path / "mini" / "modules.json").write_text("[]")
    return tmp_path / "mini"


@pytest.fixture
def package(monkeypatch):
    """Stands in for sentence_transformers, which is not among our dependencies."""
    calls = types.SimpleNamespace(made=None, result=lambda words: [[3.0, 4.0]] * len(words))

    class SentenceTransformer:
        def __init__(self, model_name_or_path, **kwargs):
            calls.made = model_name_or_path, kwargs

        def encode(self, sentences, *, show_progress_bar):
            return np.array(calls.result(sentences))

    module = types.ModuleType("sentence_transformers")
    module.SentenceTransformer = SentenceTransformer
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    return calls


def test_a_local_model_without_downloads_or_foreign_code(folder, package):
    package.result = lambda words: [[0.0, len(word)] for word in words]
    found = from_sentence_transformer(folder, ["a", "bb", ""])
    assert found.vectors.tolist() == [[0, 1], [0, 1], [0, 0]]
    assert found.found.tolist() == [True, True, False]
    assert found.source == "mini (sentence-transformers)"
    path, settings = package.made
    assert path == str(folder) and settings["local_files_only"] is True
    assert settings["trust_remote_code"] is False
    assert settings["model_kwargs"] == {"use_safetensors": True}


def test_a_model_that_gives_no_numbers(folder, package):
    package.result = lambda words: [[1.0, np.nan if word == "b" else 0.0] for word in words]
    with pytest.raises(DataError, match="gives 'b' a vector with numbers that are not finite"):
        from_sentence_transformer(folder, ["a", "b"])


def test_a_model_that_cannot_be_loaded(folder, package, monkeypatch):
    def fail(*_, **__):
        raise OSError("no file\nnamed model.safetensors")

    monkeypatch.setattr(sys.modules["sentence_transformers"], "SentenceTransformer", fail)
    with pytest.raises(DataError, match=r"cannot be loaded .*\(no file named model\.safetensors\)"):
        from_sentence_transformer(folder, ["a"])


def test_the_package_is_not_there(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ConfigError, match="pip install sentence-transformers"):
        from_sentence_transformer(folder, ["a"])


def test_a_folder_that_is_no_model(tmp_path, package):
    with pytest.raises(ConfigError, match=r"has no modules\.json or config_sentence_transformers"):
        from_sentence_transformer(tmp_path, ["a"])
    assert package.made is None


@pytest.mark.slow
def test_the_package_itself(tmp_path):
    """With the package, a model with random weights, saved and read again."""
    package = pytest.importorskip("sentence_transformers")
    transformers = importlib.import_module("transformers")
    parts = importlib.import_module("sentence_transformers.sentence_transformer.modules")
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat", "dog"]
    (tmp_path / "vocab.txt").write_text("\n".join(names))
    config = transformers.BertConfig(
        vocab_size=len(names), hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=16,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    body = parts.Transformer(str(tmp_path / "bert"))
    model = package.SentenceTransformer(modules=[body, parts.Pooling(8)], device="cpu")
    model.save(str(tmp_path / "mini"))
    expected = model.encode(["cat", "dog"])
    found = from_sentence_transformer(tmp_path / "mini", ["cat", "dog"])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(found.vectors, expected, atol=1e-5)
    assert found.found.all() and abs(expected[0] - expected[1]).max() > 1e-3
    modules = json.loads((tmp_path / "mini" / "modules.json").read_text())
    modules[0]["type"] = "custom.Code"
    (tmp_path / "mini" / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "mini" / "custom.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nCode = 1")
    with pytest.raises(DataError, match="cannot be loaded"):
        from_sentence_transformer(tmp_path / "mini", ["cat"])
    assert not (tmp_path / "ran").exists()


# ----- which of them -----


def test_the_source_follows_what_is_given(write, folder, package):
    def read(spec):
        return read_vectors(spec, ["the"], torch.ones(1, 4), lambda word: [0])

    assert read("").vectors.shape == (1, 4)
    assert read(str(write(GLOVE_TEXT))).source.startswith("vectors.txt")
    assert read(str(folder)).source.startswith("mini")
    with pytest.raises(ConfigError, match=r"vectors='gone\.txt' is not there"):
        read("gone.txt")


# ----- real vectors -----


def read_pairs(path: Path) -> list[tuple[str, str, float]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [(a.lower(), b.lower(), float(score)) for a, b, score in map(str.split, lines)]


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks, ties at their mean; float64 [n]."""
    return np.array([(values < v).sum() + (values == v).sum() / 2 for v in values])


# Not SimLex, which sets the likeness of antonyms low: vectors of this kind agree little with it.
@pytest.mark.parametrize("name", ["EN-MEN-TR-3k.txt", "EN-WS-353-ALL.txt"])
def test_real_vectors_find_alike_what_people_do(name):
    human = DATA / "wordsim" / name
    if not (GLOVE.is_file() and human.is_file()):
        pytest.skip(f"{GLOVE} or {human} is absent")
    pairs = read_pairs(human)
    words = sorted({word for a, b, _ in pairs for word in (a, b)})
    found = from_text(GLOVE, words)
    assert found.vectors.shape == (len(words), 50)
    np.testing.assert_allclose(np.linalg.norm(found.vectors[found.found], axis=1), 1.0, atol=1e-6)
    row = {word: i for i, word in enumerate(words) if found.found[i]}
    there = [(a, b, score) for a, b, score in pairs if a in row and b in row]
    assert len(there) > 100
    cosines = np.array([found.vectors[row[a]] @ found.vectors[row[b]] for a, b, _ in there])
    scores = np.array([score for *_, score in there])
    assert np.corrcoef(ranks(cosines), ranks(scores))[0, 1] > 0.5
