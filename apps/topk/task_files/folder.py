"""The folder of tasks: written whole or not at all, and recognised when it is there.

OUT/TASK.jsonl        the items, one a line
OUT/TASK.yaml         the harness's config, which names that file by its absolute path
OUT/provenance.json   flags, sources, counts, and size and checksum of each file
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import yaml

from apps.topk.corpus.output import describe_files, differences, publish, write_bytes
from apps.topk.provenance import provenance, write_json
from apps.topk.task_files.task import Task
from lingua_topk.errors import ConfigError, DataError

PROVENANCE = "provenance.json"
PROGRAM = "apps.topk.tasks"
# Raised when the same flags begin to give other files.
FORMAT = 1
# The reader of the items takes a path for a pattern.
_PATTERN_SIGNS = ("*", "?", "[", "]", "::")


def absolute(out: str) -> Path:
    """The folder that `out` names, or ConfigError where it cannot be one."""
    folder = Path(out).expanduser().resolve()
    if not out or folder == folder.parent or (folder.exists() and not folder.is_dir()):
        raise ConfigError(f"out={out!r} cannot be a folder to write: give the path of a new one")
    signs = [sign for sign in _PATTERN_SIGNS if sign in str(folder)]
    if signs or not str(folder).isprintable():
        raise ConfigError(
            f"out={out!r} is {str(folder)!r}, a path from which lm-eval cannot read (it holds"
            f" {' '.join(signs) or 'what cannot be printed'}): choose another folder"
        )
    return folder


def find_finished(folder: Path, inputs: dict[str, Any]) -> dict[str, Any] | None:
    """The record in `folder` when it was made from `inputs` and is whole.

    None when there is nothing in the way of writing it. ConfigError for a folder made from
    something else, DataError for a damaged one.
    """
    try:
        if not folder.exists() or not any(folder.iterdir()):
            return None
        record, files = _read_record(folder), describe_files(folder)
    except OSError as error:
        raise ConfigError(f"out={str(folder)!r} cannot be read: {error}") from None
    found = differences(inputs, record["inputs"])
    if record["format"] != FORMAT:
        found.append(f"format={FORMAT} (there: {record['format']})")
    if found:
        raise ConfigError(
            f"out={str(folder)!r} was made with other inputs: {', '.join(found)}; choose another"
            " --out, or remove that folder"
        )
    for name, described in record["files"].items():
        if files.get(name) != described:
            raise DataError(
                f"{folder / name} is missing or changed since it was made: remove {folder} to have"
                " it made anew"
            )
    return record


def write(folder: Path, tasks: list[Task], inputs: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """Make `folder` of `tasks`, at once; what provenance.json then holds."""
    new = folder.with_name(f".{folder.name}.tasks-{os.getpid()}")
    try:
        new.mkdir(parents=True)
        for task in tasks:
            _write_task(new, task, folder / f"{task.name}.jsonl")
        record = provenance(
            program=PROGRAM,
            format=FORMAT,
            inputs=inputs,
            tasks={task.name: len(task.items) for task in tasks},
            **fields,
            files=describe_files(new),
        )
        write_json(new / PROVENANCE, record)
        publish(new, folder, replace=False)
    except OSError as error:
        raise ConfigError(f"out={str(folder)!r} cannot be written: {error}") from None
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return record


def _write_task(new: Path, task: Task, items_file: Path) -> None:
    lines = [json.dumps(item, ensure_ascii=False) + "\n" for item in task.items]
    write_bytes(new / items_file.name, "".join(lines).encode("utf-8"))
    config = yaml.safe_dump(task.config(items_file), sort_keys=False, allow_unicode=True)
    write_bytes(new / f"{task.name}.yaml", config.encode("utf-8"))


def _read_record(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
        parts = [record[part] for part in ("inputs", "tasks", "files")]
        if record["program"] == PROGRAM and all(isinstance(part, dict) for part in parts):
            return {"format": None, **record}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        pass
    raise ConfigError(
        f"out={str(folder)!r} is there already and {PROGRAM} did not make it (no {PROVENANCE} says"
        " so): choose another --out"
    )
