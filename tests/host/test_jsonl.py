"""lingua._jsonl: what of a file is read, what is passed over, and where reading goes on."""

import contextlib
import json
import os
import re
from itertools import islice

import pytest

from lingua._jsonl import (
    MAX_MALFORMED_SHARE,
    MIN_LINES_TO_JUDGE,
    N_REPORTED_LINES,
    loop_on_jsonl,
    read_jsonl,
    read_share,
    start_of,
    text_of,
)
from lingua.errors import DataError


@pytest.fixture
def path(tmp_path):
    return tmp_path / "s.chunk.00.jsonl"


def good(number) -> bytes:
    return json.dumps({"text": f"naïve {number}"}, ensure_ascii=False).encode()


def texts(path, block_size=1, offset=0) -> list[str]:
    return [text_of(d) for d, _ in read_jsonl(str(path), 0, block_size, offset, 0)]


def numbers(documents) -> list[int]:
    return [int(text_of(document).split()[-1]) for document, _ in documents]


def part(path, block_size=1, offset=0, n_offsets=1) -> dict:
    return {
        "file_path": str(path),
        "block_size": block_size,
        "offset": offset,
        "n_offsets": n_offsets,
    }


def share(*parts):
    return read_share(start_of(list(parts)))


def open_files(folder) -> list[str]:
    """The files in a folder that this process holds open."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            found.append(os.readlink(f"/proc/self/fd/{number}"))
    return [path for path in found if path.startswith(str(folder))]


@pytest.mark.parametrize("block_size", [1, 2, 3, 12])
def test_a_reader_takes_every_so_manyth_line(path, block_size):
    path.write_bytes(b"\n".join(map(good, range(10))) + b"\n")
    for offset in range(block_size):
        documents = read_jsonl(str(path), 0, block_size, offset, 0)
        assert numbers(documents) == list(range(offset, 10, block_size))


def test_several_offsets_of_a_block_and_several_files_are_read_in_turn(tmp_path):
    for name in "ab":
        (tmp_path / name).write_bytes(b"".join(good(i) + b"\n" for i in range(8)))
    documents = share(part(tmp_path / "a", 4, 1, 2), part(tmp_path / "b", 4, 3))
    assert numbers(islice(documents, 8)) == [1, 2, 5, 6, 3, 7, 1, 2]


def test_a_file_is_read_again_and_again_and_passes_are_counted(path):
    path.write_bytes(b"".join(good(i) + b"\n" for i in range(3)))
    documents = list(islice(loop_on_jsonl(str(path), 0, 1, 0, 0), 7))
    assert numbers(documents) == [0, 1, 2, 0, 1, 2, 0]
    assert [state["current_iter"] for _, state in documents] == [0, 0, 0, 1, 1, 1, 2]


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("last", [True, False])
def test_line_ends_bom_and_a_missing_last_line_end_change_nothing(path, end, bom, last, caplog):
    lines = end.join(map(good, range(4)))
    path.write_bytes(bom + lines + end * last)
    assert texts(path) == [f"naïve {i}" for i in range(4)]
    everything = list(islice(share(part(path)), 9))
    for index, (_, state) in enumerate(everything):
        assert numbers(islice(read_share(state), 2)) == [(index + 1) % 4, (index + 2) % 4]
    assert caplog.text == ""


def test_a_line_longer_than_any_buffer(path):
    path.write_text(json.dumps({"text": "x" * 3_000_000}) + '\n{"text": "y"}\n')
    assert [len(text) for text in texts(path)] == [3_000_000, 1]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"text": "a", "content": "b"}, "a"),
        ({"content": "b"}, "b"),
        ({"text": None, "content": "b"}, "b"),
        ({"text": "", "content": "b"}, ""),
        ({"title": "c"}, None),
        ({"text": ["a"]}, None),
    ],
)
def test_the_text_of_a_document(content, text):
    assert text_of(content) == text


BAD_LINES = {
    b"": "empty",
    b" \t ": "empty",
    b'{"text": ': "not JSON: Expecting value at column 9",
    good(1)[:-3]: "not JSON: Unterminated string starting at column 10",
    b'{"text": "a\tb"}': "not JSON: Invalid control character at column 12",
    good(1) + b",": "not JSON: Extra data at column 20",
    b"[1]": "not a JSON object",
    b"null": "not a JSON object",
    b'{"text": "\xff"}': "not UTF-8",
    b"\xef\xbb\xbf" + good(1): "not JSON",
    b'{"id": 3}': "no string under 'text' or 'content'",
    b'{"text": null}': "no string under",
    b'{"text": 3}': "no string under",
    b'{"text": "a", "n": %s}' % (b"9" * 5000): "not JSON",
    b'{"text": %s1%s}' % (b"[" * 100_000, b"]" * 100_000): "not JSON",
}


@pytest.mark.parametrize(("line", "reason"), BAD_LINES.items(), ids=range(len(BAD_LINES)))
def test_a_line_that_is_no_document_is_skipped_counted_and_reported(path, line, reason, caplog):
    path.write_bytes(b"\n".join([good(0), line, good(2), good(3)]))
    documents = loop_on_jsonl(str(path), 0, 1, 0, 0)
    assert numbers(islice(documents, 8)) == [0, 2, 3, 0, 2, 3, 0, 2]
    assert f"skipped {path} line 2: {reason}" in caplog.text
    assert f"{path}: skipped 1 of the 4 lines read" in caplog.text
    assert len(caplog.records) == 2, "the second pass reported it again"


def test_an_empty_file_with_a_bom_is_no_malformed_line(path, caplog):
    path.write_bytes(b"\xef\xbb\xbf")
    assert texts(path) == []
    assert "line 1: empty" in caplog.text


def test_lines_of_other_readers_are_no_concern(path, caplog):
    path.write_bytes(b"\n".join([good(0), b"{", good(2), b"{", good(4)]))
    assert numbers(read_jsonl(str(path), 0, 2, 0, 0)) == [0, 2, 4]
    assert caplog.text == ""


def test_many_bad_lines_are_reported_a_few_times_and_counted(path, caplog):
    n_bad = N_REPORTED_LINES + 3
    path.write_bytes(b"\n".join([good(0), *[b"{"] * n_bad]))
    assert texts(path) == ["naïve 0"]
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == N_REPORTED_LINES + 1
    assert messages[-1] == f"{path}: skipped {n_bad} of the {n_bad + 1} lines read"


@pytest.mark.parametrize("n_lines", [12, MIN_LINES_TO_JUDGE, 10 * MIN_LINES_TO_JUDGE])
def test_too_many_malformed_lines_are_an_error_that_quotes_the_first(path, n_lines):
    allowed = int(MAX_MALFORMED_SHARE * max(n_lines, MIN_LINES_TO_JUDGE))
    lines = [good(i) for i in range(n_lines - allowed)] + [b'{"id": 1}'] * allowed
    path.write_bytes(b"\n".join(lines))
    assert len(texts(path)) == n_lines - allowed
    path.write_bytes(b"\n".join([*lines, b"{"]))
    first = n_lines - allowed + 1
    message = f"malformed, more than 10% (first of all: {path} line {first}: no string under"
    with pytest.raises(DataError, match=re.escape(message)):
        texts(path)


def test_empty_lines_are_no_reason_to_stop(path):
    path.write_bytes(b"\n\n".join(map(good, range(200))))
    assert len(texts(path)) == 200


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no line for this process"),
        (b"\n \n", "no usable document .*line 1: empty"),
        (b'{"id": 1}\n' * 3, "no usable document .*line 1: no string under"),
    ],
)
def test_a_share_without_a_document_is_an_error_and_no_endless_loop(path, content, message):
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        next(share(part(path)))


def test_a_reader_beyond_the_last_line_is_an_error_and_no_endless_loop(path):
    path.write_bytes(good(0) + b"\n" + good(1))
    assert numbers(islice(share(part(path, 3, 1)), 2)) == [1, 1]
    with pytest.raises(DataError, match=r"1 of every 3 lines from index 2 on: use fewer processes"):
        next(share(part(path, 3, 2)))


def test_resumed_at_its_end_a_share_that_lost_its_documents_is_an_error(path):
    path.write_bytes(good(0) + b"\n" + b"\n" * 50)
    (_, state), *_ = islice(share(part(path)), 1)
    path.write_bytes(b"\n" * (state["position"] + 50))
    with pytest.raises(DataError, match="no usable document"):
        next(read_share(state))


def test_an_empty_file_among_others_is_passed_over(tmp_path):
    for name, content in (("a", b""), ("b", good(1)), ("c", b"\n")):
        (tmp_path / name).write_bytes(content)
    documents = share(*(part(tmp_path / name) for name in "abc"))
    assert numbers(islice(documents, 3)) == [1, 1, 1]


def test_a_document_that_is_rejected_counts_as_skipped(path, caplog):
    path.write_bytes(b"\n".join(map(good, range(3))))
    taken = []
    for document, state in share(part(path)):
        if state["current_iter"] == 1:
            break
        taken.append(document)
        document.rejected = "too short" if len(taken) == 2 else None
    assert f"skipped {path} line 2: too short" in caplog.text
    assert f"{path}: skipped 1 of the 3 lines read" in caplog.text


def test_a_share_of_which_every_document_is_rejected_is_an_error(path):
    path.write_bytes(good(0))
    with pytest.raises(DataError, match=r"no usable document .*too short"):
        for document, _ in share(part(path)):
            document.rejected = "too short"


@pytest.mark.parametrize("shares", ["one", "block", "several"])
def test_reading_goes_on_exactly_from_every_state(tmp_path, shares):
    for name, n_lines in (("a", 7), ("b", 5), ("c", 6)):
        lines = [good(i) + b"\n" for i in range(n_lines)]
        lines.insert(3, b"\n")
        (tmp_path / name).write_bytes(b"".join(lines).rstrip())
    parts = {
        "one": [part(tmp_path / "a")],
        "block": [part(tmp_path / "a", 5, 1, 3)],
        "several": [part(tmp_path / "a", 3, 2), part(tmp_path / "b"), part(tmp_path / "c", 3, 0)],
    }[shares]
    everything = list(islice(share(*parts), 40))
    for index, (_, state) in enumerate(everything[:30]):
        resumed = read_share(json.loads(json.dumps(state)))
        assert list(islice(resumed, 10)) == everything[index + 1 : index + 11]


@pytest.mark.parametrize("block_size", [1, 3])
def test_reading_goes_on_from_a_state_of_lingua_which_has_no_line(path, block_size, caplog):
    path.write_bytes(b"\n".join([*map(good, range(10)), b"{" * (block_size == 1)]))
    offset = block_size - 1
    everything = list(islice(loop_on_jsonl(str(path), 0, block_size, offset, 0), 20))
    for index, (_, state) in enumerate(everything[:10]):
        caplog.clear()
        del state["line"]
        resumed = islice(loop_on_jsonl(**state), 5)
        assert numbers(resumed) == numbers(everything[index + 1 : index + 6])
    if block_size == 1:
        assert "line before byte" in caplog.text, "it cannot know the number of the line"


def later_state(path) -> dict:
    path.write_bytes(b"\n".join(map(good, range(6))))
    return list(islice(share(part(path)), 4))[-1][1]


@pytest.mark.parametrize("change", ["cut in a line", "cut before", "emptied", "edited", "joined"])
def test_a_file_changed_since_is_an_error(path, change):
    state = later_state(path)
    content, position = path.read_bytes(), state["position"]
    path.write_bytes(
        {
            "cut in a line": content[: position - 1],
            "cut before": content[: position // 2],
            "emptied": b"",
            "edited": content.replace("ï".encode(), b"i"),
            "joined": content.replace(b"\n", b" "),
        }[change]
    )
    with pytest.raises(DataError, match=rf"{path} has no line that begins at byte {position}"):
        next(read_share(state))


def test_a_file_that_is_gone_is_an_error(path):
    state = later_state(path)
    path.unlink()
    with pytest.raises(DataError, match=rf"{path} cannot be read \(No such file"):
        next(read_share(state))
    path.mkdir()
    with pytest.raises(DataError, match=rf"{path} cannot be read \(Is a directory"):
        next(read_share(state))


def test_lines_appended_to_a_file_are_read(path):
    path.write_bytes(good(0) + b"\n" + good(1) + b"\n")
    states = [state for _, state in islice(share(part(path)), 2)]
    with path.open("ab") as file:
        file.write(good(2) + b"\n")
    assert numbers(islice(read_share(states[-1]), 2)) == [2, 0]


def test_a_closed_reader_has_no_file_open(path):
    path.write_bytes(good(0) + b"\n" + good(1))
    documents = share(part(path))
    next(documents)
    assert open_files(path.parent) == [str(path)]
    documents.close()
    assert open_files(path.parent) == []
