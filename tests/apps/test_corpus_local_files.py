"""Documents from files: what is read, what is counted, what stops."""

import gzip
import json
import lzma
import os
import random

import pyarrow
import pyarrow.parquet
import pytest

from apps.topk.corpus.local_files import LocalFiles
from apps.topk.corpus.tally import Tally
from lingua_topk.errors import DataError

KEYS = ["text", "content"]


def read(path, keys=KEYS):
    """The documents of a file or folder, and what was counted on the way."""
    tally = Tally()
    source = LocalFiles(path, str(path), keys)
    documents = list(source.documents(tally))
    assert source.done == source.size
    return documents, tally


def zstd(content: bytes) -> bytes:
    """Two frames, as tools that compress in parallel write."""
    middle = len(content) // 2
    parts = (content[:middle], content[middle:])
    return b"".join(pyarrow.compress(part, codec="zstd", asbytes=True) for part in parts)


def as_jsonl(*records) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [
        ("", bytes),
        (".gz", gzip.compress),
        (".xz", lzma.compress),
        (".zst", zstd),
        (".XZ", lzma.compress),
    ],
)
def test_jsonl_and_txt_plain_or_compressed(tmp_path, suffix, compress):
    text = "Two  spaces,\ta tab and\n\na blank line — naïve 漢字\u2028 🙂"
    jsonl, txt = tmp_path / f"a.jsonl{suffix}", tmp_path / f"b.txt{suffix}"
    jsonl.write_bytes(compress(as_jsonl({"text": text}, {"content": "other"})))
    txt.write_bytes(compress(text.encode()))
    assert read(jsonl) == ([text, "other"], Tally())
    assert read(txt) == ([text], Tally())
    assert read(tmp_path) == ([text, "other", text], Tally())


def test_a_folder_is_read_in_order_and_to_the_bottom(tmp_path):
    for name in ("b/z.txt", "b/a.txt", "a/deep/er/x.jsonl", ".hidden/h.txt", "b/.h.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(as_jsonl({"text": name}) if name.endswith("jsonl") else name.encode())
    (tmp_path / "b" / "picture.png").write_bytes(b"\x89PNG")
    os.symlink(tmp_path / "nowhere", tmp_path / "b" / "gone.txt")
    documents, tally = read(tmp_path)
    assert documents == ["a/deep/er/x.jsonl", "b/a.txt", "b/z.txt"]
    assert tally.counts == {"files of another kind left aside": 2}


def test_the_first_key_that_holds_text_counts(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        as_jsonl(
            {"content": "second", "text": "first"},
            {"text": None, "content": "second"},
            {"body": "third", "text": 3},
        )
    )
    assert read(path)[0] == ["first", "second"]
    assert read(path, ["body", "content"])[0] == ["second", "second", "third"]


def test_bad_lines_are_skipped_counted_and_named(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [
        b'{"text": "good"}',
        b'{"text": "cut off',
        b"",
        b"[1, 2]",
        b'{"title": "no text"}',
        b'{"text": " \\n "}',
        b"[" * 100_000,
        b'{"text": "good too"}',
    ]
    path.write_bytes(b"\n".join(lines))
    documents, tally = read(path)
    assert documents == ["good", "good too"]
    assert tally.counts == {
        "malformed lines skipped": 3,
        "lines without the text key skipped": 1,
        "empty documents skipped": 1,
    }
    malformed = tally.examples["malformed lines skipped"]
    assert [place.split(": ")[0] for place in malformed] == [f"{path}:{n}" for n in (2, 4, 7)]
    assert tally.examples["lines without the text key skipped"] == [
        f"{path}:5: its keys are 'title'"
    ]
    assert tally.examples["empty documents skipped"] == [f"{path}:6"]


def test_the_tally_shows_a_few_places_only():
    tally = Tally()
    for number in range(1_234):
        tally.add("bad lines", f"a:{number}")
    assert tally.lines() == ["bad lines: 1,234 (a:0; a:1; a:2; ...)"]


def test_what_is_no_unicode_is_mended_and_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes("café\ntea\n".encode("latin-1"))
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "lone \\ud800 half"}\n{"text": "\\ud83d\\ude42"}')
    documents, tally = read(tmp_path)
    assert documents == ["caf\ufffd\ntea", "lone \ufffd half", "🙂"]
    (places,) = tally.examples.values()
    assert places == [
        f"{tmp_path}/a.txt:1: byte 4",
        f"{tmp_path}/b.jsonl:1: character 6 of the text",
    ]


def test_line_ends_and_byte_order_mark(tmp_path):
    path = tmp_path / "dos.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert read(path) == (["one\ntwo"], Tally())
    path = tmp_path / "dos.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one\\r\\ntwo"}\r\n')
    assert read(path) == (["one\r\ntwo"], Tally())  # a document's own characters stay


def test_a_short_txt_file_is_one_document_and_a_long_one_is_cut(tmp_path):
    paragraphs = [f"Paragraph {i}. " + "word " * 100 for i in range(200)]
    short, long = "\n\n".join(paragraphs[:30]), "\n\n".join(paragraphs)
    (tmp_path / "short.txt").write_text(short)
    (tmp_path / "long.txt").write_text(long)
    assert read(tmp_path / "short.txt")[0] == [short]
    cut, _ = read(tmp_path / "long.txt")
    assert "\n\n".join(cut) == long
    assert all(6_000 <= len(passage) < 7_000 for passage in cut[:-1])


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.gz", "a.jsonl.xz", "a.txt.zst"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "foreign"])
def test_damaged_files_stop(tmp_path, name, damage):
    noise = random.Random(0)
    text = b"".join(as_jsonl({"text": f"number {noise.random()}"}) for _ in range(5_000))
    whole = {"gz": gzip.compress, "xz": lzma.compress, "zst": zstd}[name.rpartition(".")[2]](text)
    middle = len(whole) // 2
    content = {
        "truncated": whole[:middle],
        "flipped": whole[:middle] + bytes(64) + whole[middle + 64 :],
        "foreign": b"neither of the two",
    }[damage]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=r"is damaged or truncated after line [\d,]+") as error:
        read(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"body": "x"}\n{"body": "y"}', "none of its 2 lines gives a document"),
        ("a.jsonl", b'{"body": "x"}\n', "a.jsonl:1: its keys are 'body'"),
        ("a.jsonl", b'{"body": "x"}\n', "--text_key (it is text,content)"),
        ("a.jsonl", b"this is not JSON\n", "a.jsonl:1: Expecting value"),
        ("a.txt", b"\n \n", "none of its 2 lines gives a document (all are blank)"),
        ("a.txt", "text".encode("utf-16"), "is UTF-16: convert it to UTF-8"),
        ("a.txt", b"", "holds no document: all its files are empty"),
    ],
)
def test_files_without_a_document_stop(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        read(tmp_path)
    assert message in str(error.value)


def test_an_empty_file_among_others_is_counted(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.jsonl").write_text("")
    documents, tally = read(tmp_path)
    assert documents == ["text"]
    assert tally.examples == {"empty files": [f"{tmp_path}/b.jsonl"]}


def test_a_folder_without_text_stops(tmp_path):
    (tmp_path / "a.md").write_text("text")
    with pytest.raises(DataError, match=r"holds no \.txt, \.jsonl or \.parquet file"):
        LocalFiles(tmp_path, "notes", KEYS)


def test_the_fingerprint_changes_with_the_files(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    os.utime(path, ns=(0, 1))
    first = LocalFiles(tmp_path, "x", KEYS).fingerprint()
    assert LocalFiles(tmp_path, "y", KEYS).fingerprint() == first
    assert json.loads(json.dumps(first)) == first
    os.utime(path, ns=(0, 2))
    later = LocalFiles(tmp_path, "x", KEYS).fingerprint()
    (tmp_path / "b.txt").write_text("two")
    more = LocalFiles(tmp_path, "x", KEYS).fingerprint()
    assert first != later != more != first


def resumed(path, after: int):
    """The documents before and after a stop, with the tally at the end of both."""
    tally = Tally()
    source = LocalFiles(path, str(path), KEYS)
    documents = source.documents(tally)
    before = [next(documents) for _ in range(after)]
    cursor = json.loads(json.dumps(source.cursor()))
    counted = Tally(**json.loads(json.dumps(vars(tally))))
    source = LocalFiles(path, str(path), KEYS)
    after = list(source.documents(counted, cursor))
    assert source.done == source.size
    return before, after, counted


def write_every_kind(folder):
    lines = as_jsonl(*({"text": f"number {number} — naïve"} for number in range(9)))
    mixed = b"not JSON\n" + lines + b'{"body": 1}\n{"text": "\xff and so on"}\n'
    for suffix, compress in (("", bytes), (".gz", gzip.compress), (".zst", zstd)):
        (folder / f"a.jsonl{suffix}").write_bytes(compress(mixed))
        text = b"\n\n".join(b"caf\xe9 %d " % number + b"word " * 2_000 for number in range(8))
        (folder / f"b.txt{suffix}").write_bytes(compress(text))
    (folder / "c.txt").write_bytes(b"")
    rows = [None, "", *(f"row {number}" for number in range(9))]
    table = pyarrow.table({"id": list(range(11)), "text": rows})
    pyarrow.parquet.write_table(table, folder / "d.parquet", row_group_size=4)


def test_reading_goes_on_after_any_document(tmp_path):
    write_every_kind(tmp_path)
    documents, tally = read(tmp_path)
    assert len(documents) > 50
    assert len(tally.counts) == 5
    for after in range(1, len(documents) + 1):
        assert resumed(tmp_path, after) == (documents[:after], documents[after:], tally)


@pytest.mark.parametrize("change", ["shrinks", "grows", "vanishes"])
def test_a_file_that_changes_while_it_is_read(tmp_path, change):
    path = tmp_path / "a.jsonl"
    lines = as_jsonl(*({"text": f"number {number}"} for number in range(50_000)))
    path.write_bytes(lines)
    documents = LocalFiles(tmp_path, "x", KEYS).documents(Tally())
    next(documents)
    if change == "vanishes":
        path.unlink()
    else:
        path.write_bytes(lines[:-9_000] if change == "shrinks" else lines + lines)
    with pytest.raises(DataError, match=r"changed while it was read|No such file"):
        for _ in documents:
            pass


def test_a_file_that_vanishes_before_its_turn(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("text")
    documents = LocalFiles(tmp_path, "x", KEYS).documents(Tally())
    next(documents)
    (tmp_path / "b.txt").unlink()
    with pytest.raises(DataError, match=r"b\.txt cannot be read: No such file"):
        list(documents)


def test_a_nul_is_a_character(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(as_jsonl({"text": "a\0b"}))
    assert read(path) == (["a\0b"], Tally())
