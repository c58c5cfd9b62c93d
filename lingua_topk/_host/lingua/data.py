"""From JSON lines on disk to batches of token ids.

Every stage is a generator that yields an item and the state after it; a stage's state
holds that of the stage below as `it_state`, so the state beside a batch, plain JSON,
is all that is needed to go on after that batch:

    read_share -> choose_source -> tokenize -> pack_tokens -> batch_and_shuffle_...
"""

import contextlib
import logging
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Optional, TypedDict

import numpy as np

from lingua._background import async_iterator, consume_buffer, feed_buffer
from lingua._jsonl import (
    Document,
    JSONLState,
    loop_on_jsonl,
    read_jsonl,
    text_of,
)
from lingua._packing import (
    PackTokensState,
    PrefetchState,
    batch_and_shuffle_prefetched_sequences,
    get_empty_buffer_state,
    pack_tokens,
)
from lingua._shares import (
    TRAIN_DATA_FILE_PATTERN,
    distribute_data_to_rank,
    find_and_sanitize_chunks,
)
from lingua._sources import (
    MultiChoiceState,
    choose_source,
    init_choice_state,
    open_sources,
    setup_sources,
)
from lingua._tally import MAX_MALFORMED_SHARE
from lingua.errors import ConfigError, UserError
from lingua.tokenizer import Tokenizer, TokenizerArgs, build_tokenizer

logger = logging.getLogger(__name__)


@dataclass
class DataArgs:
    root_dir: Optional[str] = None  # noqa: UP045
    sources: dict[str, float] = field(default_factory=dict)  # folder: weight
    batch_size: int = 2  # sequences a data-parallel process
    seq_len: int = 2048
    n_views: int = 2  # view v of a sequence is shifted by v tokens
    seed: int = 42
    add_bos: bool = True
    add_eos: bool = True
    load_async: bool = True
    prefetch_size: int = 64  # batches: the window of shuffling, and the queue's length
    # Share of a file's lines (of the first 100 at least) beyond which malformed ones stop the
    # run: with 0 the first one does, with 1 none. Not part of the state: it may be changed.
    max_malformed: float = MAX_MALFORMED_SHARE
    tokenizer: TokenizerArgs = field(default_factory=TokenizerArgs)


class TokenizerState(TypedDict):
    it_state: MultiChoiceState
    add_bos: bool
    add_eos: bool
    name: str
    path: str | None


def tokenize(
    iterator: Iterable[tuple[dict, MultiChoiceState]],
    add_bos: bool,
    add_eos: bool,
    tokenizer_type: str,
    tokenizer_path: str | None = None,
) -> Iterator[tuple[list[int], TokenizerState]]:
    """The token ids of every document that has any. The others are rejected."""
    tokenizer = build_tokenizer(tokenizer_type, tokenizer_path)
    for document, state in iterator:
        tokens = _encoded(tokenizer, document, add_bos, add_eos)
        if len(tokens) == 0:
            continue
        yield (
            tokens,
            TokenizerState(
                it_state=state,
                add_bos=add_bos,
                add_eos=add_eos,
                name=tokenizer_type,
                path=tokenizer_path,
            ),
        )


def _encoded(tokenizer: Tokenizer, document: dict, add_bos: bool, add_eos: bool) -> list[int]:
    """The token ids of a document; none where it is rejected.

    What the tokenizer cannot encode counts as a malformed line: one such document costs no
    run, and a tokenizer that can encode none is noticed all the same.
    """
    try:
        tokens = tokenizer.encode(text_of(document), add_bos=add_bos, add_eos=add_eos)
    except BaseException as error:
        if not (isinstance(document, Document) and _is_about_the_text(error)):
            raise
        what = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        document.reject(f"the tokenizer failed: {what}", malformed=True)
        return []
    if len(tokens) == 0 and isinstance(document, Document):
        document.reject("no token")
    return tokens


def _is_about_the_text(error: BaseException) -> bool:
    """Whether it may have been raised for what the text is, and not for a wrong setting."""
    if isinstance(error, UserError | MemoryError | ImportError):
        return False
    # A panic in tiktoken's Rust code comes as an exception that is no Exception.
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def init_state(
    root_dir: str | None,
    sources: dict[str, float],
    batch_size: int,
    prefetch_size: int,
    seq_len: int,
    n_views: int,
    seed: int,
    rank: int,
    world_size: int,
    add_bos: bool,
    add_eos: bool,
    tokenizer_name: str,
    tokenizer_path: str | None = None,
    file_pattern: str = TRAIN_DATA_FILE_PATTERN,
) -> PrefetchState:
    """The state of a loader that has yielded nothing. ConfigError, DataError."""
    for name, value in (
        ("batch_size", batch_size),
        ("prefetch_size", prefetch_size),
        ("seq_len", seq_len),
        ("n_views", n_views),
    ):
        if value < 1:
            raise ConfigError(f"data.{name}={value} is too small: give at least 1")
    if seed < 0:
        raise ConfigError(f"data.seed={seed} is not allowed: give a number of at least 0")
    choice = init_choice_state(root_dir, sources, seed, rank, world_size, file_pattern)
    tokens = TokenizerState(
        it_state=choice,
        add_bos=add_bos,
        add_eos=add_eos,
        name=tokenizer_name,
        path=tokenizer_path,
    )
    packed = PackTokensState(
        start_token=0, it_state=tokens, output_seq_len=seq_len, n_views=n_views, seq_len=0
    )
    return PrefetchState(
        it_state=packed,
        seq_idx=0,
        rng_state=np.random.default_rng((seed + 1, rank, world_size)).bit_generator.state,
        batch_size=batch_size,
        prefetch_size=prefetch_size,
    )


def build_dataloader(
    state: PrefetchState,
) -> AbstractContextManager[Iterator[tuple[np.ndarray, PrefetchState]]]:
    """An endless iterator of (batch, state after it); batches are int64 [B, S, V]."""
    return _build_dataloader(state, MAX_MALFORMED_SHARE)


@contextlib.contextmanager
def _build_dataloader(
    state: PrefetchState, max_malformed: float
) -> Iterator[Iterator[tuple[np.ndarray, PrefetchState]]]:
    packed = state["it_state"]
    tokens = packed["it_state"]
    choice = tokens["it_state"]
    with contextlib.ExitStack() as stack:
        iterators = open_sources(choice, max_malformed)
        for iterator in iterators.values():
            stack.enter_context(contextlib.closing(iterator))
        documents = choose_source(
            source_to_iterator=iterators,
            source_to_state=choice["source_to_state"],
            root_dir=choice["root_dir"],
            sources=choice["sources"],
            rng_state=choice["rng_state"],
        )
        ids = tokenize(
            documents, tokens["add_bos"], tokens["add_eos"], tokens["name"], tokens["path"]
        )
        yield batch_and_shuffle_prefetched_sequences(
            data_loader=pack_tokens(ids, packed),
            batch_size=state["batch_size"],
            prefetch_size=state["prefetch_size"],
            seq_len=packed["output_seq_len"],
            n_views=packed["n_views"],
            state=state,
        )


def init_dataloader_state_from_args(args: DataArgs, rank: int, world_size: int) -> PrefetchState:
    """`init_state` for data-parallel process `rank` of `world_size`."""
    _check_max_malformed(args.max_malformed)
    return init_state(
        root_dir=args.root_dir,
        sources=args.sources,
        batch_size=args.batch_size,
        prefetch_size=args.prefetch_size,
        seq_len=args.seq_len,
        n_views=args.n_views,
        seed=args.seed,
        rank=rank,
        world_size=world_size,
        add_bos=args.add_bos,
        add_eos=args.add_eos,
        tokenizer_name=args.tokenizer.name,
        tokenizer_path=args.tokenizer.path,
    )


def build_dataloader_from_args(
    args: DataArgs, state: PrefetchState | None = None
) -> AbstractContextManager[Iterator[tuple[np.ndarray, PrefetchState]]]:
    """`build_dataloader`, in a process of its own if args.load_async.

    state: default, the beginning for a single process. A given state is what counts: of
    `args` only load_async, the queue's length and max_malformed are used, and what else
    differs is logged.
    """
    _check_max_malformed(args.max_malformed)
    if state is None:
        state = init_dataloader_state_from_args(args, rank=0, world_size=1)
    else:
        _report_ignored(args, state)
    builder = partial(_build_dataloader, state, args.max_malformed)
    return async_iterator(args.prefetch_size, builder) if args.load_async else builder()


def _check_max_malformed(value: float) -> None:
    if not (isinstance(value, int | float) and 0 <= value <= 1):  # nan is not
        raise ConfigError(
            f"data.max_malformed={value} is not allowed: give the share of malformed lines at which"
            " to stop, from 0 (at the first one) to 1 (never)"
        )


def _report_ignored(args: DataArgs, state: PrefetchState) -> None:
    """Warn of arguments that do not take effect, because the state says otherwise."""
    packed = state["it_state"]
    tokens = packed["it_state"]
    for name, given, saved in (
        ("root_dir", args.root_dir, tokens["it_state"]["root_dir"]),
        ("sources", dict(args.sources), tokens["it_state"]["sources"]),
        ("batch_size", args.batch_size, state["batch_size"]),
        ("prefetch_size", args.prefetch_size, state["prefetch_size"]),
        ("seq_len", args.seq_len, packed["output_seq_len"]),
        ("n_views", args.n_views, packed["n_views"]),
        ("add_bos", args.add_bos, tokens["add_bos"]),
        ("add_eos", args.add_eos, tokens["add_eos"]),
        ("tokenizer.name", args.tokenizer.name, tokens["name"]),
        ("tokenizer.path", args.tokenizer.path, tokens["path"]),
    ):
        if given != saved:
            logger.warning(
                "data.%s=%s is ignored: the loader goes on as it began, with %s", name, given, saved
            )


__all__ = [
    "TRAIN_DATA_FILE_PATTERN",
    "DataArgs",
    "JSONLState",
    "MultiChoiceState",
    "PackTokensState",
    "PrefetchState",
    "TokenizerArgs",
    "TokenizerState",
    "async_iterator",
    "batch_and_shuffle_prefetched_sequences",
    "build_dataloader",
    "build_dataloader_from_args",
    "build_tokenizer",
    "choose_source",
    "consume_buffer",
    "distribute_data_to_rank",
    "feed_buffer",
    "find_and_sanitize_chunks",
    "get_empty_buffer_state",
    "init_choice_state",
    "init_dataloader_state_from_args",
    "init_state",
    "loop_on_jsonl",
    "pack_tokens",
    "read_jsonl",
    "setup_sources",
    "tokenize",
]
