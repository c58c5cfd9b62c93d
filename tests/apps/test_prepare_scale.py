"""The shuffle on disk gives what the plain one in memory gives, in the memory allowed."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apps.topk.corpus.records import PARTS, Records
from apps.topk.corpus.split import split
from apps.topk.prepare import prepare

ROOT = Path(__file__).resolve().parents[2]
ENWIKI = ROOT.parent / "shared" / "data" / "enwiki.train.jsonl.xz"


def write(path: Path, documents: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def read(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_bytes().splitlines()]


def made(out: Path) -> tuple[list[list[str]], list[str]]:
    """The chunks, and what is held out."""
    chunks = [read(path) for path in sorted(out.glob("*/*.chunk.*.jsonl"))]
    (validation,) = out.glob("*/*.val.jsonl")
    return chunks, read(validation)


def assert_plain(documents, source, out, chunks=1, **arguments):
    """What prepare makes of `source`, which holds `documents`, is what `split` says."""
    prepare(source=str(source), out=str(out), vocab_size=0, chunks=chunks, **arguments)
    plain = {key: arguments[key] for key in ("val_documents",) if key in arguments}
    parts = split(documents, arguments.get("val_share", 0.05), arguments.get("seed", 42), **plain)
    dealt = [parts.train[chunk::chunks] for chunk in range(chunks)]
    assert made(out) == (dealt, parts.validation)
    counts = json.loads((out / "manifest.json").read_text())["counts"]
    assert counts["duplicates_dropped"] == parts.duplicates
    for part, expected in (("train", parts.train), ("validation", parts.validation)):
        assert counts[part] == {
            "documents": len(expected),
            "characters": sum(map(len, expected)),
            "bytes": sum(len(text.encode()) for text in expected),
        }


def corpus(count: int, seed: int) -> list[str]:
    """Documents of 0 to 40 kB; a fifth of them differs from another in whitespace only."""
    noise = random.Random(seed)
    texts = [
        f"{noise.randrange(count)} "
        + "漢字 words\n\tand ¶" * min(int(noise.paretovariate(1)), 2_000)
        for _ in range(count)
    ]
    return texts + [text.replace(" ", noise.choice("\n\t\u00a0")) for text in texts[: count // 5]]


def test_buckets_too_large_for_memory_are_divided(tmp_path, monkeypatch):
    groups = []
    original = Records.groups

    def counting(self, bucket, weight, limit):
        found = original(self, bucket, weight, limit)
        groups.append(len(found))
        return found

    monkeypatch.setattr(Records, "groups", counting)
    monkeypatch.setattr("apps.topk.corpus.dealing.GROUP_SHARE", 0.001)  # of 1 MB
    documents = corpus(8_000, seed=0)
    source = write(tmp_path / "a.jsonl", documents)
    assert_plain(documents, source, tmp_path / "out", memory_mb=1, chunks=3, val_share=0.2)
    assert max(groups) > 5
    assert max(groups) < PARTS


def test_the_order_of_the_files_plays_no_part(tmp_path):
    documents = corpus(1_000, seed=1)
    for name, seed in (("one", 0), ("two", 1)):
        random.Random(seed).shuffle(documents)
        for number in range(4):
            write(tmp_path / name / f"{number}.jsonl", documents[number::4])
        assert_plain(documents, tmp_path / name, tmp_path / "out" / name, memory_mb=1, name="x")
    for file in ("x/x.chunk.00.jsonl", "x/x.val.jsonl"):
        one, two = (tmp_path / "out" / name / file for name in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()


any_text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    documents=st.lists(
        any_text, min_size=4, max_size=30, unique_by=lambda text: " ".join(text.split())
    ),
    doubled=st.integers(0, 5),
    share=st.floats(0.01, 0.99),
    most=st.integers(1, 20),
    seed=st.integers(0, 10),
)
def test_any_documents(tmp_path, documents, doubled, share, most, seed):
    shutil.rmtree(tmp_path, ignore_errors=True)
    documents += [f" {text}\n" for text in documents[:doubled]]
    source = write(tmp_path / "a.jsonl", documents)
    assert_plain(
        documents, source, tmp_path / "out", val_share=share, val_documents=most, seed=seed
    )


def peak_mb(*argv: str) -> float:
    """The largest resident set of a prepare with `argv`, in MB."""
    program = (
        "import resource, subprocess, sys;"
        "subprocess.run([sys.executable, '-m', 'apps.topk.prepare', *sys.argv[1:]], check=True,"
        " stdout=subprocess.DEVNULL);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, *argv], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return int(ended.stdout) * (1 if sys.platform == "darwin" else 1024) / 1e6


@pytest.mark.slow
@pytest.mark.skipif(not ENWIKI.exists(), reason=f"needs {ENWIKI.name} beside the checkout")
@pytest.mark.parametrize(
    ("memory", "vocab_size"), [(512, 32_000), (64, 0)], ids=["default", "64-mb-no-tokenizer"]
)
def test_52_mb_of_text_in_the_memory_that_is_stated(tmp_path, memory, vocab_size):
    to_start = peak_mb("--help")
    peak = peak_mb(
        f"--source={ENWIKI}",
        f"--out={tmp_path / 'out'}",
        f"--memory_mb={memory}",
        f"--vocab_size={vocab_size}",
    )
    assert peak < to_start + memory
