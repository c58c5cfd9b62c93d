"""Which process reads which lines of a source.

The files, sorted by name, are laid end to end and cut into equal shares, one a process;
a file that several processes share is cut by line index modulo a block size. Where the
number of processes is a multiple of the number of files this is Lingua's rule.
"""

import math
import os
import stat
from pathlib import Path

from lingua._jsonl import JSONLPart, JSONLState, start_of
from lingua._watched import shown
from lingua.errors import ConfigError, DataError

TRAIN_DATA_FILE_PATTERN = "*.chunk.*.jsonl"


def source_folder(root_dir: str | None, source: str) -> Path:
    """The folder of a source. ConfigError where there is none, or its name leads out of `root_dir`.

    An absolute path says where it is; a link within `root_dir` may lead anywhere.
    """
    if root_dir and ".." in Path(source).parts:
        raise ConfigError(
            f"data.sources: {shown(source)} leads out of data.root_dir={root_dir}: give the name of"
            " a folder within it, or an absolute path"
        )
    folder = Path(root_dir or "") / source
    if not os.path.isdir(folder):
        raise ConfigError(
            f"data.sources: {shown(source)} is not a folder in data.root_dir={root_dir} (looked for"
            f" {shown(folder)}): prepare it with python -m apps.topk.prepare, or correct the name"
        )
    return folder


def find_and_sanitize_chunks(
    dataset_path: str | Path, world_size: int, file_pattern: str = TRAIN_DATA_FILE_PATTERN
) -> list[str]:
    """The files of a source, sorted; for any number of processes all of them.

    DataError where no file in the folder matches `file_pattern`, and where something that
    does is no file that can be read: left out silently, it would be missed by nobody.
    """
    chunks = sorted(
        str(path)
        for path in Path(dataset_path).glob(file_pattern)
        if not path.name.startswith(".") and _is_file(path)
    )
    if not chunks:
        raise DataError(
            f"{shown(dataset_path)} holds no file called {file_pattern}"
            f"{_why_unlisted(dataset_path)}: prepare it with python -m apps.topk.prepare, or name"
            " the folder that holds such files"
        )
    return chunks


def _is_file(path: Path) -> bool:
    """False for a folder. DataError for what is neither, a link to nothing for example."""
    try:
        mode = path.stat().st_mode
        problem = "it is no regular file"
    except OSError as error:
        mode, problem = 0, error.strerror or error
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return stat.S_ISREG(mode)
    raise DataError(
        f"{shown(path)} cannot be read ({problem}): put a file there, or remove or rename it"
    )


def _why_unlisted(folder: str | Path) -> str:
    """Why the files of a folder cannot be seen; "" where they can."""
    try:
        os.listdir(folder)
    except OSError as error:
        return f" that can be seen ({error.strerror or error})"
    return ""


def parts_of_rank(files: list[str], rank: int, world_size: int) -> list[JSONLPart]:
    """The share of process `rank` of `world_size`: whole files, and parts of at most two.

    Every file is cut into W / gcd(F, W) classes of lines (F files, W processes), and each
    process takes F / gcd(F, W) classes in a row. So every line has exactly one reader.
    """
    common = math.gcd(len(files), world_size)
    n_classes, n_taken = world_size // common, len(files) // common
    first, stop = rank * n_taken, (rank + 1) * n_taken
    parts = []
    for index in range(first // n_classes, math.ceil(stop / n_classes)):
        start = max(first - index * n_classes, 0)
        end = min(stop - index * n_classes, n_classes)
        is_whole = end - start == n_classes
        parts.append(
            JSONLPart(
                file_path=files[index],
                block_size=1 if is_whole else n_classes,
                offset=start,
                n_offsets=1 if is_whole else end - start,
            )
        )
    return parts


def distribute_data_to_rank(
    dataset_path: str | Path,
    rank: int,
    world_size: int,
    file_pattern: str = TRAIN_DATA_FILE_PATTERN,
) -> JSONLState:
    """The state in which process `rank` begins to read its share of a source."""
    files = find_and_sanitize_chunks(dataset_path, world_size, file_pattern)
    return start_of(parts_of_rank(files, rank, world_size))
