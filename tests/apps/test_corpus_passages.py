"""Cutting long texts: nothing is lost, and passages end where a reader would pause."""

from hypothesis import given
from hypothesis import strategies as st

from apps.topk.corpus.passages import passages


def lines(text: str) -> list[str]:
    """As a file gives them: only \\n ends a line."""
    return [line + "\n" for line in text.split("\n")[:-1]] + [text.rpartition("\n")[2]]


texts = st.lists(st.sampled_from(["a", "bc def", " ", "\n", "\n\n", "x" * 40]), max_size=80).map(
    "".join
)


@given(texts, st.integers(4, 30), st.sampled_from([0, 20, 100]))
def test_only_blank_lines_between_passages_are_lost(text, size, whole):
    cut = list(passages(lines(text), size, whole))
    position = 0
    for passage in cut:
        assert passage.strip() and passage == passage.strip("\n")
        found = text.find(passage, position)
        assert found >= 0 and not text[position:found].strip()
        position = found + len(passage)
    assert not text[position:].strip()


@given(texts, st.integers(4, 30))
def test_passages_are_neither_short_nor_long(text, size):
    cut = list(passages(lines(text), size))
    # At most twice the size and a line, and the short rest that may join it.
    assert all(len(passage) <= 3 * size + size // 4 for passage in cut)


def test_a_passage_ends_at_a_blank_line():
    paragraphs = ["word " * 9 + str(i) for i in range(12)]
    cut = list(passages(lines("\n\n".join(paragraphs)), size=100))
    assert "\n\n".join(cut) == "\n\n".join(paragraphs)
    assert [passage.count("word") // 9 for passage in cut] == [3, 3, 3, 3]


def test_a_text_without_blank_lines_is_cut_at_line_ends():
    text = "\n".join(f"line {i:03}" for i in range(100))
    cut = list(passages(lines(text), size=100))
    assert "\n".join(cut) == text
    assert all(200 <= len(passage) < 220 for passage in cut[:-1])


def test_a_long_line_is_cut_at_spaces():
    text = " ".join(f"word{i}" for i in range(200))
    cut = list(passages([text], size=100))
    assert "".join(cut) == text
    assert len(cut) > 5
    assert all(passage.endswith(" ") for passage in cut[:-1])


def test_a_line_without_spaces_is_cut_all_the_same():
    cut = list(passages(["x" * 1_000], size=100))
    assert "".join(cut) == "x" * 1_000
    assert max(map(len, cut)) <= 300


def test_a_short_rest_joins_the_passage_before():
    body = "word " * 25 + "\n\n"
    assert list(passages(lines(body + "end"), size=100)) == [body + "end"]
    assert len(list(passages(lines(body + "end " * 10), size=100))) == 2


def test_a_text_up_to_the_limit_stays_whole():
    text = "\n\n".join(["word " * 20] * 5)
    assert list(passages(lines(text), size=100, whole=len(text))) == [text]
    assert len(list(passages(lines(text), size=100, whole=len(text) - 1))) > 1


def test_memory_does_not_grow_with_the_text():
    def endless():
        while True:
            yield "a line of some length\n"
            yield "\n"

    stream = passages(endless(), size=100, whole=1_000)
    assert all(len(next(stream)) < 250 for _ in range(50))


def test_nothing_gives_nothing():
    assert list(passages([])) == []
    assert list(passages(["\n", " \n"])) == []
