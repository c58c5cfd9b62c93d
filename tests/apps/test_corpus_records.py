"""Records on disk: all of them back, in order, once, in the memory that is allowed."""

import hashlib
import random
import tracemalloc

import pytest

from apps.topk.corpus.counting import plan
from apps.topk.corpus.draws import HELD_OUT, ORDER, content_hash, draw, seed_key
from apps.topk.corpus.records import BUCKETS, PARTS, Record, Records
from apps.topk.corpus.split import split
from lingua_topk.errors import DataError


def number(value: int) -> bytes:
    return hashlib.blake2b(b"%d" % value, digest_size=16).digest()


def made(path, keys, texts, flush_every=100) -> Records:
    records = Records(path)
    for count, (key, text) in enumerate(zip(keys, texts, strict=True), 1):
        records.add(key, number(count), text)
        if count % flush_every == 0:
            records.flush()
    records.flush()
    return records


def in_order(records: Records, limit: int) -> list[Record]:
    return [record for _, group in records.ordered(limit) for record in group]


@pytest.mark.parametrize("limit", [1, 3_000, 10**9])
def test_sorted_by_their_keys(tmp_path, limit):
    keys = [number(-value) for value in range(1_500)]
    texts = [b"text %d " % value * (value % 50) for value in range(1_500)]
    records = made(tmp_path / "r", keys, texts)
    there = in_order(records, limit)
    expected = sorted(zip(keys, texts, strict=True))
    assert [(record.key, record.text) for record in there] == expected
    assert {record.other for record in there} == {number(value + 1) for value in range(1_500)}


@pytest.mark.parametrize("limit", [1, 10**9])
def test_of_one_key_the_least_text_is_kept(tmp_path, limit):
    keys = [number(value % 40) for value in range(400)]
    texts = [random.Random(value).randbytes(9) for value in range(400)]
    records = made(tmp_path / "r", keys, texts, flush_every=7)
    least = {key: min(t for k, t in zip(keys, texts, strict=True) if k == key) for key in keys}
    there = in_order(records, limit)
    assert [(record.key, record.text) for record in there] == sorted(least.items())


def test_what_comes_after_the_size_is_cut_off(tmp_path):
    keys = [number(value) for value in range(300)]
    records = made(tmp_path / "r", keys, [b"x"] * 300)
    size = records.size
    for key in keys:
        records.add(key, key, b"later" * 99)
    records.flush()
    records.close()
    again = Records(tmp_path / "r", size)
    assert {record.text for record in in_order(again, 10**9)} == {b"x"}
    again.add(number(1_000), number(1_000), b"more")
    again.flush()
    assert len(in_order(again, 10**9)) == 301
    again.close()
    with pytest.raises(DataError, match="is shorter than what was written to it"):
        Records(tmp_path / "r", 10**9)


def test_one_bucket_is_read_in_the_memory_allowed(tmp_path):
    # Keys that share the bits of a bucket, documents of very different sizes.
    keys = [bytes([0, value % 64]) + number(value)[2:] for value in range(8_000)]
    sizes = random.Random(0)
    texts = (b"x" * int(sizes.paretovariate(1.1) * 50) for _ in keys)
    records = made(tmp_path / "r", keys, (text[:20_000] for text in texts))
    limit = 500_000
    assert sum(records.weights()) > 5 * limit
    tracemalloc.start()
    seen = 0
    for bucket, group in records.ordered(limit):
        assert bucket == 0
        seen += len(group)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seen == 8_000
    assert peak < 1.5 * limit


def test_groups_cover_a_bucket_once(tmp_path):
    keys = [bytes([0, value % 64]) + number(value)[2:] for value in range(2_000)]
    records = made(tmp_path / "r", keys, [b"x" * 100] * 2_000)
    weights = records.weights()
    assert len(weights) == BUCKETS
    for limit in (1, 500, 100_000):
        groups = records.groups(0, weights[0], limit)
        assert [part for group in groups for part in group] == list(range(PARTS))
        assert len(groups) > 1


@pytest.mark.parametrize("limit", [1, 10**9])
@pytest.mark.parametrize("share", [0.001, 0.05, 0.5, 0.999])
@pytest.mark.parametrize("most", [1, 30, 10**9])
def test_what_is_held_out_is_what_the_plain_definition_holds_out(tmp_path, limit, share, most):
    documents = [f"document {value % 700}" + " " * (value % 3) for value in range(1_500)]
    key = seed_key(5)
    hashes = [content_hash(document) for document in documents]
    records = Records(tmp_path / "r")
    for words, document in zip(hashes, documents, strict=True):
        records.add(draw(words, key, ORDER), draw(words, key, HELD_OUT), document.encode())
    records.flush()
    counted = plan(records, share, most, limit)
    parts = split(documents, share, 5, most)
    held_out = [r.text.decode() for r in in_order(records, limit) if r.other <= counted.last]
    assert counted.distinct == 700
    assert counted.held_out == len(parts.validation)
    assert sorted(held_out) == sorted(parts.validation)
