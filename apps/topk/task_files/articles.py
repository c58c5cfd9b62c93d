"""The articles of a WikiText file, each a document.

The text is the file's own: words and punctuation are set apart by spaces, as in " said @-@ so ,".
The harness's task `wikitext` undoes that before it scores a text, so its numbers are others.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from apps.topk.task_files.questions import read_text
from apps.topk.task_files.task import Task, rolling_task
from lingua_topk.errors import DataError

# One sign of equality on each side: " = = Early life = = " is a section.
_TITLE = re.compile(r" = (?!= ).*\S = ?")


def wikitext_task(file: Path, said: str) -> Task:
    """The task of a WikiText file; `said` is the flag and its value. DataError."""
    texts = list(articles(read_text(file, said)))
    if not texts:
        raise DataError(
            f"{said} holds no article, which starts at a line ' = Title = ': give one of WikiText's"
            " own files"
        )
    return rolling_task("local_wikitext", texts)


def articles(text: str) -> Iterator[str]:
    """From each title line to the next one; text before the first counts as an article of its
    own, but there is none where no line is a title."""
    lines = text.split("\n")
    titles = _titles(lines)
    for start, end in zip([0, *titles], [*titles, len(lines)], strict=True) if titles else ():
        # Every line but the file's last had its end taken off.
        article = "\n".join(lines[start:end]) + ("\n" if end < len(lines) else "")
        if article.strip():
            yield article


def _titles(lines: list[str]) -> list[int]:
    """The numbers of the lines that are titles, from 0."""
    found = [number for number, line in enumerate(lines) if _TITLE.fullmatch(line)]
    if all(line.strip() for line in lines[:-1]):
        return found  # a copy without blank lines
    # A formula may break a sentence into lines of which one looks like a title. Unlike a title
    # it has no blank lines around it.
    return [number for number in found if _is_apart(lines, number)]


def _is_apart(lines: list[str], number: int) -> bool:
    around = lines[max(number - 1, 0) : number] + lines[number + 1 : number + 2]
    return not any(line.strip() for line in around)
