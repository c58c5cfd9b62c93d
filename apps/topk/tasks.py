"""Local files in; a folder of lm-evaluation-harness tasks out, for evaluation without a network."""

import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from apps.topk import cli
from apps.topk.corpus import flags
from apps.topk.corpus.local_files import EMPTY_FILES, KINDS, TEXT_KEYS, LocalFiles, describe
from apps.topk.corpus.output import validation_name
from apps.topk.corpus.tally import Tally
from apps.topk.corpus.text_files import COMPRESSIONS, EMPTY, MALFORMED, NO_TEXT, kind
from apps.topk.task_files import folder as task_folder
from apps.topk.task_files.articles import wikitext_task
from apps.topk.task_files.held_out import held_out_tasks
from apps.topk.task_files.questions import arc_task, find_arc, openbookqa_task
from apps.topk.task_files.task import Task
from lingua_topk.errors import ConfigError, DataError

PROGRAM = task_folder.PROGRAM
EXAMPLE = "--text data/mine/mine --out tasks/mine"
MAX_ITEMS = 10_000
MAX_NAME = 60  # characters
VALIDATION_PATTERN = validation_name("*")
# NAMEs of which a task would be called as one of the harness's own tasks or groups is.
TAKEN_NAMES = ("mmlu",)


def main(argv: Sequence[str] | None = None) -> None:
    record = flags.call(make_tasks, PROGRAM, sys.argv[1:] if argv is None else argv, EXAMPLE)
    if record:
        print(summary(record))


def make_tasks(
    *,
    out: str,
    arc: str = "",
    openbookqa: str = "",
    wikitext: str = "",
    text: str = "",
    name: str = "",
    max_items: int = 200,
    seed: int = 42,
) -> dict[str, Any]:
    """Make a folder of lm-evaluation-harness tasks from local files; give at least one source.

    Evaluation on them needs no network: harness.include_path=OUT in a config of apps.topk.eval,
    or --include_path OUT of lm-eval itself. OUT is written whole or not at all, and holds a
    .jsonl and a .yaml file a task and provenance.json. The .yaml files name the .jsonl files
    by absolute path: make the folder where it is to stay. A second run with the same flags and
    sources uses what is there.

    Args:
        out: the folder to write; a new one, or one that is empty.
        arc: a folder with ARC's test files (ARC-Easy-Test.jsonl, ARC-Challenge-Test.jsonl, or
            arc_easy.test.jsonl and so on), at any depth. Gives local_arc_easy and
            local_arc_challenge, with prompts and metrics of lm-eval's arc_easy and
            arc_challenge, and all the questions that the files hold.
        openbookqa: a .jsonl file of OpenBookQA's test questions, with query, choices and gold,
            or as they are published. Gives local_openbookqa, like lm-eval's openbookqa.
        wikitext: a WikiText file such as wiki.test.raw. Gives local_wikitext: perplexity a word
            and a byte, and bits a byte, of whole articles. The text is scored as it is in the
            file (lines ending in LF), " @-@ " and all; lm-eval's wikitext undoes that first
            and so gives other numbers.
        text: a held-out .txt, .jsonl (each also as .gz, .xz or .zst) or .parquet file, or a
            folder with *.val.jsonl files, as apps.topk.prepare makes it. Gives three tasks:
            NAME_rolling (perplexity of whole documents), NAME_last_word (the last word of a
            passage of a few sentences, in one of which it stood before, in the manner of
            LAMBADA) and NAME_continuation (the sentence that follows on a passage, against
            three of like length from other places of the text, in the manner of HellaSwag). One
            for which the text holds no passage is left out, and that is said.
        name: what the tasks of text are called, of a-z, 0-9 and _; by default after the file or
            folder.
        max_items: how many items a task of text has at most; they are drawn from all of the
            text.
        seed: decides which items those are, and the order of the choices.

    Returns: what provenance.json holds; "tasks" are the numbers of items by task.

    Raises: ConfigError for an argument that is not allowed, DataError for a source that
    cannot be used.
    """
    folder = task_folder.absolute(out)
    given = {"arc": arc, "openbookqa": openbookqa, "wikitext": wikitext, "text": text}
    given = {flag: value for flag, value in given.items() if value}
    _check(given, name, max_items)
    name = _checked_name(name or _default_name(text)) if text else ""
    files = {flag: _find(flag, value) for flag, value in given.items()}
    inputs: dict[str, Any] = {"out": str(folder), "sources": _fingerprints(given, files)}
    if text:  # which alone they bear on
        inputs |= {"name": name, "max_items": max_items, "seed": seed}
    record = task_folder.find_finished(folder, inputs)
    if record:
        print(f"already there, from the same flags and sources: {out}")
        return record
    tasks = [
        task
        for flag, value in given.items()
        for task in _tasks(flag, value, files[flag], name, max_items, seed)
    ]
    left_out = [task.name for task in tasks if not task.items]
    tasks = [task for task in tasks if task.items]
    _check_readable(tasks)
    return task_folder.write(folder, tasks, inputs, left_out=left_out)


def summary(record: dict[str, Any]) -> str:
    """The tasks and their items, and the command that evaluates on them."""
    out, names = record["inputs"]["out"], list(record["tasks"])
    width = max(map(len, names))
    lines = [f"tasks in {out}:"]
    lines += [f"  {name:<{width}}{count:>9,} items" for name, count in record["tasks"].items()]
    lines += [f"  {name}: left out, the text holds no passage" for name in record["left_out"]]
    keys = [f"harness.include_path={out}", f"harness.tasks=[{','.join(names)}]"]
    command = ["python", "-m", "apps.topk.eval", "config=...", *map(shlex.quote, keys)]
    return "\n".join([*lines, "to evaluate on them:", f"  {' '.join(command)}"])


def _check(given: dict[str, str], name: str, max_items: int) -> None:
    if not given:
        raise ConfigError("no source is given: give --arc, --openbookqa, --wikitext or --text")
    if name and "text" not in given:
        raise ConfigError(f"name={name!r} is for the tasks of --text, which is not given: leave it")
    if not 1 <= max_items <= MAX_ITEMS:
        raise ConfigError(f"max_items={max_items} is not allowed: give 1 to {MAX_ITEMS:,}")


def _checked_name(name: str) -> str:
    if not re.fullmatch(rf"[a-z0-9][a-z0-9_]{{0,{MAX_NAME - 1}}}", name):
        raise ConfigError(
            f"name={name!r} is not allowed: give up to {MAX_NAME} of a-z, 0-9 and _, not _ first"
        )
    if name in TAKEN_NAMES:
        raise ConfigError(
            f"name={name!r} would give a task the name of one of lm-eval's own: choose another"
            " --name"
        )
    return name


def _default_name(text: str) -> str:
    stem = Path(text).expanduser().resolve().name
    for suffix in (*COMPRESSIONS, *KINDS):
        stem = re.sub(re.escape(suffix) + "$", "", stem, flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9]+", "_", stem.lower()).strip("_")[:MAX_NAME] or "text"


def _find(flag: str, value: str) -> list[Path]:
    """The files of the source that a flag names. ConfigError, DataError."""
    path, said = Path(value).expanduser(), _said(flag, value)
    if flag == "text":
        return _text_files(path, said)
    if flag == "arc":
        if not path.is_dir():
            raise ConfigError(f"{said} is not a folder: give the one with ARC's .jsonl files")
        return find_arc(path, said)
    if not path.is_file():
        raise ConfigError(f"{said} is not a file: give the path of one")
    return [path]


def _text_files(path: Path, said: str) -> list[Path]:
    files = [path] if path.is_file() else sorted(path.glob(VALIDATION_PATTERN))
    if not files:
        raise DataError(
            f"{said} is neither a file nor a folder with {VALIDATION_PATTERN} files: give one, such"
            " as the folder that python -m apps.topk.prepare makes in its --out"
        )
    if kind(files[0]) not in KINDS:
        raise DataError(
            f"{said} is no {'/'.join(KINDS)} file (.txt and .jsonl also with"
            f" {'/'.join(COMPRESSIONS)}): give one"
        )
    return files


def _fingerprints(given: dict[str, str], files: dict[str, list[Path]]) -> list[dict[str, Any]]:
    """Equal for two runs as far as one can tell cheaply only if they read the same."""
    roots = {flag: Path(value).expanduser() for flag, value in given.items()}
    return [
        {"flag": flag, "path": str(root.resolve()), "files": describe(root, files[flag])}
        for flag, root in roots.items()
    ]


def _tasks(
    flag: str, value: str, files: list[Path], name: str, max_items: int, seed: int
) -> list[Task]:
    said = _said(flag, value)
    if flag == "text":
        return held_out_tasks(name, _texts(files, said), max_items, seed)
    make = {"arc": arc_task, "openbookqa": openbookqa_task, "wikitext": wikitext_task}[flag]
    return [make(file, said) for file in files]


def _texts(files: list[Path], said: str) -> Iterator[str]:
    """Every document of a held-out text. DataError where a line gives none."""
    tally = Tally()
    for file in files:
        try:
            yield from LocalFiles(file, str(file), TEXT_KEYS).documents(tally)
        except DataError as error:
            _check_lines(tally, said)
            if tally.counts.keys() & {EMPTY, EMPTY_FILES}:
                raise DataError(f"{said}: {file} holds no document: give one that does") from None
            raise DataError(f"{said}: {error}") from None
        _check_lines(tally, said)
    for line in tally.lines():
        print(line)


def _check_lines(tally: Tally, said: str) -> None:
    """DataError where lines were met that hold no text: what is left would be another test."""
    for reason in (MALFORMED, NO_TEXT):
        if reason in tally.counts:
            raise DataError(
                f"{said}: {tally.examples[reason][0]}; each line of a .jsonl file is an object with"
                f" {' or '.join(TEXT_KEYS)}: correct or remove the line"
                f" ({tally.counts[reason]:,} such)"
            )


def _said(flag: str, value: str) -> str:
    return f"{flag}={value!r}"


def _check_readable(tasks: list[Task]) -> None:
    for task in tasks:
        if field := task.field_of_dates():
            raise DataError(
                f"{task.name}: every {field} is a date, which lm-eval would not read as text: give"
                " another text"
            )


if __name__ == "__main__":
    cli.run(main)
