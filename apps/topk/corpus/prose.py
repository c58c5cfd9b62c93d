"""Telling prose from code in technical English, and giving it one plain shape.

Documentation mixes sentences with interpreter sessions, grammars, tables and
commented-out code. A small language model learns little from those, so they are left
out, paragraph by paragraph.
"""

import re
import textwrap

# Sentences of technical English have one of these at every third to fifth word.
# Words that are Python keywords as well (and, as, for, if, in, is, not, or, with) are
# left out: code has them too.
FUNCTION_WORDS = frozenset(
    "a about after all also an any are at be because been before but by can does each either"
    " every has have how into it its may more most must no of on one only other same should so"
    " some such than that the their them then there these they this those to two under up used"
    " using was we were what when where whether which will would you your".split()
)
MIN_FUNCTION_WORDS = 0.15  # share of the words
MIN_LETTERS = 0.72  # share of the characters that are letters or spaces
MIN_WORDS = 3
# Lines shorter than this were not broken for want of room: a list, a table, a title.
MIN_WRAPPED_LINE = 45

_WORD = re.compile(r"[^\W\d_][\w'\-]*")
_BLANK_LINES = re.compile(r"\n(?:[ \t]*\n)+")
_LIST_ITEM = re.compile(r"\s*(?:[*+\-•o]|\(?\w{1,2}[.)])\s")
_SENTENCE = re.compile(r"[A-Z][a-z].*[.:]\)?", re.DOTALL)
_CODE_MARKS = (">>>", "::=", "Traceback (most recent call last)")


def paragraphs(text: str) -> list[str]:
    """The blocks of `text` between blank lines, dedented; none is empty."""
    blocks = (textwrap.dedent(block.expandtabs()) for block in _BLANK_LINES.split(text))
    return [block.strip("\n ") for block in blocks if block.strip()]


def is_prose(paragraph: str) -> bool:
    """Whether `paragraph` reads as English sentences rather than code, a table or a grammar."""
    if any(mark in paragraph for mark in _CODE_MARKS):
        return False
    words = _WORD.findall(paragraph)
    letters = sum(character.isalpha() or character.isspace() for character in paragraph)
    if len(words) < MIN_WORDS or letters < MIN_LETTERS * len(paragraph):
        return False
    function_words = sum(word.lower() in FUNCTION_WORDS for word in words)
    if function_words >= MIN_FUNCTION_WORDS * len(words):
        return True
    # Terse descriptions ("Return children in document order.") have few function words.
    return letters >= 0.9 * len(paragraph) and _SENTENCE.fullmatch(paragraph) is not None


def unwrap(paragraph: str) -> str:
    """Join the lines of a paragraph that was wrapped by hand; lists and tables keep theirs."""
    lines = [line.rstrip() for line in paragraph.split("\n")]
    indents = {len(line) - len(line.lstrip()) for line in lines[1:]}
    wrapped = (
        len(indents) <= 1
        and all(len(line) >= MIN_WRAPPED_LINE for line in lines[:-1])
        and not any(_LIST_ITEM.match(line) for line in lines[1:])
    )
    return " ".join(" ".join(lines).split()) if wrapped else "\n".join(lines)
