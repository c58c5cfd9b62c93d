"""The text that neurons are read on, as rows of tokens like those of training."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apps.topk.checkpoint import Checkpoint
from apps.topk.corpus import progress
from apps.topk.corpus.sources import Source
from apps.topk.corpus.tally import Tally
from apps.topk.evaluation.sources import ValidationArgs, find_sources
from apps.topk.neurons.measures import Text
from lingua_topk.analysis.vectors import read_vectors
from lingua_topk.analysis.words import words_of
from lingua_topk.errors import ConfigError, DataError

LEAST_ROWS = 8  # fewer say nothing of a neuron
SPACE = "\u2581"  # what SentencePiece writes for the space


@dataclass
class Rows:
    """Tokens of a corpus in rows of one length, documents one after another as in training.

    Attributes:
        tokens: int32 [N, S].
        pieces: what each token of the vocabulary spells, in UTF-8, [V]; empty for special ones.
        sources: what was read, and how many documents of it, JSON.
    """

    tokens: np.ndarray
    pieces: list[bytes]
    sources: dict[str, int]

    def describe(self) -> dict[str, Any]:
        """JSON for the results."""
        n_rows, length = self.tokens.shape
        return {
            "sources": self.sources, "rows": n_rows, "row_length": length,
            "tokens": n_rows * length,
        }  # fmt: skip


def rows_of_corpus(
    checkpoint: Checkpoint, data: Sequence[str], tokens: int, row_length: int | None = None
) -> Rows:
    """At most `tokens` tokens of `data`, a document of each source in turn; the rest is not read.

    data: names as `validation.sources` has them; none for the held-out documents of training.
    row_length: None for that of training. bos and eos stand where training had them, and
    rows are cut through documents as there; what does not fill the last row is left out.
    ConfigError, DataError for what is not there, is not allowed or is too little.
    """
    longest = checkpoint.model_args.max_seqlen
    length = checkpoint.params["data"].get("seq_len", longest) if row_length is None else row_length
    if not 2 <= length <= longest:
        raise ConfigError(
            f"row_length={length} is not allowed: give 2 to {longest}, the length that the model"
            " is trained with"
        )
    if tokens < LEAST_ROWS * length:
        raise ConfigError(
            f"tokens={tokens} is too few: give at least {LEAST_ROWS * length}, {LEAST_ROWS} rows of"
            f" {length}"
        )
    tokenizer = checkpoint.tokenizer()
    reader = _Reader(checkpoint, tokenizer, data)
    found = _packed(reader.documents(), tokens // length, length)
    if len(found) < LEAST_ROWS:
        raise DataError(
            f"data={','.join(reader.names)!r} has {len(found)} rows of {length} tokens: neurons"
            f" need at least {LEAST_ROWS}; give more text, or a smaller --row_length"
        )
    return Rows(found, token_pieces(tokenizer, checkpoint.model_args.vocab_size), reader.sources)


def text_of(
    rows: Rows, checkpoint: Checkpoint, vectors: str, embedding: Tensor | None = None
) -> Text:
    """The rows with their words, and the words' vectors.

    vectors: as `read_vectors` takes it, "" for the checkpoint's own embeddings. embedding: those,
    float [V, D], where they are in memory already.
    """
    if vectors:
        embedding = torch.empty(0)  # not looked at
    elif embedding is None:
        embedding = checkpoint.model("cpu", torch.float32).tok_embeddings.weight
    tokenizer = checkpoint.tokenizer()
    words = words_of(rows.tokens, rows.pieces)
    found = read_vectors(
        vectors,
        words.words,
        embedding,
        lambda word: tokenizer.encode(f" {word}", add_bos=False, add_eos=False),
    )
    return Text(rows.tokens, words, found)


class _Reader:
    """Documents of the sources as tokens; counts how many of each are read."""

    def __init__(self, checkpoint: Checkpoint, tokenizer: Any, data: Sequence[str]):
        settings = checkpoint.params["data"]
        self.add_bos = bool(settings.get("add_bos", True))
        self.add_eos = bool(settings.get("add_eos", True))
        self.tokenizer = tokenizer
        args = ValidationArgs(sources=list(data), use_val_from_train_src=not data)
        self.parts = find_sources(args, settings, reserved="")
        self.names = list(self.parts)
        self.sources = dict.fromkeys(self.parts, 0)

    def documents(self) -> Iterator[list[int]]:
        """One of each source in turn, until all are at their end."""
        left = deque((name, _texts(parts)) for name, parts in self.parts.items())
        while left:
            name, texts = left.popleft()
            text = next(texts, None)
            if text is not None:
                left.append((name, texts))
                self.sources[name] += 1
                yield self.tokenizer.encode(text, add_bos=self.add_bos, add_eos=self.add_eos)


def _texts(parts: Sequence[Source]) -> Iterator[str]:
    for part in parts:
        part.open()
        yield from part.documents(Tally())


def _packed(documents: Iterator[list[int]], most_rows: int, length: int) -> np.ndarray:
    """int32 [N, length], N at most `most_rows`."""
    rows: list[np.ndarray] = []
    rest = np.empty(0, dtype=np.int32)
    with progress.bar("reading text", most_rows, "row") as shown:
        for document in documents:
            rest = np.concatenate([rest, np.asarray(document, dtype=np.int32)])
            n_whole = min(len(rest) // length, most_rows - len(rows))
            rows.extend(rest[: n_whole * length].reshape(-1, length))
            rest = rest[n_whole * length :]
            shown.update(n_whole)
            if len(rows) == most_rows:
                break
    return np.stack(rows) if rows else np.empty((0, length), dtype=np.int32)


def token_pieces(tokenizer: Any, vocab_size: int) -> list[bytes]:
    """What each id below `vocab_size` spells, in UTF-8; empty for ids that stand for no text.

    tokenizer: a host's, for bytes, of SentencePiece or of tiktoken.
    """
    n_words = tokenizer.n_words
    if hasattr(tokenizer, "sp_model"):
        found = [_sentencepiece(tokenizer.sp_model, i) for i in range(n_words)]
    elif hasattr(tokenizer, "tkt_model"):
        special = set(tokenizer.tkt_model._special_tokens.values())
        single = tokenizer.tkt_model.decode_single_token_bytes
        found = [b"" if i in special else single(i) for i in range(n_words)]
    else:
        found = [bytes([i]) if i < 256 else b"" for i in range(n_words)]
    return found + [b""] * (vocab_size - n_words)


def _sentencepiece(model: Any, token: int) -> bytes:
    if model.is_byte(token):
        return bytes([int(model.id_to_piece(token)[1:-1], 16)])
    if model.is_control(token) or model.is_unknown(token):
        return b""
    return model.id_to_piece(token).replace(SPACE, " ").encode("utf-8")
