"""Reading JSON that others may have written or damaged: a wrong field is one clear line."""

import json
from pathlib import Path
from typing import Any

from apps.topk.cli import one_line
from lingua_topk.errors import DataError

# No count of anything comes near it.
LARGEST = 2**63
# Nor of anything measured; squares and products of two stay finite.
LARGEST_NUMBER = 1e150


def as_number(value: Any) -> float | None:
    """A number, or a truth value, as a float; None for all else, and for NaN and infinities."""
    if not isinstance(value, bool | int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if abs(number) < LARGEST_NUMBER else None


class Fields:
    """A JSON object, with where it stands for the messages. DataError for what is not there."""

    def __init__(self, content: Any, place: str):
        if not isinstance(content, dict):
            raise DataError(f"{place} is not a JSON object: {EVALUATE_AGAIN}")
        self.content: dict[str, Any] = content
        self.place = place

    def section(self, name: str) -> "Fields":
        """The object `name`, empty where it is absent or null."""
        content = self.content.get(name)
        place = f"{self.place}: {one_line(name)[:60]}"
        return Fields({} if content is None else content, place)

    def text(self, name: str) -> str | None:
        """The text `name` as one printable line, None for anything else."""
        value = self.content.get(name)
        return one_line(value) if isinstance(value, str) else None

    def number(self, name: str) -> float:
        value = as_number(self.content.get(name))
        if value is None:
            raise self._wrong(name, "a finite number")
        return value

    def positive(self, name: str) -> float:
        value = self.number(name)
        if value <= 0:
            raise self._wrong(name, "above 0")
        return value

    def whole(self, name: str) -> int:
        value = self.content.get(name)
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        if not is_whole or not 0 <= value < LARGEST:
            raise self._wrong(name, "a whole number")
        return value

    def whole_or_none(self, name: str) -> int | None:
        return None if self.content.get(name) is None else self.whole(name)

    def _wrong(self, name: str, kind: str) -> DataError:
        shown = repr(self.content[name])[:60] if name in self.content else "missing"
        return DataError(f"{self.place}: {name} is {shown}, not {kind}: {EVALUATE_AGAIN}")


EVALUATE_AGAIN = "evaluate that checkpoint again (python -m apps.topk.eval --help)"


def read_json(path: Path) -> Fields:
    """The JSON object in a file."""
    return Fields(_parsed(_text_of(path), str(path)), str(path))


def read_json_lines(path: Path) -> list[Fields]:
    """The JSON objects of a file, one a line."""
    lines = _text_of(path).split("\n")
    places = [f"{path}:{number}" for number in range(1, len(lines) + 1)]
    return [
        Fields(_parsed(line, place), place)
        for line, place in zip(lines, places, strict=True)
        if line.strip()
    ]


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = one_line(str(error))[:200]
    raise DataError(f"{path} cannot be read ({reason}): {EVALUATE_AGAIN}")


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = one_line(str(error))[:200]
    raise DataError(f"{place} is not JSON ({reason}): {EVALUATE_AGAIN}")
