"""Documents from .parquet files: the columns that hold text, and what is no text."""

import pyarrow
import pyarrow.parquet
import pytest

from apps.topk.corpus.local_files import LocalFiles
from apps.topk.corpus.tally import Tally
from lingua_topk.errors import DataError

KEYS = ["text", "content"]


def read(path, keys=KEYS):
    tally = Tally()
    source = LocalFiles(path, str(path), keys)
    documents = list(source.documents(tally))
    assert source.done == source.size
    return documents, tally


def write(path, row_group_size=3, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=row_group_size)
    return path


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string()])
def test_rows_in_their_order(tmp_path, kind):
    texts = [f"number {number} — naïve 漢字 🙂\0" for number in range(200)]
    path = write(tmp_path / "a.parquet", text=pyarrow.array(texts, kind), id=list(range(200)))
    assert read(path) == (texts, Tally())
    assert read(tmp_path) == (texts, Tally())


def test_the_first_key_that_holds_text_counts(tmp_path):
    path = write(tmp_path / "a.parquet", content=["a", "b", "c"], text=["A", None, ""])
    documents, tally = read(path)
    assert documents == ["A", "b"]  # the third is empty in `text`
    assert tally.counts == {"empty documents skipped": 1}
    assert read(path, ["content", "text"])[0] == ["a", "b", "c"]
    assert read(write(path, text=[1, 2], content=["a", "b"]))[0] == ["a", "b"]


def test_rows_without_text_are_counted_and_named(tmp_path):
    path = write(tmp_path / "a.parquet", text=["one", None, " \n", "two"])
    documents, tally = read(path)
    assert documents == ["one", "two"]
    assert tally.examples == {
        "lines without the text key skipped": [f"{path}: row 2: null"],
        "empty documents skipped": [f"{path}: row 3"],
    }


def test_a_string_that_is_no_utf8_is_mended(tmp_path):
    broken = pyarrow.array([b"caf\xe9", b"tea"]).view(pyarrow.string())
    documents, tally = read(write(tmp_path / "a.parquet", text=broken))
    assert documents == ["caf\ufffd", "tea"]
    assert list(tally.examples.values()) == [[f"{tmp_path}/a.parquet: row 1: byte 4"]]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"body": ["x"], "id": [1]}, "has no column text or content: its columns are body, id"),
        ({"text": [1, 2]}, "column text holds int64, not text: set --text_key"),
        ({"text": [["x"]]}, "column text holds list<element: string>, not text"),
        ({"text": [None, "  "]}, "none of its 2 rows gives a document"),
    ],
)
def test_files_without_a_document_stop(tmp_path, columns, message):
    path = write(tmp_path / "a.parquet", **columns)
    with pytest.raises(DataError) as error:
        read(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["truncated", "foreign", "flipped"])
def test_damaged_files_stop(tmp_path, damage):
    path = write(tmp_path / "a.parquet", 50, text=[f"number {n}" * 9 for n in range(500)])
    whole = path.read_bytes()
    path.write_bytes(
        {
            "truncated": whole[: len(whole) // 2],
            "foreign": b"neither here nor there",
            "flipped": whole[:40] + bytes(400) + whole[440:],
        }[damage]
    )
    with pytest.raises(DataError, match=r"a\.parquet is damaged or truncated, or no parquet"):
        read(path)


def test_an_empty_file_is_counted(tmp_path):
    write(tmp_path / "a.parquet", text=["x"])
    (tmp_path / "b.parquet").write_bytes(b"")
    write(tmp_path / "c.parquet", text=pyarrow.array([], pyarrow.string()))
    documents, tally = read(tmp_path)
    assert documents == ["x"]
    assert tally.counts == {"empty files": 2}


def test_a_compressed_parquet_file_is_left_aside(tmp_path):
    (tmp_path / "a.parquet.gz").write_bytes(b"x")
    (tmp_path / "b.txt").write_text("text")
    assert read(tmp_path)[1].counts == {"files of another kind left aside": 1}
