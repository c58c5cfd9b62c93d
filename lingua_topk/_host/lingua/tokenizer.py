"""Tokenizers: UTF-8 bytes, SentencePiece models, tiktoken rank files.

The two libraries are imported only by the tokenizers that use them.
"""

import base64
import importlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Optional

from lingua._offsets import offsets_of_spelling, piece_spans, well_formed
from lingua.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

# Which text is never merged across: contractions; a word with the character before it;
# up to three digits; punctuation with the line ends after it; line ends; white space.
# The alternatives are those of Llama 3.
DEFAULT_TIKTOKEN_PATTERN = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
# Names of special tokens, and where they lie after the last rank.
DEFAULT_TIKTOKEN_SPECIAL_TOKENS = {
    "<|begin_of_text|>": 0,
    "<|end_of_text|>": 1,
    "<|fim_prefix|>": 2,
    "<|fim_middle|>": 3,
    "<|fim_end_fill|>": 253,
    "<|fim_pad|>": 254,
    "<|fim_suffix|>": 255,
}
N_TIKTOKEN_SPECIAL_TOKENS = 256
TIKTOKEN_MAX_ENCODE_CHARS = 400_000


@dataclass
class TokenizerArgs:
    name: str = "bytes"  # bytes, sp, tiktoken or mock
    path: Optional[str] = None  # noqa: UP045  (the model file of sp and tiktoken)


class Tokenizer(ABC):
    """Text to token ids and back.

    Attributes:
        n_words: number of ids; valid ones are 0 .. n_words - 1.
        bos_id, eos_id: the ids that begin and end a document, or None.
    """

    n_words: int
    bos_id: int | None
    eos_id: int | None

    @abstractmethod
    def encode(self, tokens: str, add_bos: bool, add_eos: bool) -> list[int]:
        """The ids of a text. A lone surrogate, which is no text, becomes U+FFFD."""

    @abstractmethod
    def decode(self, tokens: Sequence[int]) -> str:
        """The text of ids; special and unknown ids are left out."""

    @abstractmethod
    def get_token_offsets(
        self, text: str, tokens: Sequence[int] | None = None
    ) -> tuple[list[str], list[int]]:
        """For every token the characters it covers, and the index of its first character.

        tokens: default, the ids of `text` without bos and eos. Special tokens cover
        nothing. Of the tokens that share a character each has its offset, and the last
        one covers it. DataError if the tokens do not spell the text.
        """

    def _framed(self, ids: list[int], add_bos: bool, add_eos: bool) -> list[int]:
        """The ids between bos and eos, where wanted."""
        if add_bos:
            ids.insert(0, self._special("bos", self.bos_id))
        if add_eos:
            ids.append(self._special("eos", self.eos_id))
        return ids

    def _special(self, name: str, token: int | None) -> int:
        if token is None:
            raise ConfigError(
                f"data.add_{name}=true, but the tokenizer has no {name} token: set"
                f" data.add_{name}=false, or use a tokenizer that has one"
            )
        return token


class ByteTokenizer(Tokenizer):
    """The bytes of the text in UTF-8; ids 256 and 257 are bos and eos."""

    n_words = 258
    bos_id = 256
    eos_id = 257

    def encode(self, text: str, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        return self._framed(list(well_formed(text).encode()), add_bos, add_eos)

    def decode(self, tokens: Sequence[int]) -> str:
        r"""The text; bytes that are no UTF-8 are written as \xNN."""
        return bytes(t for t in tokens if 0 <= t < 256).decode(errors="backslashreplace")

    def get_token_offsets(self, text, tokens=None):
        text = well_formed(text)
        tokens = self.encode(text) if tokens is None else tokens
        return offsets_of_spelling(text, [bytes([t]) if 0 <= t < 256 else b"" for t in tokens])


class MockTokenizer(Tokenizer):
    """For tests: ids pass through unchanged, a text becomes its bytes; no special tokens."""

    n_words = 256
    bos_id = None
    eos_id = None

    def encode(self, tokens, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        return list(well_formed(tokens).encode() if isinstance(tokens, str) else tokens)

    def decode(self, tokens: Sequence[int]) -> str:
        return ByteTokenizer().decode(tokens)

    def get_token_offsets(self, text, tokens=None):
        return ByteTokenizer().get_token_offsets(text, tokens)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model file."""

    def __init__(self, model_path: str):
        path = _model_file("sp", model_path)
        sentencepiece = _import("sp", "sentencepiece")
        try:
            self.sp_model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise ConfigError(
                f"data.tokenizer.path={path} is no SentencePiece model ({error}): give a file"
                " that spm_train or prepare wrote"
            ) from None
        self.n_words: int = self.sp_model.vocab_size()
        self.bos_id = _if_there(self.sp_model.bos_id())
        self.eos_id = _if_there(self.sp_model.eos_id())
        self.pad_id: int = self.sp_model.pad_id()
        logger.info("SentencePiece model %s: %d tokens", path, self.n_words)

    def encode(self, text: str, add_bos: bool, add_eos: bool) -> list[int]:
        return self._framed(self.sp_model.encode(well_formed(text)), add_bos, add_eos)

    def decode(self, tokens: Sequence[int]) -> str:
        return self.sp_model.decode([int(t) for t in tokens if 0 <= t < self.n_words])

    def get_token_offsets(self, text, tokens=None):
        text = well_formed(text)
        # Of the forms that carry offsets this one is in every release of SentencePiece.
        spans = piece_spans(self.sp_model.encode(text, out_type="serialized_proto"), text)
        if tokens is not None:
            spans = self._spans_of(tokens, spans, len(text))
        return [text[start:end] for _, start, end in spans], [start for _, start, _ in spans]

    def _spans_of(self, tokens, spans, n_characters: int) -> list[tuple[int, int, int]]:
        """`spans` with empty ones for the special tokens among `tokens`."""
        special = {self.bos_id, self.eos_id, self.pad_id}
        found, todo = [], list(reversed(spans))
        for token in tokens:
            start = todo[-1][1] if todo else n_characters
            if todo and todo[-1][0] == token:
                found.append(todo.pop())
            elif token in special:
                found.append((token, start, start))
            else:
                break
        if todo or len(found) < len(tokens):
            raise DataError(
                f"the {len(tokens)} tokens are not those of the text of {n_characters}"
                " characters: give the tokens that this tokenizer makes of it"
            )
        return found


class TikTokenTokenizer(Tokenizer):
    """A tiktoken rank file, such as Llama 3's: a token in base64 and its rank a line.

    256 special ids follow the ranks, bos and eos first. None is recognised in text.
    """

    def __init__(self, model_path: str):
        path = _model_file("tiktoken", model_path)
        tiktoken = _import("tiktoken", "tiktoken")
        ranks = _read_ranks(path)
        specials = _special_names()
        self.tkt_model = tiktoken.Encoding(
            name=path.stem,
            pat_str=DEFAULT_TIKTOKEN_PATTERN,
            mergeable_ranks=ranks,
            special_tokens={name: len(ranks) + i for i, name in enumerate(specials)},
        )
        self.n_ranks = len(ranks)
        self.n_words = len(ranks) + len(specials)
        self.bos_id = len(ranks) + specials.index("<|begin_of_text|>")
        self.eos_id = len(ranks) + specials.index("<|end_of_text|>")
        logger.info("tiktoken ranks %s: %d tokens", path, self.n_words)

    def encode(self, text: str, add_bos: bool, add_eos: bool) -> list[int]:
        # The split pattern slows down more than in proportion on texts longer than this.
        ids = []
        for start in range(0, len(text), TIKTOKEN_MAX_ENCODE_CHARS):
            piece = text[start : start + TIKTOKEN_MAX_ENCODE_CHARS]
            ids += self.tkt_model.encode_ordinary(well_formed(piece))
        return self._framed(ids, add_bos, add_eos)

    def decode(self, tokens: Sequence[int]) -> str:
        return self.tkt_model.decode([int(t) for t in tokens if 0 <= t < self.n_ranks])

    def get_token_offsets(self, text, tokens=None):
        text = well_formed(text)
        tokens = self.encode(text, False, False) if tokens is None else tokens
        single = self.tkt_model.decode_single_token_bytes
        return offsets_of_spelling(
            text, [single(t) if 0 <= t < self.n_ranks else b"" for t in tokens]
        )


def _special_names() -> list[str]:
    """The names of the 256 special tokens, in the order of their ids."""
    named = {offset: name for name, offset in DEFAULT_TIKTOKEN_SPECIAL_TOKENS.items()}
    unnamed = [i for i in range(N_TIKTOKEN_SPECIAL_TOKENS) if i not in named]
    named.update({i: f"<|reserved_special_token_{n}|>" for n, i in enumerate(unnamed)})
    return [named[i] for i in range(N_TIKTOKEN_SPECIAL_TOKENS)]


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise ConfigError(
                f"data.tokenizer.path={path} line {number} is not a token in base64 and its rank:"
                " give a tiktoken rank file, such as the tokenizer.model of Llama 3"
            ) from None
    if sorted(ranks.values()) != list(range(len(ranks))) or not ranks:
        raise ConfigError(
            f"data.tokenizer.path={path}: its ranks are not 0, 1, 2 ... without a gap: the file"
            " is incomplete or not a tiktoken rank file"
        )
    # tiktoken panics, instead of raising, at a byte that is no token.
    absent = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if absent:
        raise ConfigError(
            f"data.tokenizer.path={path}: {len(absent)} of the 256 bytes are no token of it (first"
            f" of all {absent[0]:#04x}), so that not every text can be encoded: give a whole rank"
            " file"
        )
    return ranks


def _if_there(token: int) -> int | None:
    """A token's id; None where SentencePiece says -1, which is no id."""
    return token if token >= 0 else None


def _model_file(name: str, path: str | None) -> Path:
    if path is None:
        raise ConfigError(
            f"data.tokenizer.path is not set: data.tokenizer.name={name} needs its model file"
        )
    if not Path(path).is_file():
        raise ConfigError(
            f"data.tokenizer.path={path} is not a file: give the model file of the {name} tokenizer"
        )
    return Path(path)


def _import(name: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(
            f"data.tokenizer.name={name} needs the Python package {package}, which cannot be"
            f" imported ({error}): pip install {package}, or use another tokenizer"
        ) from None


def build_tokenizer(name: str, path: str | None = None) -> Tokenizer:
    """The tokenizer called `name`. ConfigError for an unknown name or an unusable file."""
    if name == "bytes":
        return ByteTokenizer()
    if name == "mock":
        return MockTokenizer()
    if name == "sp":
        return SentencePieceTokenizer(path)
    if name == "tiktoken":
        return TikTokenTokenizer(path)
    raise ConfigError(
        f"data.tokenizer.name={name!r} is not known: choose one of bytes, sp, tiktoken, mock"
    )
