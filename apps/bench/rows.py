"""Rows of results: one CSV file a benchmark, to which measurements are added."""

import csv
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from apps.topk.provenance import provenance
from lingua_topk.errors import DataError

RESULTS = Path(__file__).parent / "results"


def machine() -> str:
    """What the numbers were measured on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"


def origin() -> dict[str, Any]:
    """The fields that a row begins with: when, where and with which versions it was measured."""
    made_by = provenance()
    return {
        "date": made_by["created_at"],
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "commit": made_by["commit"],
        "torch": made_by["torch"],
        "numpy": _version("numpy"),
        "triton": _version("triton"),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def append(path: Path, row: dict[str, Any]) -> None:
    """Add a row to a CSV file, which is made where it is not there.

    Its columns are the fields of the first row, in their order; a row with other fields, or in
    another order, is refused: DataError.
    """
    path.parent.mkdir(exist_ok=True)
    is_new = not path.exists() or path.stat().st_size == 0
    if not is_new:
        _check_columns(path, list(row))
    with open(path, "a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def _check_columns(path: Path, fields: list[str]) -> None:
    with open(path, encoding="utf-8", newline="") as file:
        columns = next(csv.reader(file), [])
    if columns != fields:
        different = sorted(set(columns) ^ set(fields)) or "their order"
        raise DataError(
            f"{path} has other columns than this row (different: {different}): rename the file,"
            " and a new one is begun"
        )


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, oldest first; none where there is no file."""
    if not path.exists():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
