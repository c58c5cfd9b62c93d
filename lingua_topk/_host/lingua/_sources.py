"""Documents from several sources, drawn by their weights."""

import sys
from collections.abc import Iterator
from typing import Any, TypedDict

import numpy as np

from lingua._jsonl import Document, JSONLState, read_share
from lingua._shares import distribute_data_to_rank, source_folder
from lingua._tally import MAX_MALFORMED_SHARE
from lingua.errors import ConfigError


class MultiChoiceState(TypedDict):
    root_dir: str | None
    sources: dict[str, float]
    source_to_state: dict[str, JSONLState]
    rng_state: dict[str, Any]


def init_choice_state(
    root_dir: str | None,
    sources: dict[str, float],
    seed: int,
    rank: int,
    world_size: int,
    file_pattern: str,
) -> MultiChoiceState:
    """The state in which process `rank` of `world_size` begins to read its sources.

    ConfigError for sources or weights that are not allowed, DataError for an empty folder.
    """
    if not sources:
        raise ConfigError(
            "data.sources is empty: name at least one folder below data.root_dir and its weight,"
            " for example {my_corpus: 1.0}"
        )
    for source, weight in sources.items():
        # OmegaConf lets a mapping stand for a number: a name with a dot gives one.
        if not (isinstance(weight, int | float) and 0 < weight <= sys.float_info.max):
            raise ConfigError(
                f"data.sources: weight {weight} of {source} is not allowed: give a number above 0,"
                " or leave the source out"
            )
    source_to_state = {}
    for source in sources:
        folder = source_folder(root_dir, source)
        source_to_state[source] = distribute_data_to_rank(folder, rank, world_size, file_pattern)
    return MultiChoiceState(
        root_dir=root_dir,
        sources=dict(sources),
        source_to_state=source_to_state,
        rng_state=np.random.default_rng((seed, rank, world_size)).bit_generator.state,
    )


def setup_sources(
    multi_state: MultiChoiceState,
) -> dict[str, Iterator[tuple[Document, JSONLState]]]:
    """For every source an endless iterator of its documents and the state after each."""
    return open_sources(multi_state, MAX_MALFORMED_SHARE)


def open_sources(
    multi_state: MultiChoiceState, max_malformed: float
) -> dict[str, Iterator[tuple[Document, JSONLState]]]:
    """`setup_sources` that allows another share of malformed lines."""
    states = multi_state["source_to_state"].items()
    return {source: read_share(state, max_malformed) for source, state in states}


def choose_source(
    source_to_iterator: dict[str, Iterator[tuple[Document, JSONLState]]],
    source_to_state: dict[str, JSONLState],
    root_dir: str | None,
    sources: dict[str, float],
    rng_state: dict[str, Any],
) -> Iterator[tuple[Document, MultiChoiceState]]:
    """Documents, each from a source drawn with a probability proportional to its weight."""
    rng = np.random.default_rng()
    rng.bit_generator.state = rng_state
    names = list(sources)
    weights = np.array([sources[name] for name in names], dtype=np.float64)
    if weights.max() > sys.float_info.max / len(weights):  # their sum may be no number
        weights /= weights.max()
    # Generator.choice(len(names), p=...), without its checks at every draw.
    cumulated = np.cumsum(weights / weights.sum())
    cumulated /= cumulated[-1]
    while True:
        source = names[np.searchsorted(cumulated, rng.random(), side="right")]
        document, state = next(source_to_iterator[source])
        source_to_state = {**source_to_state, source: state}
        yield (
            document,
            MultiChoiceState(
                root_dir=root_dir,
                sources=sources,
                source_to_state=source_to_state,
                rng_state=rng.bit_generator.state,
            ),
        )
