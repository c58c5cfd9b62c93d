"""English from a Python installation: a made-up one, and the one that runs."""

import sys

import pytest

from apps.topk.corpus.prose import is_prose, paragraphs, unwrap
from apps.topk.corpus.python_docs import PythonDocs, module_blocks, read_topics
from apps.topk.corpus.tally import Tally
from lingua_topk.errors import DataError

FILLER = "This is how the harbour was built, and why it was built where it is. " * 5


def documents(library, doc_folders=()):
    source = PythonDocs(library, list(doc_folders))
    found = list(source.documents(Tally()))
    assert source.done == source.size
    return found


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def test_docstrings_and_comments_in_the_order_of_their_lines(tmp_path):
    file = tmp_path / "m.py"
    file.write_text(
        '''"""The module says what it is for."""
# A comment which is long enough to be read without the code that it stands beside, over
# two lines.
class Boat:
    """A boat that can be rowed by one person."""
    # too short to be kept
    async def row(self):
        """Row the boat to the other side."""
        def inner():
            "The oars are made of ash wood."
        text = """
        # This looks like a comment of sufficient length, but it is a part of a string, and
        # so it is no comment at all.
        """
'''
    )
    assert module_blocks(file) == [
        "The module says what it is for.",
        "A comment which is long enough to be read without the code that it stands beside, over"
        " two lines.",
        "A boat that can be rowed by one person.",
        "Row the boat to the other side.",
        "The oars are made of ash wood.",
    ]


def test_nothing_is_run(tmp_path):
    write(tmp_path / "m.py", f'"""{FILLER}"""\nraise SystemExit("imported")\n')
    assert len(documents(tmp_path)) == 1


@pytest.mark.parametrize(
    "name",
    [
        "test/m.py",
        "unittest/tests/m.py",
        "idlelib/idle_test/m.py",
        "turtledemo/m.py",
        "site-packages/pack/m.py",
        "dist-packages/m.py",
        "__pycache__/m.py",
        "config-3.11-x86/m.py",
        "LICENSE.txt",
        "idlelib/CREDITS.txt",
        "data.json",
    ],
)
def test_what_is_left_out(tmp_path, name):
    write(tmp_path / "kept.py", f'"""{FILLER} Kept."""')
    write(tmp_path / name, f'"""{FILLER} Left out."""')
    (document,) = documents(tmp_path)
    assert document.endswith("Kept.")


@pytest.mark.parametrize(
    "content",
    [b"def (:\n", b"# -*- coding: nonsense -*-\n", b"x = '\xff'\n", b"x = 1\x00\n", b"(" * 3_000],
)
def test_files_that_cannot_be_parsed_are_passed_over(tmp_path, content):
    (tmp_path / "bad.py").write_bytes(content)
    write(tmp_path / "good.py", f'"""{FILLER}"""')
    assert len(documents(tmp_path)) == 1


def test_topics_are_read_as_data(tmp_path):
    file = tmp_path / "pydoc_data" / "topics.py"
    write(file, f"# made by a tool\ntopics = {{'boats': 'About '\n 'boats', 'sea': {FILLER!r}}}\n")
    assert read_topics(file) == {"boats": "About boats", "sea": FILLER}
    assert documents(tmp_path) == [FILLER.strip()]
    for other in ("topics = open('x')", "topics = [1]", "x = {}", "topics = {"):
        file.write_text(other)
        assert read_topics(file) == {}
    assert read_topics(tmp_path / "absent.py") == {}


def test_a_paragraph_occurs_once(tmp_path):
    shared = "The section on the tide is a part of more than one topic of this library. " * 3
    wide = f"{FILLER}\n\n{shared}\n\nAnd this is what only the wider of the two topics has to say."
    narrow = f"{shared}\n\n" + "Only the narrower of the topics has this to say on tides. " * 4
    topics = {"a narrow one": narrow, "wide": wide}
    write(tmp_path / "pydoc_data" / "topics.py", f"topics = {topics!r}")
    write(tmp_path / "m.py", f'"""{shared.upper()}"""')
    first, second = documents(tmp_path)
    assert " ".join(first.split()) == " ".join(wide.split())
    assert "section on the tide" not in second
    assert "narrower of the topics" in second


def test_small_modules_are_dropped_and_large_ones_cut(tmp_path):
    write(tmp_path / "small.py", '"""There is little to say about this one."""')
    functions = (f'def f{i}():\n    """Number {i}: {FILLER}"""\n' for i in range(60))
    write(tmp_path / "large.py", "".join(functions))
    found = documents(tmp_path)
    assert [len(document) // 1_000 for document in found] == [6, 6, 6, 3]
    assert "little to say" not in "".join(found)


def test_installed_documentation_takes_the_place_of_the_topics(tmp_path):
    library, docs = tmp_path / "lib", tmp_path / "doc"
    topics = {"t": "This is a topic that the documentation has as well. " * 8}
    write(library / "pydoc_data" / "topics.py", f"topics = {topics!r}")
    write(library / "m.py", f'"""{FILLER}"""')
    write(
        docs / "library" / "os.rst",
        ".. module:: os\n   :synopsis: none of this is prose to be read.\n\n"
        + f"{FILLER} Use :func:`~os.path.join`, :class:`!Path` or :ref:`this page <page>` for"
        " example::\n\n    >>> import os\n",
    )
    rst, module = documents(library, [docs])
    assert rst.endswith("Use os.path.join, Path or this page for example:")
    assert module == FILLER.strip()


def test_a_library_without_sources(tmp_path):
    with pytest.raises(DataError, match="no documentation in"):
        documents(tmp_path)


def test_of_the_python_that_runs():
    loaded = set(sys.modules)
    source = PythonDocs()
    found = list(source.documents(Tally()))
    assert set(sys.modules) == loaded
    text = "\n".join(found)
    assert len(text) > 1_500_000
    assert len(found) > 300
    assert len(set(found)) == len(found)
    assert min(map(len, found)) >= 200
    assert ">>> " not in text
    # A sentence of a docstring, one of a help topic, one of a comment.
    assert "Object for wrapping/filling text." in text
    assert "is used to wrap the execution of a block" in text
    assert "Make a single pass over the data while keeping the k most extreme values" in text
    fingerprint = source.fingerprint()
    assert fingerprint["python"] == ".".join(map(str, sys.version_info[:3]))
    assert fingerprint["files"] == source.size


@pytest.mark.parametrize(
    "text",
    [
        "Return a list of the names in the archive.",
        "Return children in document order.",
        "Called by the server's process_request() method, which may be overridden, so that a\n"
        "subclass can do its own clean-up.",
        "The width of the column (in characters); it is 70 by default.",
    ],
)
def test_prose(text):
    assert is_prose(text)


@pytest.mark.parametrize(
    "text",
    [
        ">>> the_answer_to_all_of_this()\n42",
        "for x in range(10):\n    if x not in seen:\n        yield x",
        'phrase = word *(word / "." / CFWS)',
        'assert_stmt ::= "assert" expression',
        "Mode      Initial heading     positive angles\n------|---------|--------",
        "print(the_value, of_that, and_this)",
        "total = first + second",
        "Two words",
        "0x41: 0x0391, 0x42: 0x0392,  # GREEK",
        "",
    ],
)
def test_no_prose(text):
    assert not is_prose(text)


def test_paragraphs_are_dedented():
    text = "\n\nOne\ntwo\n  \n\n    Three\n      four\n\t\n\tFive\n"
    assert paragraphs(text) == ["One\ntwo", "Three\n  four", "Five"]
    assert paragraphs(" \n\n") == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{'long ' * 12}\n{'line ' * 12}\nend.", f"{'long ' * 12}{'line ' * 12}end."),
        (f"* {'long ' * 12}\n  {'line ' * 12}", f"* {'long ' * 12}{'line ' * 11}line"),
        ("Two  spaces.  Here", "Two spaces. Here"),
        ("short\nlines  of a\ntable", None),
        (f"{'long ' * 12}\n- one\n- two", None),
        (f"width: {'long ' * 12}\n  {'deep ' * 12}\n    {'deeper ' * 9}", None),
    ],
)
def test_wrapped_paragraphs_are_joined_and_lists_kept(text, expected):
    kept = "\n".join(line.rstrip() for line in text.split("\n"))
    assert unwrap(text) == (kept if expected is None else expected)
