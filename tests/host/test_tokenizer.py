"""lingua.tokenizer: text to ids and back, and which characters a token covers."""

import base64
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece

import lingua
from apps.topk.corpus.tokenizer import train_tokenizer
from lingua.errors import ConfigError, DataError
from lingua.tokenizer import (
    DEFAULT_TIKTOKEN_SPECIAL_TOKENS,
    TIKTOKEN_MAX_ENCODE_CHARS,
    MockTokenizer,
    TokenizerArgs,
    build_tokenizer,
)

HOST = Path(lingua.__file__).parents[1]
WORDS = "the harbour was quiet on the third day and nobody spoke of the storm "
MERGES = [b"th", b"the", b" q", b"ui", b"\xc3\xa9", b"42"]
RANKS = [bytes([byte]) for byte in range(256)] + MERGES
TEXTS = [
    "",
    "the harbour was quiet",
    " two  spaces\tand\r\nlines\n",
    "naïve: 漢字, 🙂 and é",
    "<|begin_of_text|> <s> </s> <unk>",
    "12345 isn't it?",
    "\x00\x7f",
]
NAMES = ("bytes", "mock", "sp", "tiktoken")


def rank_file(tokens) -> bytes:
    return b"".join(b"%s %d\n" % (base64.b64encode(t), rank) for rank, t in enumerate(tokens))


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> dict[str, str | None]:
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "sp.model").write_bytes(train_tokenizer([WORDS] * 3, 290))
    (folder / "ranks").write_bytes(rank_file(RANKS))
    return {
        "bytes": None,
        "mock": None,
        "sp": str(folder / "sp.model"),
        "tiktoken": str(folder / "ranks"),
    }


@pytest.fixture(params=NAMES)
def tokenizer(request, paths):
    return build_tokenizer(request.param, paths[request.param])


@pytest.fixture
def sp(paths):
    return build_tokenizer("sp", paths["sp"])


@pytest.fixture
def tiktoken(paths):
    return build_tokenizer("tiktoken", paths["tiktoken"])


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text, add_bos=False, add_eos=False)
    assert tokenizer.decode(ids) == text
    assert all(type(token) is int and 0 <= token < tokenizer.n_words for token in ids)


@pytest.mark.parametrize("name", ["bytes", "sp", "tiktoken"])
def test_bos_and_eos_frame_the_text_where_wanted(name, paths):
    tokenizer = build_tokenizer(name, paths[name])
    plain = tokenizer.encode("day", False, False)
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    assert not {bos, eos} & set(plain)
    assert tokenizer.encode("day", True, False) == [bos, *plain]
    assert tokenizer.encode("day", False, True) == [*plain, eos]
    assert tokenizer.encode("day", True, True) == [bos, *plain, eos]
    assert tokenizer.encode("", True, True) == [bos, eos]
    assert tokenizer.decode([bos, *plain, eos]) == "day"


def test_sizes_and_special_ids(paths):
    assert TokenizerArgs() == TokenizerArgs(name="bytes", path=None)
    found = {}
    for name in NAMES:
        tokenizer = build_tokenizer(name, paths[name])
        found[name] = (tokenizer.n_words, tokenizer.bos_id, tokenizer.eos_id)
    n_ranks = len(RANKS)
    assert found == {
        "bytes": (258, 256, 257),
        "mock": (256, None, None),
        "sp": (290, 1, 2),
        "tiktoken": (n_ranks + 256, n_ranks, n_ranks + 1),
    }


def test_tiktoken_names_its_special_tokens(tiktoken):
    n_ranks = tiktoken.n_ranks
    name = tiktoken.tkt_model.decode_single_token_bytes
    for special, place in DEFAULT_TIKTOKEN_SPECIAL_TOKENS.items():
        assert name(n_ranks + place).decode() == special
    assert name(n_ranks + 4) == b"<|reserved_special_token_0|>"
    assert len({name(n_ranks + place) for place in range(256)}) == 256


def test_special_tokens_are_not_recognised_in_text(tokenizer):
    text = "<|begin_of_text|></s>"
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(tokenizer.encode(text, False, False))


def test_tiktoken_merges_by_rank_and_splits_as_llama_3(tiktoken):
    ids = tiktoken.encode("the quiet 5142é", False, False)
    single = tiktoken.tkt_model.decode_single_token_bytes
    assert [single(token) for token in ids] == [
        *[b"the", b" q", b"ui", b"e", b"t", b" "],
        *[b"5", b"1", b"4", b"2"],  # the pattern cuts after three digits
        b"\xc3\xa9",
    ]


def test_tiktoken_encodes_long_texts_in_pieces(tiktoken):
    assert TIKTOKEN_MAX_ENCODE_CHARS == 400_000
    text = "t" * (TIKTOKEN_MAX_ENCODE_CHARS - 1) + "the"
    ids = tiktoken.encode(text, True, False)
    assert tiktoken.decode(ids) == text
    assert ids[-2:] == [RANKS.index(b"h"), RANKS.index(b"e")]  # "th" is cut apart


@pytest.mark.parametrize("text", TEXTS)
def test_offsets_cover_the_text_once(tokenizer, text):
    covered, offsets = tokenizer.get_token_offsets(text)
    assert "".join(covered) == text
    assert offsets == sorted(offsets)
    assert len(offsets) == len(tokenizer.encode(text, False, False))
    for part, offset in zip(covered, offsets, strict=True):
        assert text.startswith(part, offset)


def test_offsets_of_bytes_of_one_character(paths):
    tokenizer = build_tokenizer("bytes")
    assert tokenizer.get_token_offsets("hé🙂a") == (
        ["h", "", "é", "", "", "", "🙂", "a"],
        [0, 1, 1, 2, 2, 2, 2, 3],
    )


def test_offsets_of_sentencepiece_bytes_and_pieces(sp):
    covered, offsets = sp.get_token_offsets("the 漢 storm")
    at = covered.index("漢")
    assert covered[at + 1].startswith(" s")
    assert offsets[at + 1] == 5
    assert covered[at - 2 : at] == ["", ""]  # three bytes, and the last covers it
    assert offsets[at - 2 : at + 1] == [4, 4, 4]


@pytest.mark.parametrize("name", ["bytes", "sp", "tiktoken"])
def test_special_tokens_cover_nothing(name, paths):
    tokenizer = build_tokenizer(name, paths[name])
    text = "dé 漢"
    covered, offsets = tokenizer.get_token_offsets(text)
    framed = tokenizer.encode(text, True, True)
    assert tokenizer.get_token_offsets(text, framed) == (
        ["", *covered, ""],
        [0, *offsets, len(text)],
    )


@pytest.mark.parametrize("tokens", ["less", "more", "other", "negative"])
def test_offsets_of_the_tokens_of_another_text(tokenizer, tokens):
    text = "the quiet day"
    ids = tokenizer.encode(text, False, False)
    ids = {
        "less": ids[:-1],
        "more": [*ids, ids[0]],
        "other": ids[::-1],
        "negative": [*ids[:-1], -5],
    }[tokens]
    with pytest.raises(DataError, match=r"tokens .*text of 13 characters"):
        tokenizer.get_token_offsets(text, ids)


def test_offsets_after_normalisation_are_those_of_the_text_as_given(tmp_path):
    path = str(tmp_path / "nfkc")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([WORDS] * 3),
        model_prefix=path,
        vocab_size=30,
        hard_vocab_limit=False,
        minloglevel=3,
    )
    tokenizer = build_tokenizer("sp", path + ".model")
    text = "the  ﬁrst day"  # the ligature becomes two letters, two spaces one
    covered, offsets = tokenizer.get_token_offsets(text)
    assert "".join(covered).replace(" ", "") == text.replace(" ", "")
    for part, offset in zip(covered, offsets, strict=True):
        assert text.startswith(part, offset)
    assert offsets[-1] > text.index("d")


@pytest.mark.parametrize("text", ["\ud800", "day\udfffs", "🙂\udc00é"])
def test_a_lone_surrogate_becomes_the_replacement_character(tokenizer, text):
    mended = "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in text)
    ids = tokenizer.encode(text, add_bos=False, add_eos=False)
    assert tokenizer.decode(ids) == mended
    assert "".join(tokenizer.get_token_offsets(text)[0]) == mended


def test_ids_that_are_no_token_are_left_out_when_decoding(tokenizer):
    ids = tokenizer.encode("day", add_bos=False, add_eos=False)
    assert tokenizer.decode([-1, *ids, tokenizer.n_words, 10**9]) == "day"


def test_bytes_that_are_no_text_are_written_out():
    assert build_tokenizer("bytes").decode([97, 0xFF, 98]) == r"a\xffb"


def test_mock_passes_ids_through():
    assert MockTokenizer().encode([3, 1, 2]) == [3, 1, 2]
    assert MockTokenizer().encode("é", add_bos=True, add_eos=True) == [0xC3, 0xA9]


def test_a_model_without_bos_says_so_only_when_it_is_wanted(tmp_path):
    path = str(tmp_path / "plain")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([WORDS] * 3),
        model_prefix=path,
        vocab_size=30,
        hard_vocab_limit=False,
        bos_id=-1,
        eos_id=-1,
        minloglevel=3,
    )
    tokenizer = build_tokenizer("sp", path + ".model")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (None, None, -1)
    assert tokenizer.encode("the day", False, False)
    with pytest.raises(ConfigError, match=r"data\.add_bos=true.*no bos token"):
        tokenizer.encode("the day", True, False)
    with pytest.raises(ConfigError, match=r"data\.add_eos=true.*no eos token"):
        tokenizer.encode("the day", False, True)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"tokenizer\.name='gpt2'.*bytes, sp, tiktoken, mock"):
        build_tokenizer("gpt2")


@pytest.mark.parametrize("name", ["sp", "tiktoken"])
def test_a_model_file_is_needed(name, tmp_path):
    with pytest.raises(ConfigError, match=r"tokenizer\.path is not set"):
        build_tokenizer(name)
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(ConfigError, match=rf"tokenizer\.path={path} is not a file"):
            build_tokenizer(name, str(path))


@pytest.mark.parametrize("name", ["sp", "tiktoken"])
@pytest.mark.parametrize("content", [b"", b"\x00\xff\n", b"no model\n" * 9, b"YQ== x\n"])
def test_a_wrong_file_is_named(name, content, tmp_path):
    path = tmp_path / "wrong"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"tokenizer\.path={path}"):
        build_tokenizer(name, str(path))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (RANKS[:255], r"1 of the 256 bytes .*0xff"),
        (RANKS[:128], r"128 of the 256 bytes .*0x80"),
        ([*RANKS, b"th"], r"without a gap"),
    ],
)
def test_a_rank_file_with_which_not_every_text_can_be_encoded(tokens, message, tmp_path):
    path = tmp_path / "ranks"
    path.write_bytes(rank_file(tokens))
    with pytest.raises(ConfigError, match=message):
        build_tokenizer("tiktoken", str(path))


@pytest.mark.parametrize(("name", "package"), [("sp", "sentencepiece"), ("tiktoken", "tiktoken")])
def test_a_library_is_imported_only_by_its_tokenizer(name, package, paths, monkeypatch):
    program = "import sys, lingua.tokenizer; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", program], cwd=HOST, capture_output=True, text=True, check=True
    ).stdout.split()
    assert package not in loaded
    monkeypatch.setitem(sys.modules, package, None)
    assert build_tokenizer("bytes").encode("a") == [97]
    with pytest.raises(ConfigError, match=f"needs the Python package {package}"):
        build_tokenizer(name, paths[name])
