"""lingua._jsonl: what of a file is read, what is passed over, and where reading goes on."""

import contextlib
import errno
import json
import logging
import os
import re
from itertools import count, islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lingua import _jsonl, _watched
from lingua._jsonl import (
    loop_on_jsonl,
    read_jsonl,
    read_share,
    start_of,
    text_of,
)
from lingua._shares import distribute_data_to_rank
from lingua._tally import MAX_MALFORMED_SHARE, MIN_LINES_TO_JUDGE, N_REPORTED_LINES
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


def share(*parts, max_malformed=MAX_MALFORMED_SHARE):
    return read_share(start_of(list(parts)), max_malformed)


def as_lingua(state) -> dict:
    """What Lingua has of a state."""
    names = ("file_path", "position", "block_size", "offset", "current_iter")
    return {name: state[name] for name in names}


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
    expected = f"{path}: skipped {n_bad} of the {n_bad + 1} lines read ({n_bad} not JSON)"
    assert messages[-1] == expected


@pytest.mark.parametrize("n_lines", [12, MIN_LINES_TO_JUDGE, 10 * MIN_LINES_TO_JUDGE])
def test_too_many_malformed_lines_are_an_error_that_quotes_the_first(path, n_lines):
    allowed = int(MAX_MALFORMED_SHARE * max(n_lines, MIN_LINES_TO_JUDGE))
    lines = [good(i) for i in range(n_lines - allowed)] + [b'{"id": 1}'] * allowed
    path.write_bytes(b"\n".join(lines))
    assert len(texts(path)) == n_lines - allowed
    path.write_bytes(b"\n".join([*lines, b"{"]))
    first = n_lines - allowed + 1
    message = "malformed, more than data.max_malformed=0.1 allows"
    message += f" (first of all: {path} line {first}: no string under"
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
        if len(taken) == 2:
            document.reject("too short: 3")
    assert f"skipped {path} line 2: too short: 3" in caplog.text
    assert f"{path}: skipped 1 of the 3 lines read (1 too short)" in caplog.text


def test_a_share_of_which_every_document_is_rejected_is_an_error(path):
    path.write_bytes(good(0))
    with pytest.raises(DataError, match=r"no usable document .*too short"):
        for document, _ in share(part(path)):
            document.reject("too short")


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
        resumed = islice(loop_on_jsonl(**as_lingua(state)), 5)
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


def test_lines_appended_between_two_runs_are_reported(path, caplog):
    path.write_bytes(good(0) + b"\n" + good(1) + b"\n")
    ((_, state),) = islice(share(part(path)), 1)
    size = path.stat().st_size
    with path.open("ab") as file:
        file.write(good(2) + b"\n")
    assert numbers(islice(read_share(state), 3)) == [1, 2, 0]
    assert f"{path} has {size * 3 // 2} bytes, and had {size} when the state" in caplog.text
    assert len(caplog.records) == 1


# How many malformed lines.


def mixture(n_good: int, bad: list[int]) -> bytes:
    """Documents 0 .. n_good - 1, with malformed lines before those in `bad`."""
    lines = []
    for i in range(n_good):
        lines += [b'{"text": '] * bad.count(i) + [good(i)]
    return b"\n".join(lines) + b"\n"


@pytest.mark.parametrize(
    ("max_malformed", "n_allowed"), [(0, 0), (0.001, 0), (0.02, 2), (0.29, 29), (0.999, 99)]
)
def test_the_share_of_malformed_lines_that_is_allowed(path, max_malformed, n_allowed):
    path.write_bytes(mixture(1, [0] * n_allowed))
    assert numbers(islice(share(part(path), max_malformed=max_malformed), 3)) == [0, 0, 0]
    path.write_bytes(mixture(1, [0] * (n_allowed + 1)))
    message = f"{n_allowed + 1} of the first {n_allowed + 1} lines read are malformed, more than"
    with pytest.raises(DataError, match=f"{message} data.max_malformed={max_malformed:g} allows"):
        next(share(part(path), max_malformed=max_malformed))


def test_a_share_of_one_never_stops(path):
    path.write_bytes(mixture(2, [1] * 2000))
    assert numbers(islice(share(part(path), max_malformed=1), 3)) == [0, 1, 0]


def judged(documents) -> tuple[list, str]:
    """What is read of a pass, and the error that ends it or "" where it ends well."""
    found = []
    try:
        for document, state in documents:
            if found and state["current_iter"] > found[0][1]["current_iter"]:
                break
            found.append((document, state))
    except DataError as error:
        return found, str(error).partition(" (first")[0]
    return found, ""


@pytest.mark.parametrize("block", [(1, 0, 1), (3, 1, 1), (5, 1, 3)])
@pytest.mark.parametrize(
    "bad",
    [
        [500] * 40,  # a burst that the lines before it outweigh
        [*range(0, 600, 12)],  # always near what is allowed
        [*range(0, 300, 12), *range(300, 600, 4)],  # too many in the end
    ],
    ids=["burst", "steady", "more and more"],
)
def test_a_resumed_run_stops_where_the_uninterrupted_one_does(path, bad, block):
    path.write_bytes(mixture(600, bad))
    everything, end = judged(share(part(path, *block)))
    if block == (1, 0, 1):
        assert bool(end) == (len(bad) == 100)
    for index in range(0, len(everything), 7):
        state = json.loads(json.dumps(everything[index][1]))
        assert judged(read_share(state)) == (everything[index + 1 :], end)


def test_after_a_resume_the_present_strictness_counts(path):
    path.write_bytes(mixture(40, [10, 20, 30]))
    everything = list(islice(share(part(path)), 25))
    assert everything[-1][1]["malformed"] == 2
    state = everything[-1][1]
    resumed = read_share(state, max_malformed=0.02)
    with pytest.raises(DataError, match="3 of the first 33 lines read are malformed"):
        list(islice(resumed, 10))
    assert numbers(islice(read_share(state, max_malformed=0), 5)) == [25, 26, 27, 28, 29]


def test_a_state_of_lingua_is_judged_by_the_lines_after_it(path):
    path.write_bytes(mixture(40, [10, 20, 30]))
    state = as_lingua(list(islice(share(part(path)), 25))[-1][1])
    with pytest.raises(DataError, match="1 of the first 6 lines read are malformed"):
        list(islice(read_share(state, max_malformed=0), 10))


def test_what_the_tokenizer_cannot_encode_counts_as_malformed(path):
    path.write_bytes(b"\n".join(map(good, range(300))))
    documents = share(part(path), max_malformed=0.02)
    with pytest.raises(DataError, match=r"3 of the first 3 lines .*line 1: it failed: so and so"):
        for document, _ in documents:
            document.reject("it failed: so and so", malformed=True)


# Whatever the lines are: each document once a pass, and the same from every state.

USABLE = st.sampled_from(
    [
        b'{"text": "%s"}',
        b' {"content": "%s"}\t',
        b'{"text": "%s", "id": [1, {"a": null}]}\r',
        b'{"text": null, "content": "%s"}',
        b'{"text": 3, "text": "%s"}',
        b'{"text": "%s\\ud800"}',
        b'{"text": "%s\\u0000\\n"}',
        b'{"text": "%s' + b"x" * 3000 + b'"}',
    ]
)
UNUSABLE = st.sampled_from(
    [
        *[b"", b"\r", b" \t", b"{", b"null", b"[]", b'{"text": 1.5}', b'{"text": "a", "text": 3}'],
        *[b"\x00", b'{"text": "\x00"}', b'{"text": "\xff"}', b'{"text": "\xed\xa0\x80"}'],
        *[b'{"Text": "a"}', b"[" * 3000, b'{"text": %s}' % (b"9" * 5000)],
        b"\xef\xbb\xbf" * 2 + b'{"text": "a"}',  # one is removed at the beginning of a file
    ]
)  # fmt: skip
FILES = st.lists(
    st.tuples(
        st.booleans(),  # a BOM
        st.lists(st.one_of(USABLE, UNUSABLE), max_size=14),
        st.booleans(),  # a line end at the end
    ),
    min_size=1,
    max_size=5,
)


def write_files(folder, files) -> list[str]:
    """Write them, and return a text for each usable line."""
    for old in folder.iterdir():
        old.unlink()
    names = map(str, count())
    expected = []
    for number, (bom, lines, last) in enumerate(files):
        filled = []
        for line in lines:
            if b"%s" in line and b"%s}" not in line:
                expected.append(next(names))
                line = line % expected[-1].encode()
            filled.append(line)
        content = b"\xef\xbb\xbf" * bom + b"\n".join(filled) + b"\n" * last
        (folder / f"s.chunk.{number:02d}.jsonl").write_bytes(content)
    return expected


def name_of(document) -> str:
    return re.match(r"\d+", text_of(document)).group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(files=FILES, ranks=st.integers(1, 7))
def test_every_usable_line_is_read_once_a_pass_by_one_process(folder, files, ranks):
    expected = write_files(folder, files)
    read = []
    for rank in range(ranks):
        state = distribute_data_to_rank(folder, rank, ranks)
        n_first = len(read)
        try:
            for document, after in read_share(state, max_malformed=1):
                if after["current_iter"] > 0:
                    break
                read.append(name_of(document))
        except DataError:
            assert len(read) == n_first, "it stopped after a document"
    assert sorted(read) == sorted(expected)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(files=FILES, ranks=st.integers(1, 4), data=st.data())
def test_reading_goes_on_from_every_state_whatever_the_lines(folder, files, ranks, data):
    write_files(folder, files)
    rank = data.draw(st.integers(0, ranks - 1))
    state = distribute_data_to_rank(folder, rank, ranks)
    try:
        everything = list(islice(read_share(state, max_malformed=1), 40))
    except DataError:
        return
    for index, (_, state) in enumerate(everything[:30]):
        resumed = read_share(json.loads(json.dumps(state)), max_malformed=1)
        assert list(islice(resumed, 10)) == everything[index + 1 : index + 11]


# Files that change while they are read.

N_LINES = 400
OTHER_TEXT = b'{"text": "quite another text, longer or shorter"}\n' * 60_000


@pytest.fixture(params=["buffered", "larger than the buffer"])
def being_read(path, request):
    """A file of 400 equally long lines of which the first two are read, and its reader."""
    filler = "x" * (40 if request.param == "buffered" else 6000)
    lines = [json.dumps({"text": f"{filler} {i:03d}"}).encode() + b"\n" for i in range(N_LINES)]
    path.write_bytes(b"".join(lines))
    documents = share(part(path))
    assert numbers(islice(documents, 2)) == [0, 1]
    yield path, documents, len(lines[0])
    documents.close()
    assert open_files(path.parent) == []


@pytest.mark.parametrize("where", ["in a line", "at the end of a line", "before what is read"])
def test_a_file_cut_while_it_is_open_is_an_error(being_read, where):
    path, documents, length = being_read
    size = {"in a line": 300 * length + 20, "at the end of a line": 300 * length}.get(where, length)
    os.truncate(path, size)
    message = (
        rf"{path} was cut from {N_LINES * length} to {size} bytes while .* byte \d+\): restore"
    )
    with pytest.raises(DataError, match=f"{message} it and start the run again"):
        list(islice(documents, N_LINES))


def test_a_file_cut_in_a_line_is_no_malformed_line(being_read, caplog):
    path, documents, length = being_read
    os.truncate(path, 300 * length + 20)
    found = []
    with pytest.raises(DataError, match="was cut"):
        found += documents
    assert "skipped" not in caplog.text


@pytest.mark.parametrize("n_taken", [10, N_LINES - 2], ids=["in a pass", "between passes"])
def test_a_file_replaced_while_it_is_in_use_is_an_error(being_read, n_taken):
    path, documents, _ = being_read
    list(islice(documents, n_taken))
    other = path.with_name("other")
    other.write_bytes(OTHER_TEXT)
    other.replace(path)
    with pytest.raises(DataError, match=rf"{path} was replaced by another text while"):
        list(islice(documents, N_LINES + 3))


def test_a_file_written_over_while_it_is_open_is_an_error(being_read):
    path, documents, _ = being_read
    path.write_bytes(OTHER_TEXT)
    with pytest.raises(DataError, match=rf"{path} was replaced by another text while"):
        list(islice(documents, N_LINES))


@pytest.mark.parametrize("n_taken", [10, N_LINES - 2], ids=["in a pass", "between passes"])
def test_another_text_of_the_same_length_is_an_error(being_read, n_taken):
    path, documents, _ = being_read
    list(islice(documents, n_taken))
    path.write_bytes(path.read_bytes().replace(b"x", b"y"))
    with pytest.raises(DataError, match=rf"{path} was replaced by another text while"):
        list(islice(documents, N_LINES))


def test_lines_added_while_a_file_is_in_use_come_with_the_next_pass(being_read, caplog):
    path, documents, _ = being_read
    with path.open("ab") as file:
        file.write(good(400) + b"\n")
    assert numbers(islice(documents, N_LINES - 1)) == [*range(2, N_LINES), 0]
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{path} was written while it is in use")
    assert numbers(islice(documents, N_LINES + 1)) == [*range(1, N_LINES), 400, 0]
    assert len(caplog.records) == 1


@pytest.mark.parametrize("when", ["before it is read", "after"])
def test_a_line_that_is_being_written_is_malformed_until_it_is_whole(path, when, caplog):
    path.write_bytes(good(0) + b"\n" + good(1)[:-4])
    documents = share(part(path))
    first = numbers(islice(documents, 1 if when == "before it is read" else 2))
    with path.open("ab") as file:
        file.write(good(1)[-4:] + b"\n" + good(2) + b"\n")
    rest = numbers(islice(documents, 4))
    if when == "after":
        assert first + rest == [0, 0, 1, 0, 1, 2]
        assert "line 2: not JSON" in caplog.text
    else:
        assert first + rest == [0, 1, 0, 1, 2]
        assert "not JSON" not in caplog.text
    assert f"{path} was written while it is in use" in caplog.text


def test_the_same_bytes_written_anew_are_reported(being_read, caplog):
    path, documents, _ = being_read
    path.write_bytes(path.read_bytes())
    list(islice(documents, N_LINES * 3))
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert f"{path} was written while it is in use" in messages[0]


def test_a_file_that_is_only_linked_to_from_elsewhere_has_not_changed(being_read, caplog):
    path, documents, _ = being_read
    os.link(path, path.with_name("backup"))
    assert len(list(islice(documents, 2 * N_LINES))) == 2 * N_LINES
    assert caplog.text == ""


@pytest.mark.parametrize("becomes", ["gone", "folder", "pipe", "unreadable"])
def test_a_file_that_cannot_be_read_again_is_an_error_and_no_hang(being_read, becomes):
    path, documents, _ = being_read
    path.chmod(0) if becomes == "unreadable" else path.unlink()
    if becomes == "unreadable" and os.access(path, os.R_OK):
        pytest.skip("this user may read every file")
    path.mkdir() if becomes == "folder" else None
    os.mkfifo(path) if becomes == "pipe" else None
    reason = {
        "gone": "No such file or directory",
        "folder": "Is a directory",
        "pipe": "it is no regular file",
        "unreadable": "Permission denied",
    }[becomes]
    assert len(list(islice(documents, N_LINES - 2))) == N_LINES - 2, "what is open can be read"
    with pytest.raises(DataError, match=rf"{path} cannot be read \({reason}\), at byte 0: put it"):
        next(documents)


class _Failing:
    """An open file whose reading fails from the third line on."""

    def __init__(self, file):
        self._file, self._n_read = file, 0

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._file.close()

    def readline(self, limit):
        self._n_read += 1
        if self._n_read > 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return self._file.readline(limit)


def test_a_disk_that_fails_is_an_error_with_the_place(path, monkeypatch):
    path.write_bytes(b"\n".join(map(good, range(5))))
    opened = lambda *a, **b: _Failing(open(*a, **b))  # noqa: E731, SIM115
    monkeypatch.setattr(_watched, "open", opened, raising=False)
    documents = share(part(path))
    assert numbers(islice(documents, 2)) == [0, 1]
    position = 2 * (len(good(0)) + 1)
    with pytest.raises(DataError, match=rf"{path} cannot be read \(.*\), at byte {position}: put"):
        next(documents)
    assert open_files(path.parent) == []


def test_a_line_without_an_end_does_not_fill_the_memory(path, monkeypatch):
    monkeypatch.setattr(_jsonl, "MAX_LINE_BYTES", 1000)
    monkeypatch.setattr(_jsonl, "READ_BUFFER", 500)
    path.write_bytes(good(0) + b"\n[" + good(1) * 100 + b"]")
    documents = share(part(path))
    assert numbers(islice(documents, 1)) == [0]
    message = rf"{path}: the line that begins at byte {len(good(0)) + 1} has more than 1000 bytes"
    with pytest.raises(DataError, match=message):
        next(documents)


# What is said of a pass.


def said_of_passes(caplog) -> list[str]:
    messages = [record.getMessage() for record in caplog.records]
    return [message for message in messages if "pass " in message]


def test_passes_are_counted_each_by_itself_and_said_ever_more_rarely(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="lingua")
    (tmp_path / "a").write_bytes(b"\n".join([good(0), b"", b"{", b"{", b"\xff", good(1), b"[]"]))
    (tmp_path / "b").write_bytes(b"\n".join([good(2), b" "]))
    list(islice(share(part(tmp_path / "a"), part(tmp_path / "b")), 3 * 20 + 1))
    counts = "9 lines and skipped 6 (2 empty, 2 not JSON, 1 not UTF-8, 1 not a JSON object)"
    name = f"{tmp_path}/a and 1 more"
    said = [f"{name}: pass {n} has read {counts}" for n in (1, 2, 4, 8, 16)]
    assert said_of_passes(caplog) == said
    files = [r.getMessage() for r in caplog.records if "of the" in r.getMessage()]
    kinds = "1 empty, 2 not JSON, 1 not UTF-8, 1 not a JSON object"
    assert [set(re.split(r"[(),] ?", line)) for line in files] == [
        set(re.split(r"[(),] ?", f"{tmp_path}/a: skipped 5 of the 7 lines read ({kinds})")),
        set(re.split(r"[(),] ?", f"{tmp_path}/b: skipped 1 of the 2 lines read (1 empty)")),
    ]


def test_the_rest_of_a_pass_says_where_it_began(path, caplog):
    caplog.set_level(logging.INFO, logger="lingua")
    path.write_bytes(b"\n".join([good(0), b"{", good(1), b"", good(2)]))
    state = list(islice(share(part(path)), 2))[-1][1]
    caplog.clear()
    assert numbers(islice(read_share(state), 5)) == [2, 0, 1, 2, 0]
    assert said_of_passes(caplog) == [
        f"{path}: the rest of pass 1 has read 2 lines and skipped 1 (1 empty)",
        f"{path}: pass 2 has read 5 lines and skipped 2 (1 not JSON, 1 empty)",
    ]
    position = state["position"]
    messages = [record.getMessage() for record in caplog.records]
    assert f"{path}: skipped 1 of the 2 lines read from byte {position} on (1 empty)" in messages
    assert f"{path}: skipped 2 of the 5 lines read (1 not JSON, 1 empty)" in messages


@pytest.mark.parametrize("name", ["a b", "naïve 漢", "two\nlines", "\udcff"])
def test_names_of_every_kind(tmp_path, name, caplog):
    path = tmp_path / f"{name}.chunk.0.jsonl"
    try:
        path.write_bytes(b"{\n" + good(0))
    except (OSError, UnicodeError):
        pytest.skip(f"the file system does not take the name {name!r}")
    state = distribute_data_to_rank(tmp_path, 0, 1)
    ((_, after),) = islice(read_share(state), 1)
    assert numbers(islice(read_share(json.loads(json.dumps(after))), 2)) == [0, 0]
    path.unlink()
    with pytest.raises(DataError, match="cannot be read") as caught:
        next(read_share(after))
    for message in (str(caught.value), *(r.getMessage() for r in caplog.records)):
        assert "\n" not in message
        message.encode()
