"""Bars on a terminal, nothing elsewhere."""

from collections.abc import Iterable, Iterator
from typing import Any

from tqdm import tqdm


def bar(what: str, total: int | None, unit: str = "") -> tqdm:
    """A bar of `total` units, with an estimate of the time left where the total is known."""
    return tqdm(
        desc=what, total=total or None, disable=None, leave=False, unit=unit, unit_scale=True
    )


def ticking(items: Iterable[Any], shown: tqdm) -> Iterator[Any]:
    """`items`, each moving the bar by one."""
    for item in items:
        yield item
        shown.update()
