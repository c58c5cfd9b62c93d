"""English prose from the Python that runs: its documentation, docstrings and comments.

Real text on every machine, without a download. What is read, from the interpreter's own
installation only:

- the language reference that `help()` shows (pydoc_data/topics.py), or the .rst and .txt
  documentation of this Python where the system has it installed;
- docstrings and longer comments of the standard library, module by module;
- its .txt and .rst files.

Nothing is imported or run: the sources are parsed. Test packages, demos and installed
packages are left out; so are code, interpreter sessions, grammars and tables, and a
paragraph that occurred before (the same section is part of several help topics, and a
copy in the held-out documents would have been seen in training).
"""

import ast
import os
import platform
import re
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from apps.topk.corpus.mending import without_surrogates
from apps.topk.corpus.passages import passages
from apps.topk.corpus.prose import is_prose, paragraphs, unwrap
from apps.topk.corpus.tally import Tally
from lingua_topk.errors import DataError

LEFT_OUT_FOLDERS = frozenset(
    "test tests idle_test turtledemo site-packages dist-packages lib-dynload ensurepip pydoc_data"
    " __pycache__ __phello__".split()
)
# Names of people and terms of use: nothing to learn a language from.
LEFT_OUT_FILES = frozenset("acks authors copyright credits license licence notice".split())
MIN_DOCUMENT = 200  # characters; a module with less says too little
MIN_COMMENT = 80  # characters; shorter ones need the code beside them

_ROLE = re.compile(r":[\w:.+-]+:`([^`]*)`")
_TARGET = re.compile(r"(.*?)\s*<[^<>]*>", re.DOTALL)
_RULER = re.compile(r"[^\w\s]{3,}\s*")
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


class PythonDocs:
    """The documents of one Python installation; by default of the one that runs.

    `stdlib` is its library folder. `doc_folders` are folders of .rst and .txt files that
    take the place of the help topics, by default those below share/doc that bear this
    Python's name.
    """

    label = "python-docs"
    unit = " files"

    def __init__(self, stdlib: Path | None = None, doc_folders: list[Path] | None = None):
        self.stdlib = Path(sysconfig.get_path("stdlib")) if stdlib is None else stdlib
        folders = _installed_doc_folders() if doc_folders is None else doc_folders
        self.doc_files = [file for folder in folders for file in _files(folder, (".rst", ".txt"))]
        self.files = list(_files(self.stdlib, (".py", ".rst", ".txt")))
        self.size = len(self.doc_files) + len(self.files)  # files
        self.done = 0
        self._found = 0

    def open(self) -> None:
        """Nothing: the files are known."""

    def cursor(self) -> dict[str, int]:
        return {"documents": self._found}

    def origin(self) -> dict[str, Any] | None:
        return None  # the fingerprint says all

    def fingerprint(self) -> dict[str, Any]:
        return {
            "python": platform.python_version(),
            "implementation": platform.python_implementation(),
            "files": self.size,
        }

    def documents(self, tally: Tally, start: dict[str, int] | None = None) -> Iterator[str]:
        """Passages of prose, in a fixed order, or those after the cursor `start`.

        DataError where the library holds no source.
        """
        self._found = 0
        for passage in self._passages():
            self._found += 1
            if not start or self._found > start["documents"]:
                yield without_surrogates(passage, f"{self.label}: {self._found}", tally)
        if not self._found:
            raise DataError(
                f"source={self.label!r}: no documentation in {self.stdlib} (a Python without its"
                " .py files?): use another Python, or give your own text"
            )

    def _passages(self) -> Iterator[str]:
        seen: set[str] = set()
        for blocks in self._blocks():
            new = [block for block in blocks if _first_time(block, seen)]
            lines = "\n\n".join(new).splitlines(keepends=True)
            yield from (one for one in passages(lines) if len(one) >= MIN_DOCUMENT)

    def _blocks(self) -> Iterator[list[str]]:
        """The paragraphs of one help topic, module or text file after another."""
        for file in self.doc_files:
            yield _text_blocks(file)
            self.done += 1
        if not self.doc_files:
            topics = read_topics(self.stdlib / "pydoc_data" / "topics.py")
            # Longest first: of two topics that share a section, the wider one keeps it.
            for _, text in sorted(topics.items(), key=lambda item: (-len(item[1]), item[0])):
                yield _prose(paragraphs(text))
        for file in self.files:
            yield module_blocks(file) if file.suffix == ".py" else _text_blocks(file)
            self.done += 1


def read_topics(file: Path) -> dict[str, str]:
    """The help topics of `file`: the dict of strings that it assigns to `topics`, or {}."""
    tree = _parse(_read_source(file))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "topics":
            try:
                return {str(name): str(text) for name, text in ast.literal_eval(node.value).items()}
            except (ValueError, AttributeError):
                return {}
    return {}


def module_blocks(file: Path) -> list[str]:
    """The prose of a module's docstrings and comments, in the order of its lines.

    A module that cannot be parsed gives none.
    """
    source = _read_source(file)
    tree = _parse(source)
    found: list[tuple[int, list[str]]] = []
    string_lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED):
            docstring = ast.get_docstring(node)
            if docstring:
                found.append((node.body[0].lineno, _prose(paragraphs(docstring))))
        elif isinstance(node, (ast.Constant, ast.JoinedStr)) and node.end_lineno > node.lineno:
            string_lines.update(range(node.lineno, node.end_lineno + 1))
    for number, comment in _comments(source, string_lines):
        blocks = [block for block in paragraphs(comment) if len(block) >= MIN_COMMENT]
        found.append((number, _prose(blocks)))
    return [block for _, blocks in sorted(found) for block in blocks]


def _comments(source: str, string_lines: set[int]) -> Iterator[tuple[int, str]]:
    """Runs of lines that are nothing but comment, with the number of the line they start at.

    Rulers become blank lines. `string_lines` are the lines of strings that span several.
    """
    run: list[str] = []
    # A line that is no comment ends the last run.
    for number, line in enumerate([*source.split("\n"), ""], 1):
        line = line.strip()
        if line.startswith("#") and number not in string_lines:
            text = line.lstrip("#").removeprefix(" ")
            run.append("" if _RULER.fullmatch(text) else text)
        elif run:
            yield number - len(run), "\n".join(run)
            run = []


def _text_blocks(file: Path) -> list[str]:
    """The prose of a plain or reStructuredText file; roles and targets become their text."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    text = _ROLE.sub(lambda match: _TARGET.sub(r"\1", match[1]).lstrip("~!"), text)
    blocks = (block for block in paragraphs(text) if not block.startswith(".. "))
    return _prose(re.sub(r"::$", ":", block) for block in blocks)


def _prose(blocks: Iterable[str]) -> list[str]:
    return [unwrap(block) for block in blocks if is_prose(block)]


def _first_time(block: str, seen: set[str]) -> bool:
    """Whether no paragraph of the same words is in `seen`, where it then is."""
    words = " ".join(block.casefold().split())
    if words in seen:
        return False
    seen.add(words)
    return True


def _read_source(file: Path) -> str:
    """The text of a module, in the encoding that it declares; "" where it cannot be read."""
    try:
        with tokenize.open(file) as stream:
            return stream.read()
    except (OSError, SyntaxError, UnicodeDecodeError):
        return ""


def _parse(source: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about escapes in somebody else's strings
        try:
            return ast.parse(source)
        except (SyntaxError, ValueError, RecursionError):
            return ast.Module(body=[], type_ignores=[])


def _files(root: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    """The files below `root` with one of `suffixes`, in a fixed order."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(
            name
            for name in subfolders
            if name not in LEFT_OUT_FOLDERS and not name.startswith((".", "config-"))
        )
        for name in sorted(names):
            stem, suffix = os.path.splitext(name)
            if suffix in suffixes and stem.lower() not in LEFT_OUT_FILES:
                yield Path(folder, name)


def _installed_doc_folders() -> list[Path]:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    root = Path(sys.base_prefix) / "share" / "doc"
    names = (f"python{version}", f"python{version}-doc", f"python-{version}")
    return [root / name for name in names if (root / name).is_dir()]
