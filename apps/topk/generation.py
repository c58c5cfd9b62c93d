"""Continuing texts: batched, with cached keys and values, streamed, greedy or drawn.

The model runs through `inference.hidden_states`, so forward hooks on its modules act on the
prompt and on every generated token, and `lingua_topk.steering.steer` knows which is which. A
batch is prompts of different lengths, each with its own positions and its own draws: what becomes
of one does not depend on the others, but for the rounding of the matrix products.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from apps.topk.decoding import DecodingStep
from apps.topk.defaults import BATCH_TOKENS
from apps.topk.inference import KVCache, hidden_states, visible, window_of
from apps.topk.sampling import NO_NUMBERS, Sampling, next_tokens, row_generator
from apps.topk.stopping import TextStream
from lingua_topk import topk_handle
from lingua_topk.errors import CheckpointError, ConfigError
from lingua_topk.sparse import SparseDecoding

logger = logging.getLogger(__name__)

# Elements of the mask of a piece of the prompts.
MASK_ELEMENTS = 2**24
# Steps with one token a row that sparse decoding begins to pay with: to lay out the weights of a
# block for it, once a call, takes as long as 12 to 50 dense products with them (D = 1024 and 2048,
# fp32, one thread of a CPU that had other work too). Whole calls of 32 to 96 tokens took as long
# either way there (0.9 to 1.1 times, D = 512 and 1024, two threads).
SPARSE_FROM = 128

OnText = Callable[[int, str], None]


@dataclass
class Generation:
    """What became of one prompt.

    Attributes:
        prompt: its text.
        text: what the generated tokens add to that, up to a stop string or the end.
        tokens: the generated ids without eos; with a stop string up to the one that completed
            it, so that they may spell more than `text`.
        reason: what ended it: "eos", "stop" (a stop string), "length" (max_tokens) or "window"
            (the model has no position for a further token).
    """

    prompt: str
    text: str
    tokens: list[int]
    reason: str


@dataclass(eq=False)
class _Row:
    """A text that is being continued."""

    index: int
    prompt: str
    ids: list[int]  # the prompt's
    stream: TextStream
    draws: torch.Generator
    tokens: list[int] = field(default_factory=list)
    reason: str = ""

    def __len__(self) -> int:
        return len(self.ids) + len(self.tokens)


class Generator:
    """Continues texts with one model, on the device that it is on.

    Args:
        model: a host's LMTransformer, TopK or not, in evaluation mode.
        tokenizer: a host's, the one that the model was trained with.
        batch_tokens: positions that are cached at once; a batch has as many rows as fit, at
            least one.
        add_bos: begin every prompt with bos, where the tokenizer has one.
        use_cache: keep keys and values; without, every token reads the whole text again, which is
            slow, and plainly what is meant.
        sparse: where a model has TopK, generated tokens read only those weights behind it that
            are needed, if that is faster: see `lingua_topk.sparse.SparseDecoding`, memory too.
            The copies of weights that it takes are made anew in each call, and given back at its
            end. It changes nothing but the rounding of a sum.

    Attributes:
        sparse: whether it may decode sparsely.
        sparse_from: steps that a call must be able to take, for it to do so.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        batch_tokens: int = BATCH_TOKENS,
        add_bos: bool = True,
        use_cache: bool = True,
        sparse: bool = True,
    ):
        if batch_tokens < 1:
            raise ConfigError(f"batch_tokens={batch_tokens} is not allowed: give at least 1")
        self.model = model
        self.tokenizer = tokenizer
        self.batch_tokens = batch_tokens
        self.add_bos = add_bos and _special(tokenizer, "bos_id") is not None
        self.eos_id = _special(tokenizer, "eos_id")
        self.use_cache = use_cache
        self.sparse_from = SPARSE_FROM
        self.sparse = sparse and use_cache

    def generate(
        self,
        prompts: Sequence[str],
        sampling: Sampling,
        on_text: OnText | None = None,
        on_done: Callable[[int, Generation], None] | None = None,
    ) -> list[Generation]:
        """The continuations of all prompts, in their order.

        on_text is called with the index of a prompt and a piece of text as soon as that is
        certain; the pieces of a prompt, joined, are its text. on_done is called with the index
        and the result of each as it ends.

        ConfigError for a prompt that does not fit, and for an empty one without bos;
        CheckpointError where the model's logits are no numbers.
        """
        ids = [self.encode(prompt) for prompt in prompts]
        return self._generate(prompts, ids, sampling, on_text, on_done)

    def generate_tokens(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        on_text: OnText | None = None,
        on_done: Callable[[int, Generation], None] | None = None,
        draws: Sequence[int] | None = None,
    ) -> list[Generation]:
        """`generate` for prompts that are token ids, with bos where that is wanted.

        draws: with the seed, what decides the draws of each prompt, in place of its index; for a
        caller whose prompts are a part of all.
        """
        ids = [[int(token) for token in prompt] for prompt in prompts]
        texts = [self.tokenizer.decode(prompt) for prompt in ids]
        return self._generate(texts, ids, sampling, on_text, on_done, draws)

    def encode(self, prompt: str) -> list[int]:
        """The ids of a prompt, with bos where this generator adds one."""
        return list(self.tokenizer.encode(prompt, self.add_bos, False))

    @torch.inference_mode()
    def _generate(self, texts, ids, sampling, on_text, on_done, draws=None) -> list[Generation]:
        draws = range(len(ids)) if draws is None else draws
        for index, prompt in enumerate(ids):
            self.check(prompt, index)
        results: dict[int, Generation] = {}
        batches = list(self._batches(list(map(len, ids)), sampling.max_tokens))
        pays = self.sparse and len(batches) * sampling.max_tokens >= self.sparse_from
        # Of this call alone: until the next one the weights may change, or the modules.
        sparse = _sparse_decoding(self.model) if pays else None
        for indices, slots in batches:
            batch = [
                self._row(index, texts[index], ids[index], sampling, draws[index])
                for index in indices
            ]
            for row, piece in self._run(batch, slots, sampling, sparse):
                if piece and on_text is not None:
                    on_text(row.index, piece)
                if row.reason:
                    done = Generation(row.prompt, row.stream.text, row.tokens, row.reason)
                    results[row.index] = done
                    if on_done is not None:
                        on_done(row.index, done)
        return [results[index] for index in range(len(ids))]

    def _row(self, index: int, prompt: str, ids: list[int], sampling: Sampling, draw: int) -> _Row:
        stream = TextStream(self.tokenizer.decode, ids, sampling.stop)
        return _Row(index, prompt, ids, stream, row_generator(sampling.seed, draw))

    def check(self, ids: Sequence[int], index: int = 0) -> None:
        """ConfigError for a prompt that the model cannot read; `index` is what it is called by."""
        longest, n_embedded = self.model.max_seqlen - 1, self.model.tok_embeddings.num_embeddings
        if not ids:
            raise ConfigError(
                f"prompts[{index}] is empty, and there is no bos to begin with: give at least one"
                " character"
            )
        if len(ids) > longest:
            raise ConfigError(
                f"prompts[{index}] has {len(ids)} tokens, and the model reads {longest} at most"
                " before it generates one: give a shorter prompt"
            )
        unknown = [token for token in ids if not 0 <= token < n_embedded]
        if unknown:
            raise ConfigError(
                f"prompts[{index}] holds the token {unknown[0]}, and the model has those of 0 to"
                f" {n_embedded - 1}: give others"
            )

    def _batches(self, lengths: list[int], max_tokens: int) -> Iterator[tuple[list[int], int]]:
        """Which prompts are continued together, and slots of the cache for each; longest first.

        What does not fit into memory shows at once, and prompts of similar length are together.
        """
        todo = sorted(range(len(lengths)), key=lambda index: lengths[index], reverse=True)
        while todo:
            slots = min(lengths[todo[0]] + max_tokens, self.model.max_seqlen)
            size = max(self.batch_tokens // slots, 1)
            yield todo[:size], slots
            todo = todo[size:]

    def _run(
        self, rows: list[_Row], slots: int, sampling: Sampling, sparse: SparseDecoding | None
    ) -> Iterator[tuple[_Row, str]]:
        """Every row with a piece of its text, again and again; the last time with its reason."""
        allowed = self._allowed(sampling.ignore_eos)  # bool [V]
        cache = KVCache(len(self.model.layers), slots) if self.use_cache else None
        h, step = self._read_texts(rows, cache), None  # [B, D]
        while True:
            logits = self.model.output(h)  # [B, V]
            tokens = next_tokens(logits, allowed, sampling, [row.draws for row in rows])
            for row, token in zip(rows, tokens, strict=True):
                yield row, self._take(row, token, sampling)
            kept = [place for place, row in enumerate(rows) if not row.reason]
            if not kept:
                return
            if len(kept) < len(rows):
                rows = [rows[place] for place in kept]
                if cache is not None:
                    cache.keep_rows(self._tensor(kept))
                    step = None
            if cache is None:
                h = self._read_texts(rows, None)
                continue
            step = step or DecodingStep(self.model, cache, *self._places(rows), sparse)
            h = step.run([row.tokens[-1] for row in rows], [len(row) - 1 for row in rows])

    def _take(self, row: _Row, token: int, sampling: Sampling) -> str:
        """Give a row its next token, and its reason if that was the last; the new text."""
        if token == NO_NUMBERS:
            raise CheckpointError(
                f"the model gives no finite logits after {len(row)} tokens of prompts[{row.index}]:"
                " its outputs overflow, or hold NaN; use dtype=fp32, or an earlier checkpoint"
            )
        piece = ""
        if token == self.eos_id:
            row.reason = "eos"
        else:
            row.tokens.append(token)
            piece = row.stream.add(token)
            if row.stream.is_stopped:
                row.reason = "stop"
            elif len(row.tokens) == sampling.max_tokens:
                row.reason = "length"
            elif len(row) == self.model.max_seqlen:
                row.reason = "window"
        if row.reason:
            piece += row.stream.finish()
            # What was held back until the end may hold a stop string.
            row.reason = "stop" if row.stream.is_stopped else row.reason
        return piece

    def _read_texts(self, rows: list[_Row], cache: KVCache | None) -> Tensor:
        """Read all tokens of the rows; the hidden state of the last token of each, [B, D].

        In pieces, where a cache is to be filled. Behind a shorter text stands padding, which no
        token sees: hooks are given it, and its slots are taken by the tokens that are generated.
        """
        ids = [row.ids + row.tokens for row in rows]
        longest = max(map(len, ids))
        padded = self._tensor([one + [0] * (longest - len(one)) for one in ids])  # [B, S]
        places = self._tensor(list(map(len, ids))) - 1  # [B]
        size = max(min(self.batch_tokens // len(rows), MASK_ELEMENTS // longest), 1)
        last = None
        for start in range(0, longest, longest if cache is None else size):
            tokens = padded[:, start : start + (longest if cache is None else size)]  # [B, s]
            here = torch.arange(start, start + tokens.shape[1], device=padded.device)[None]
            h = self._hidden_states(rows, tokens, here, cache)  # [B, s, D]
            last = h.new_zeros(len(rows), h.shape[-1]) if last is None else last
            found = here == places[:, None]  # bool [B, s], at most one in a row
            last[found.any(dim=1)] = h[found]
        return last

    def _hidden_states(
        self, rows: list[_Row], tokens: Tensor, positions: Tensor, cache: KVCache | None
    ) -> Tensor:
        """Of tokens [B, S] at `positions`, [B, S] or the same for all, [1, S]: [B, S, D]."""
        return hidden_states(
            self.model, tokens, positions.expand_as(tokens), self._mask(positions), cache,
            *self._places(rows),
        )  # fmt: skip

    def _places(self, rows: list[_Row]) -> tuple[Tensor, Tensor]:
        """How long their prompts are, and which texts they are: int64 [B] each."""
        lengths = self._tensor([len(row.ids) for row in rows])
        return lengths, self._tensor([row.index for row in rows])

    def _mask(self, positions: Tensor) -> Tensor:
        """Which slots of the cache tokens at `positions` [B, S] see: bool [B, S, T]."""
        slots = torch.arange(int(positions.max()) + 1, device=positions.device)[None]  # [1, T]
        return visible(positions, slots, window_of(self.model))

    def _allowed(self, ignore_eos: bool) -> Tensor:
        """Which ids may be generated: bool [V], V those of the model."""
        ids = torch.arange(self.model.tok_embeddings.num_embeddings)
        allowed = ids < self.tokenizer.n_words
        for name in ("bos_id", "pad_id"):
            token = _special(self.tokenizer, name)
            if token is not None and token != self.eos_id:
                allowed[token] = False
        if ignore_eos and self.eos_id is not None:
            allowed[self.eos_id] = False
        return allowed.to(self._device)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _tensor(self, numbers: list) -> Tensor:
        return torch.tensor(numbers, device=self._device)


def _sparse_decoding(model: nn.Module) -> SparseDecoding | None:
    """None for a model that has no TopK, or is not known: it decodes densely, as it says."""
    try:
        return None if topk_handle(model) is None else SparseDecoding(model)
    except ConfigError as error:
        logger.info("no sparse decoding: %s", error)
        return None


def _special(tokenizer: Any, name: str) -> int | None:
    """The id of a special token; None where the tokenizer has none, or -1."""
    token = getattr(tokenizer, name, None)
    return None if token is None or token < 0 else token
