"""Vectors of words: from a text file, a sentence-transformers model, or the model's embeddings.

The first two know words from elsewhere. The model's own embeddings need nothing and are always
there, but what is measured with them is circular, and their label says so.
"""

import gzip
import importlib
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from lingua_topk.errors import ConfigError, DataError

GZIP_MAGIC = b"\x1f\x8b"
CHECKED_BYTES = 2**16  # of the start of a file, for whether it is text
SENTENCE_TRANSFORMER_FILES = ("modules.json", "config_sentence_transformers.json")
EMBEDDINGS_LABEL = "the model's own embeddings, of words that are one token: circular"

_CLASS_OF_PACKAGE = re.compile(r"sentence_transformers(\.[a-z_]+)*\.[A-Z][A-Za-z0-9]*")

# How a line of a file stands for a wanted word; a higher one takes the place of a lower one.
_LOWER_CASED, _AS_WRITTEN = 1, 2


@dataclass(frozen=True)
class Vectors:
    """A vector for each of W words.

    Attributes:
        vectors: float32 [W, E], of unit length; 0 for a word without one.
        found: bool [W], which words have one.
        source: where they come from, for the results.
    """

    vectors: np.ndarray
    found: np.ndarray
    source: str


def read_vectors(
    spec: str, words: Sequence[str], embedding: Tensor, encode: Callable[[str], list[int]]
) -> Vectors:
    """Vectors from a text file, from the folder of a sentence-transformers model, or, where `spec`
    is empty, from the model's embeddings.

    ConfigError where `spec` is not there; for the rest see `from_text`, `from_sentence_transformer`
    and `from_embeddings`.
    """
    if not spec:
        return from_embeddings(embedding, encode, words)
    path = Path(spec).expanduser()
    if path.is_dir():
        return from_sentence_transformer(path, words)
    if not path.is_file():
        raise ConfigError(
            f"vectors={spec!r} is not there: give a word2vec or GloVe text file, the folder of a"
            " sentence-transformers model, or nothing for the model's own embeddings"
        )
    return from_text(path, words)


def from_text(path: Path | str, words: Sequence[str]) -> Vectors:
    """Vectors from word2vec's text form (first line: COUNT DIM) or GloVe's (no such line).

    A line is a word and its numbers, with spaces between; UTF-8, or gzip of it. A wanted word
    takes the line that spells it as it is, or else the first that does lower-cased; of equal lines
    the first. Lines of other words are only counted and measured, not kept, and their numbers
    are not read. A vector of zeros has no direction and counts as none.

    Raises: DataError, with the line, for a file that is not text, is empty, cut short or of mixed
    width, for a wanted word's number that is none or not finite, and where no word is found.
    """
    path = Path(path)
    wanted = {word: i for i, word in enumerate(words)}
    how = np.zeros(len(words), dtype=np.int8)
    vectors: np.ndarray | None = None
    for where, word, numbers in _lines(path):
        if vectors is None:
            vectors = np.zeros((len(words), len(numbers)), dtype=np.float32)
        text = word.decode("utf-8", errors="replace")
        i, rank = wanted.get(text), _AS_WRITTEN
        if i is None:
            i, rank = wanted.get(text.lower()), _LOWER_CASED
        if i is not None and rank > how[i]:
            vectors[i], how[i] = _numbers(where, numbers), rank
    if vectors is None:
        raise DataError(f"{path} has no vector: give a word2vec or GloVe text file")
    unit, found = _unit(vectors)
    if len(words) and not found.any():
        raise DataError(
            f"{path} has a vector for none of the {len(words)} words of the text: give vectors of"
            " its language"
        )
    return Vectors(unit, found, f"{path.name} ({vectors.shape[1]} dimensions)")


def from_sentence_transformer(folder: Path | str, words: Sequence[str]) -> Vectors:
    """Each word as a sentence of its own, through a sentence-transformers model on this machine.

    Nothing is downloaded, no code of the folder is run, and no weights are unpickled (the
    backbone's are read from safetensors).

    Raises: ConfigError where `folder` is no such model or the package is not installed;
    DataError for a model that cannot be loaded or gives numbers that are not finite.
    """
    folder = Path(folder)
    if not any((folder / name).is_file() for name in SENTENCE_TRANSFORMER_FILES):
        raise ConfigError(
            f"vectors={str(folder)!r} is not the folder of a sentence-transformers model (it has no"
            f" {' or '.join(SENTENCE_TRANSFORMER_FILES)}): give one that its save() wrote, or a"
            " word2vec or GloVe text file"
        )
    _check_modules(folder)
    package = _sentence_transformers()
    try:
        model = package.SentenceTransformer(
            str(folder.resolve()),
            trust_remote_code=False,
            local_files_only=True,
            model_kwargs={"use_safetensors": True},
        )
    except Exception as error:  # of any kind: what is in the folder decides
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{folder} cannot be loaded as a sentence-transformers model ({reason}): give one with"
            " all its files, weights as safetensors, and no code of its own"
        ) from None
    vectors = np.asarray(model.encode(list(words), show_progress_bar=False), dtype=np.float32)
    vectors = vectors.reshape(len(words), -1)  # [W, E]
    if not np.isfinite(vectors).all():
        word = words[int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])]
        raise DataError(
            f"{folder} gives {word!r} a vector with numbers that are not finite: give another model"
        )
    return Vectors(*_unit(vectors), f"{folder.resolve().name} (sentence-transformers)")


@torch.no_grad()
def from_embeddings(
    embedding: Tensor, encode: Callable[[str], list[int]], words: Sequence[str]
) -> Vectors:
    """The embedding of a word that is one token; other words have no vector.

    Words that share a token would be alike by that alone, and a neuron that fires on the token
    would seem to fire on words of one meaning.

    embedding: float [V, D], on any device. encode: the tokens of a word, without bos and eos;
    spelled as in the middle of a text where that is another token. DataError for a token outside
    [0, V).
    """
    tokens = [encode(word) for word in words]
    counts = torch.tensor([len(some) for some in tokens], dtype=torch.int64)  # [W]
    flat = torch.tensor([token for some in tokens for token in some], dtype=torch.int64)
    if len(flat) and not 0 <= int(flat.min()) <= int(flat.max()) < len(embedding):
        raise DataError(
            f"the tokenizer gives tokens {int(flat.min())} to {int(flat.max())}, and the model has"
            f" embeddings of 0 to {len(embedding) - 1}: give the tokenizer of this model"
        )
    vectors = torch.zeros(len(words), embedding.shape[1])  # [W, D]
    first = flat[(counts.cumsum(0) - counts)[counts == 1]]
    vectors[counts == 1] = embedding[first.to(embedding.device)].float().cpu()
    return Vectors(*_unit(vectors.numpy()), EMBEDDINGS_LABEL)


def _unit(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of unit length, float32 [W, E], and which of them could be made so, bool [W]."""
    largest = np.abs(vectors).max(axis=1, keepdims=True, initial=0)
    found = largest[:, 0] > 0
    # Divided by the largest first: squares of very large and very small numbers do not fit.
    unit = vectors / np.where(largest > 0, largest, 1)
    norms = np.linalg.norm(unit, axis=1, keepdims=True)
    return (unit / np.where(norms > 0, norms, 1)).astype(np.float32), found


def _lines(path: Path) -> Iterator[tuple[str, bytes, list[bytes]]]:
    """`file:line`, word and numbers of each line, after the checks of the file as a whole."""
    try:
        yield from _checked_lines(path)
    except (OSError, EOFError, zlib.error) as error:  # all of which gzip gives
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{path} cannot be read ({reason}): give a whole, readable file") from None


def _checked_lines(path: Path) -> Iterator[tuple[str, bytes, list[bytes]]]:
    width = count = None
    n_read = 0
    with _open(path) as file:
        if b"\0" in file.peek(CHECKED_BYTES)[:CHECKED_BYTES]:
            raise DataError(
                f"{path} is not text: unpack it, or save a binary word2vec file in its text form"
                " (gensim: KeyedVectors.load_word2vec_format(FILE, binary=True), then"
                " save_word2vec_format(NEW))"
            )
        for number, line in enumerate(file, start=1):
            fields = line.split()
            if not fields:
                continue
            if number == 1 and len(fields) == 2 and all(field.isdigit() for field in fields):
                count, width = map(int, fields)
                continue
            width = _checked_width(f"{path}:{number}", fields, width, has_header=count is not None)
            n_read += 1
            # A word of a file may hold spaces; a word of a text does not.
            if len(fields) == width + 1:
                yield f"{path}:{number}", fields[0], fields[1:]
    if count is not None and n_read != count:
        raise DataError(
            f"{path} has {n_read} vectors, its first line says {count}: give a whole file"
        )


def _open(path: Path):
    with open(path, "rb") as file:
        is_gzip = file.read(len(GZIP_MAGIC)) == GZIP_MAGIC
    return gzip.open(path) if is_gzip else open(path, "rb", buffering=CHECKED_BYTES)


def _checked_width(where: str, fields: list[bytes], width: int | None, has_header: bool) -> int:
    """The width of the vectors, once this line has it too."""
    found = len(fields) - 1
    if found == 0:
        raise DataError(
            f"{where} has a word and no numbers: give a word2vec or GloVe text file, a word and its"
            " vector a line"
        )
    if width is None:
        return found
    if found < width or (found > width and _is_number(fields[1])):
        before = "the first line says" if has_header else "the lines before have"
        raise DataError(
            f"{where} has {found} numbers, {before} {width}: give a file of vectors of one width"
        )
    return width


def _is_number(field: bytes) -> bool:
    return not np.isnan(_number(field))


def _number(field: bytes) -> np.float32:
    """NaN for what is none, inf for what does not fit."""
    try:
        return np.float32(float(field))
    except ValueError:
        return np.float32("nan")


def _numbers(where: str, fields: list[bytes]) -> np.ndarray:
    """float32 [E]"""
    with np.errstate(over="ignore"):
        numbers = np.array([_number(field) for field in fields])
    wrong = np.flatnonzero(~np.isfinite(numbers))
    if len(wrong):
        shown = fields[wrong[0]][:40].decode("utf-8", errors="replace")
        raise DataError(
            f"{where} has {shown!r}, which is no finite number: give a word2vec or GloVe text file,"
            " a word and its vector a line"
        )
    return numbers


def _check_modules(folder: Path) -> None:
    """DataError where the folder has its parts loaded by anything but a class of the package.

    The package imports whatever is named there and calls its `load` with files of the folder:
    `joblib.numpy_pickle` would be as good a name as another.
    """
    path = folder / "modules.json"
    if not path.is_file():
        return
    try:
        kinds = [one["type"] for one in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise DataError(
            f"{folder} cannot be loaded as a sentence-transformers model ({path.name}: {error}):"
            " give one with all its files"
        ) from None
    for kind in kinds:
        if not isinstance(kind, str) or not _CLASS_OF_PACKAGE.fullmatch(kind):
            raise DataError(
                f"{folder} cannot be loaded as a sentence-transformers model ({path.name} names"
                f" {kind!r}, no class of that package): give one without code of its own"
            )


def _sentence_transformers() -> ModuleType:
    # Not among what this package is installed with.
    try:
        return importlib.import_module("sentence_transformers")
    except ImportError as error:
        raise ConfigError(
            "vectors is the folder of a sentence-transformers model, and the package cannot be"
            f" imported ({error}): pip install sentence-transformers, or give a word2vec or GloVe"
            " text file"
        ) from None
