"""Lingua's tokenizers as ones that AutoTokenizer loads, giving the same ids.

Three kinds: UTF-8 bytes, SentencePiece's BPE, tiktoken's ranks. What cannot be the same is
refused, and `check_same_ids` compares the two on texts, those of `trial_texts` among them,
before one is written.

SentencePiece and tiktoken merge, of the neighbours that together are a token, those of the best
token, the leftmost first. `tokenizers` ranks pairs and not tokens, so the pairs of one token
get ranks of their own: see `_splits`.
"""

import random
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from lingua_topk.errors import ConfigError

# What SentencePiece writes for the space.
SPACE = "\u2581"
BYTES_BOS, BYTES_EOS = 256, 257
BYTES_BOS_NAME, BYTES_EOS_NAME = "<s>", "</s>"

# Of sentencepiece_model.proto.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_BPE = 2

# Where Unicode has characters; of the private planes at its end, the last ones.
_ASSIGNED = (range(0x0, 0x32400), range(0xE0000, 0xE0200), range(0x10FF00, 0x110000))


@dataclass
class SentencePieceModel:
    """What of a SentencePiece model file decides the ids."""

    pieces: list[tuple[str, float, int]] = field(default_factory=list)  # text, score, kind
    model_type: int = 1
    byte_fallback: bool = False
    whitespace_as_suffix: bool = False
    charsmap: bytes = b""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True


def bytes_tokenizer() -> Tokenizer:
    """The bytes of the text in UTF-8 as ids 0 to 255; 256 begins a text, 257 ends it."""
    vocab = {_byte_name(byte): byte for byte in range(256)}
    vocab |= {BYTES_BOS_NAME: BYTES_BOS, BYTES_EOS_NAME: BYTES_EOS}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def sentencepiece_tokenizer(model: bytes) -> Tokenizer:
    """A SentencePiece BPE model, given as the bytes of its file.

    ConfigError for the kinds of model whose ids would not be the same.
    """
    read = read_sentencepiece(model)
    _check_sentencepiece(read)
    scores = {text: score for text, score, kind in read.pieces if kind == _NORMAL}
    merges = [
        (text[:cut], text[cut:])
        for text in sorted(scores, key=lambda text: -scores[text])
        for cut in _splits(text, scores)
    ]
    vocab = {text: i for i, (text, _, _) in enumerate(read.pieces)}
    unknown = next(text for text, _, kind in read.pieces if kind == _UNKNOWN)
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, unk_token=unknown, byte_fallback=True))
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    written = [normalizers.Replace(" ", SPACE)]
    if read.add_dummy_prefix:
        written.insert(0, normalizers.Prepend(SPACE))
        steps.append(decoders.Strip(content=" ", left=1))
    tokenizer.normalizer = normalizers.Sequence(written)
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def control_ids(model: bytes) -> list[int]:
    """The ids of a SentencePiece model that stand for no text."""
    kinds = [kind for _, _, kind in read_sentencepiece(model).pieces]
    return [i for i, kind in enumerate(kinds) if kind == _CONTROL]


def tiktoken_tokenizer(
    ranks: Mapping[bytes, int], pattern: str, special_tokens: Mapping[str, int]
) -> Tokenizer:
    """tiktoken's ranks, the pattern that cuts a text into words, and names of special ids."""
    shown = _shown_bytes()
    names = {token: "".join(shown[byte] for byte in token) for token in ranks}
    merges = [
        (names[token[:cut]], names[token[cut:]])
        for token in sorted(ranks, key=ranks.__getitem__)
        for cut in _splits(token, ranks)
    ]
    vocab = {names[token]: rank for token, rank in ranks.items()} | dict(special_tokens)
    # ignore_merges: like tiktoken, a word that is a token is taken as it is.
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def wrapped(
    tokenizer: Tokenizer,
    *,
    bos_id: int | None,
    eos_id: int | None,
    special_ids: Iterable[int] = (),
    add_bos: bool,
    max_length: int,
) -> PreTrainedTokenizerFast:
    """The tokenizer with transformers' interface; `save_pretrained` writes its files.

    Args:
        bos_id, eos_id: begin and end a document, or None.
        special_ids: further ids that stand for no text.
        add_bos: whether a text begins with bos, as documents did in training. eos is never
            added: texts are prompts, to be gone on with.
        max_length: tokens that the model reads.

    Names of special tokens in a text are text, as they are in training
    (`split_special_tokens`). eos pads, on the left, where a batch is padded.
    """
    special = {i for i in (bos_id, eos_id, *special_ids) if i is not None}
    names = {i: tokenizer.id_to_token(i) for i in sorted(special)}
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in names.values()])
    named = {"bos_token": names.get(bos_id), "eos_token": names.get(eos_id)}
    named["pad_token"] = named["eos_token"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        add_bos_token=add_bos and bos_id is not None,
        add_eos_token=False,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=max_length,
        **{role: name for role, name in named.items() if name is not None},
    )


def check_same_ids(
    tokenizer: Any, encode: Callable[[str], Sequence[int]], texts: Iterable[str]
) -> None:
    """ConfigError for the first of `texts` whose ids, without bos and eos, differ.

    tokenizer: transformers' interface. encode: the ids that training used.
    """
    for text in texts:
        # verbose would warn of texts that are longer than the model reads
        encoded = tokenizer(text, add_special_tokens=False, verbose=False)
        ours, theirs = list(encode(text)), encoded["input_ids"]
        if ours == theirs:
            continue
        at = next(
            (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
            min(len(ours), len(theirs)),
        )
        raise ConfigError(
            f"the tokenizer cannot be exported exactly: of the text {text[:60]!r} token {at} would"
            f" be {theirs[at : at + 3]} and is {ours[at : at + 3]} in training; export with"
            " --tokenizer false and use the tokenizer of training"
        )


def trial_texts(tokens: Sequence[str], seed: int = 0, count: int = 2000) -> Iterator[str]:
    """Texts to compare two tokenizers on.

    `tokens`, decoded, joined at random, so that merges across them compete; runs of one
    token; and the characters of Unicode in several surroundings.
    """
    draw = random.Random(seed)
    yield from (
        "",
        " ",
        "  two  and   three ",
        "\ttabs\t\tand\n\nlines\r\n\r\n",
        "<s> </s> <unk> <0x0A> <|begin_of_text|><|end_of_text|>",
        f"{SPACE}{SPACE}x{SPACE} \x00\x01\x7f",
        "It's we'LL they'Re 'S 1234567 3.14 x=[1,2];//c",
    )
    if tokens:
        for token in tokens:
            yield token * draw.randint(1, 5)
        for _ in range(count):
            few = draw.choices(tokens, k=draw.randint(1, 4))
            yield "".join(draw.choices(few, k=draw.randint(2, 24)))
    for planes in _ASSIGNED:
        for start in range(planes.start, planes.stop, 256):
            block = [chr(c) for c in range(start, start + 256) if not 0xD800 <= c < 0xE000]
            yield "".join(f"a{c} {c}1'{c}\n{c}{c}x" for c in block)


def read_sentencepiece(model: bytes) -> SentencePieceModel:
    """The parts of a SentencePiece model file (a protocol buffer) that decide the ids.

    ConfigError for bytes that are no such file.
    """
    read = SentencePieceModel()
    try:
        for number, value in _fields(model):
            if number == 1:
                piece = dict(_fields(value))
                score = struct.unpack("<f", piece.get(2, bytes(4)))[0]
                read.pieces.append((piece[1].decode("utf-8"), score, piece.get(3, _NORMAL)))
            elif number == 2:
                trainer = dict(_fields(value))
                read.model_type = trainer.get(3, 1)
                read.byte_fallback = bool(trainer.get(35, 0))
                read.whitespace_as_suffix = bool(trainer.get(24, 0))
            elif number == 3:
                normalizer = dict(_fields(value))
                read.charsmap = normalizer.get(2, b"")
                read.add_dummy_prefix = bool(normalizer.get(3, 1))
                read.remove_extra_whitespaces = bool(normalizer.get(4, 1))
                read.escape_whitespaces = bool(normalizer.get(5, 1))
    except (IndexError, KeyError, ValueError, TypeError, AttributeError, struct.error) as error:
        raise ConfigError(
            f"the tokenizer is no SentencePiece model ({error}): give the file that training used"
        ) from None
    return read


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protocol buffer by number: an int for a varint, else bytes."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(message, at)
        else:
            if kind == 2:
                size, at = _varint(message, at)
            else:
                size = {1: 8, 5: 4}[kind]
            value, at = message[at : at + size], at + size
        yield key >> 3, value


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _check_sentencepiece(model: SentencePieceModel) -> None:
    normal = [(text, score) for text, score, kind in model.pieces if kind == _NORMAL]
    characters = {text for text, _ in normal if len(text) == 1}
    merged = [(text, score) for text, score in normal if len(text) > 1]
    kinds = {kind for _, _, kind in model.pieces}
    reasons = {
        "it is not a BPE model": model.model_type != _BPE,
        "it has no byte fallback": not model.byte_fallback
        or sum(kind == _BYTE for _, _, kind in model.pieces) != 256,
        "it normalises the text": bool(model.charsmap),
        "it removes white space": model.remove_extra_whitespaces,
        "it does not write the space as U+2581": not model.escape_whitespaces,
        "it puts white space at the end of a word": model.whitespace_as_suffix,
        "it has pieces that the user defined": _USER_DEFINED in kinds,
        "it has unused pieces": _UNUSED in kinds,
        "it has no piece for what is unknown": _UNKNOWN not in kinds,
        "two of its pieces are the same": len({p for p, _, _ in model.pieces}) != len(model.pieces),
        "two of its pieces have the same score": len({s for _, s in merged}) != len(merged),
        "a character of its pieces is no piece": any(
            character not in characters for text, _ in merged for character in text
        ),
    }
    found = [reason for reason, applies in reasons.items() if applies]
    if found:
        raise ConfigError(
            f"this SentencePiece model cannot be exported exactly: {', '.join(found)}; export with"
            " --tokenizer false and use the tokenizer of training"
        )


def _splits(token: Any, known: Mapping[Any, Any]) -> list[int]:
    """Where a token, text or bytes, can be cut into two known ones, in the order of ranks.

    With s1 s2 s3 in a row and s1 + s2 = s2 + s3 = token, the left pair is merged first, so the
    cut after s1 comes before the one after s2. That is so where token[cut:], which is s2,
    also begins the token.
    """

    def rank(cut: int) -> tuple[int, bool, int]:
        other = len(token) - cut
        return min(cut, other), token[cut:] != token[:other], cut

    cuts = [c for c in range(1, len(token)) if token[:c] in known and token[c:] in known]
    return sorted(cuts, key=rank)


def _byte_name(byte: int) -> str:
    return f"<0x{byte:02X}>"


def _shown_bytes() -> dict[int, str]:
    """The printable character that ByteLevel writes for each byte (GPT-2's table)."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {byte: chr(byte) for byte in own} | {b: chr(256 + i) for i, b in enumerate(others)}
