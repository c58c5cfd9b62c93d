"""Multiple-choice questions: the files of ARC and of OpenBookQA.

The prompts are those of the harness's own tasks arc_easy, arc_challenge and openbookqa.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from apps.topk.corpus.local_files import files_below
from apps.topk.task_files.task import Task, choice_task
from lingua_topk.errors import DataError

ALPHABETS = ("ABCDE", "12345")
ARC_CHOICES = range(3, 6)
# ARC-Easy-Test.jsonl as it is published, arc_easy.test.jsonl and so on.
_ARC_NAME = re.compile(r"arc[-_.](easy|challenge)[-_.]test\.jsonl", re.IGNORECASE)

ARC_FORM = (
    '{"question": {"stem": ..., "choices": [{"text": ..., "label": ...}, ...]}, "answerKey": ...}'
    " with 3 to 5 choices, labelled A-E or 1-5"
)
OPENBOOKQA_FORM = '{"query": ..., "choices": [...], "gold": index}, or the form of ARC'

Question = tuple[str, list[str], int]  # stem, choices, index of the right one


class _NoQuestion(ValueError):
    """What is wrong with a record."""


def find_arc(folder: Path, said: str) -> list[Path]:
    """The test files below a folder, one a task; `said` is the flag and its value. DataError."""
    found: dict[str, Path] = {}
    for file in files_below(folder):
        if not _ARC_NAME.fullmatch(file.name):
            continue
        name = arc_name(file)
        if name in found:
            raise DataError(
                f"{said} holds both {found[name]} and {file}: give a folder with one of them"
            )
        found[name] = file
    if not found:
        raise DataError(
            f"{said} holds neither ARC-Easy-Test.jsonl nor ARC-Challenge-Test.jsonl (nor"
            " arc_easy.test.jsonl, arc_challenge.test.jsonl): give the folder that does"
        )
    return [found[name] for name in sorted(found, reverse=True)]  # the easy ones first


def arc_name(file: Path) -> str:
    """What the task of a file that `find_arc` found is called."""
    return f"local_arc_{_ARC_NAME.fullmatch(file.name)[1].lower()}"


def arc_task(file: Path, said: str) -> Task:
    """The task of one ARC file. DataError names a line that is no question."""
    items = [
        {"query": f"Question: {stem}\nAnswer:", "choices": choices, "gold": gold}
        for stem, choices, gold in _questions(file, said, arc_question, ARC_FORM)
    ]
    return choice_task(arc_name(file), items)


def openbookqa_task(file: Path, said: str) -> Task:
    """The task of an OpenBookQA file. DataError names a line that is no question."""
    items = [
        {"query": stem, "choices": choices, "gold": gold}
        for stem, choices, gold in _questions(file, said, openbookqa_question, OPENBOOKQA_FORM)
    ]
    return choice_task("local_openbookqa", items)


def arc_question(record: dict[str, Any]) -> Question:
    question = record.get("question")
    options = question.get("choices") if isinstance(question, dict) else None
    if not isinstance(options, list) or not all(isinstance(one, dict) for one in options):
        raise _NoQuestion("it has no question with choices")
    if len(options) not in ARC_CHOICES:
        raise _NoQuestion(f"it has {len(options)} choices")
    labels, key = [one.get("label") for one in options], record.get("answerKey")
    known = any(all(_is_letter(label, letters) for label in labels) for letters in ALPHABETS)
    if not known or len(set(labels)) < len(labels):
        raise _NoQuestion(f"its labels are {labels}")
    key = key.strip() if isinstance(key, str) else key
    if key not in labels:
        raise _NoQuestion(f"its answerKey {key!r} is none of its labels {labels}")
    texts = [_text(one.get("text"), f"choice {one['label']}") for one in options]
    return _text(question.get("stem"), "question.stem"), texts, labels.index(key)


def openbookqa_question(record: dict[str, Any]) -> Question:
    if "question" in record:
        return arc_question(record)
    options, gold = record.get("choices"), record.get("gold")
    if not isinstance(options, list) or len(options) < 2:
        raise _NoQuestion("it has no list of at least two choices")
    if type(gold) is not int or not 0 <= gold < len(options):
        raise _NoQuestion(f"its gold is {gold!r}, which counts none of its {len(options)} choices")
    texts = [_text(option, f"choice {number}") for number, option in enumerate(options)]
    return _text(record.get("query"), "query"), texts, gold


def _questions(
    file: Path, said: str, read: Callable[[dict[str, Any]], Question], form: str
) -> list[Question]:
    """The question of every line that is not blank."""
    questions = []
    for number, line in _lines(file, said):
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise _NoQuestion("it is no JSON object")
            questions.append(read(record))
        except (ValueError, RecursionError) as error:
            reason = error if isinstance(error, _NoQuestion) else "it is no JSON"
            raise DataError(
                f"{said}: {file}:{number} is no question, {reason}: a line is {form}; correct or"
                " remove it"
            ) from None
    if not questions:
        raise DataError(f"{said}: {file} holds no question: give a file with lines of {form}")
    return questions


def _lines(file: Path, said: str) -> Iterator[tuple[int, str]]:
    text = read_text(file, said)
    # Not splitlines: a JSON string may hold U+2028 and its like.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line


def read_text(file: Path, said: str) -> str:
    """A UTF-8 file with \\r\\n made \\n. DataError."""
    try:
        content = file.read_bytes()
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(f"{said}: {file}:{line} is not UTF-8: convert the file") from None
    except OSError as error:
        raise DataError(f"{said}: {file} cannot be read: {error.strerror or error}") from None


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise _NoQuestion(f"its {what} is no text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise _NoQuestion(f"its {what} holds half of a surrogate pair") from None
    return value


def _is_letter(label: Any, letters: str) -> bool:
    return isinstance(label, str) and len(label) == 1 and label in letters
