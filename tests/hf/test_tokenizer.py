"""Exported tokenizers give the ids of training: on real text, on code, on anything."""

import base64
import inspect
import random

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from apps.topk.corpus import python_docs, text_files
from apps.topk.corpus.tokenizer import train_tokenizer
from lingua.tokenizer import DEFAULT_TIKTOKEN_PATTERN, build_tokenizer
from lingua_topk.errors import ConfigError
from lingua_topk.hf import tokenizer as hf

CODE = [inspect.getsource(module) for module in (python_docs, text_files, hf, pytest, random)]
PROSE = [
    f"It's day {day}: naïve ﬁsh\n\n\tsaid “no” —  漢字 🙂 (twice)\r\n" * 3 for day in range(30)
]
# Few letters in long runs: merges compete at every place.
_draw = random.Random(3)
RUNS = ["".join(_draw.choices(("a", "b", " ", "ab", "aaa"), k=60)) for _ in range(500)]
CORPORA = {"code": (CODE + PROSE, 1500), "runs": (RUNS, 420)}
KINDS = ["bytes", *(f"{kind}-{corpus}" for kind in ("sp", "tiktoken") for corpus in CORPORA)]

any_text = st.text(st.characters(exclude_categories=["Cs"]))
few_letters = st.text(st.sampled_from("ab \n'1▁"), max_size=80)
near_code = st.lists(st.sampled_from(" ".join(CODE).split(" ")), max_size=20).map(" ".join)


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """Lingua's tokenizer, and the exported one as AutoTokenizer loads it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    name, _, corpus = request.param.partition("-")
    path, special = folder / "model", ()
    if name == "bytes":
        backend = hf.bytes_tokenizer()
    elif name == "sp":
        model = train_tokenizer(*CORPORA[corpus])
        path.write_bytes(model)
        backend, special = hf.sentencepiece_tokenizer(model), hf.control_ids(model)
    else:
        path.write_text(trained_ranks(*CORPORA[corpus]), encoding="ascii")
        known = build_tokenizer(name, str(path)).tkt_model
        backend = hf.tiktoken_tokenizer(
            known._mergeable_ranks, known._pat_str, known._special_tokens
        )
        special = known._special_tokens.values()
    ours = build_tokenizer(name, str(path))
    theirs = hf.wrapped(
        backend,
        bos_id=ours.bos_id,
        eos_id=ours.eos_id,
        special_ids=special,
        add_bos=True,
        max_length=10**6,
    )
    theirs.save_pretrained(folder / "hf")
    return ours, AutoTokenizer.from_pretrained(folder / "hf")


def trained_ranks(documents, size):
    """A tiktoken rank file, its merges learned from `documents`."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(DEFAULT_TIKTOKEN_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator(documents, trainer)
    byte_of = {shown: byte for byte, shown in hf._shown_bytes().items()}
    ranks = sorted(trained.get_vocab().items(), key=lambda entry: entry[1])
    return "".join(
        f"{base64.b64encode(bytes(byte_of[c] for c in token)).decode()} {rank}\n"
        for token, rank in ranks
    )


def assert_same(pair, text):
    ours, theirs = pair
    ids = ours.encode(text, True, False)
    assert theirs.encode(text) == ids
    assert theirs.encode(text, add_special_tokens=False) == ids[1:]


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        " one before",
        "one after ",
        "   three   and  two  ",
        "\ttabs\t\tand\n\nnewlines\r\n\r\n",
        "naïve — 漢字 🙂 \u00a0\u2028\u200b",
        "\x00\x01\x7f",
        "<s> </s> <unk> <0x0A> <|begin_of_text|><|end_of_text|><|reserved_special_token_3|>",
        "ﬁ ① \uff26 e\u0301 \u2581",
        "2024 12345678 3.14159",
        "don't DON'T '\u017f",
    ],
)
def test_ids_are_those_of_training(pair, text):
    assert_same(pair, text)


def test_real_text(pair):
    for text in (*CODE, *PROSE, *RUNS, "\n".join(CODE)):
        assert_same(pair, text)


@settings(max_examples=150, deadline=None)
@given(any_text)
def test_any_text(pair, text):
    assert_same(pair, text)


@settings(max_examples=300, deadline=None)
@given(few_letters)
def test_few_letters(pair, text):
    assert_same(pair, text)


@settings(max_examples=300, deadline=None)
@given(near_code)
def test_words_of_code(pair, text):
    assert_same(pair, text)


def test_what_the_export_tries(pair):
    ours, theirs = pair
    words = [text for i in range(ours.n_words) if (text := ours.decode([i]))]
    hf.check_same_ids(theirs, lambda text: ours.encode(text, False, False), hf.trial_texts(words))


def test_special_ids_and_padding(pair):
    ours, theirs = pair
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
    assert len(theirs) == ours.n_words
    batch = theirs(["a", "a longer one"], padding=True)
    assert batch["input_ids"][0][0] == ours.eos_id and batch["attention_mask"][0][0] == 0
    assert set(batch) == {"input_ids", "attention_mask"}


def test_text_comes_back(pair):
    _, theirs = pair
    for text in ("  hé 🙂\n\n\tx ", *PROSE[:3], *CODE[:1]):
        assert theirs.decode(theirs.encode(text), skip_special_tokens=True) == text


def test_a_difference_is_refused(pair):
    _, theirs = pair
    with pytest.raises(ConfigError, match="cannot be exported exactly"):
        hf.check_same_ids(theirs, lambda text: [0] * len(text), ["some text"])


def test_a_dummy_prefix_is_exported(tmp_path):
    model = sentencepiece_model(tmp_path, add_dummy_prefix=True)
    ours = sentencepiece.SentencePieceProcessor(model_proto=model)
    theirs = hf.wrapped(
        hf.sentencepiece_tokenizer(model), bos_id=1, eos_id=2, add_bos=False, max_length=99
    )
    texts = ["", " ", "a", " a  b", "▁a", "\n", *RUNS, *PROSE]
    hf.check_same_ids(theirs, ours.encode, texts)
    assert theirs.decode(theirs.encode(" ab")) == " ab"


def sentencepiece_model(folder, **changes):
    settings = {
        "model_type": "bpe",
        "vocab_size": 400,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "byte_fallback": True,
        "minloglevel": 3,
        **changes,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in RUNS + PROSE for line in text.splitlines()]),
        model_prefix=str(folder / "changed"),
        hard_vocab_limit=False,
        **settings,
    )
    return (folder / "changed.model").read_bytes()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "unigram"}, "not a BPE model"),
        ({"byte_fallback": False}, "no byte fallback"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalises"),
        ({"remove_extra_whitespaces": True}, "removes white space"),
        ({"user_defined_symbols": ["<sep>"]}, "user defined"),
        ({"treat_whitespace_as_suffix": True}, "at the end of a word"),
    ],
)
def test_models_that_would_differ_are_refused(tmp_path, changes, reason):
    with pytest.raises(ConfigError, match=reason):
        hf.sentencepiece_tokenizer(sentencepiece_model(tmp_path, **changes))


@pytest.mark.parametrize("content", [b"no model", b"", b"\x0a\xff", b"\x0a\x03\x0a\x05a"])
def test_what_is_no_model_is_refused(content):
    with pytest.raises(ConfigError):
        hf.sentencepiece_tokenizer(content)
