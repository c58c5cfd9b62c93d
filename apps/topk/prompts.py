"""Prompts: from the command line, from a file, from what is piped in."""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from apps.topk.cli import one_line
from lingua_topk.errors import ConfigError


def read_prompts(given: Sequence[str], file: str) -> list[str] | None:
    """The prompts of a command line and of a file, "" for none; else those of the standard input.

    None where that is a terminal, and they are to be asked for. ConfigError for a file that
    cannot be read, and where there is no prompt.
    """
    texts = [_well_formed(text) for text in given]
    if file:
        texts += _read(Path(file).expanduser())
    elif not texts:
        if sys.stdin is not None and sys.stdin.isatty():
            return None
        texts = _lines(sys.stdin.buffer.read() if sys.stdin else b"", "the standard input")
    if not texts:
        raise ConfigError(f"there is no prompt in {file or 'the standard input'}: give --prompt")
    return texts


def _well_formed(text: str) -> str:
    """Text with U+FFFD for a lone surrogate, as an argument that is not UTF-8 holds them."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def _read(path: Path) -> list[str]:
    try:
        lines = _lines(path.read_bytes(), f"prompts={path}")
    except OSError as error:
        raise ConfigError(
            f"prompts={path} cannot be read ({error.strerror}): give a file"
        ) from None
    return [_from_json(line, path) for line in lines] if path.suffix == ".jsonl" else lines


def _lines(content: bytes, origin: str) -> list[str]:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{origin}: line {line} is not UTF-8: convert it") from None
    # Not splitlines(), which also cuts at characters that a prompt may hold.
    return [line for line in text.replace("\r\n", "\n").split("\n") if line.strip()]


def _from_json(line: str, path: Path) -> str:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        content = None
    text = content.get("prompt") if isinstance(content, dict) else content
    if not isinstance(text, str):
        raise ConfigError(
            f"prompts={path}: the line {one_line(line)[:60]!r} is neither a JSON string nor an"
            ' object with a string "prompt": correct it'
        )
    return _well_formed(text)
