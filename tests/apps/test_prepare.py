"""The command: what it writes, what it reuses, what it refuses."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import yaml

from apps.topk import cli
from apps.topk.corpus.tokenizer import first_bytes, train_tokenizer
from apps.topk.prepare import main, prepare
from lingua_topk.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parents[2]
N_TEXTS = 40
PIECES = 330


def texts(count: int = N_TEXTS) -> list[str]:
    return [
        f"Document {i} tells of the {i * 7} boats\n\n\tand  of the sea, {'wind ' * (i % 5)}…"
        for i in range(count)
    ]


def write_jsonl(path: Path, documents: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"text": document}) + "\n" for document in documents)
    path.write_text("".join(lines), encoding="utf-8")
    return path


def read_jsonl(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` with its content."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def run(argv: list[str]) -> int:
    """The exit status of the command."""
    try:
        cli.run(lambda: main(argv))
    except SystemExit as error:
        return error.code
    return 0


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "text" / "sea.jsonl", texts())


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "data" / "sea"


def made(source: Path, out: Path, **arguments) -> dict:
    return prepare(source=str(source), out=str(out), **{"vocab_size": PIECES, **arguments})


def test_layout_and_every_document_once(source, out):
    manifest = made(source, out, chunks=3, val_share=0.1)
    assert set(snapshot(out)) == {
        "manifest.json",
        "sea/sea.chunk.00.jsonl",
        "sea/sea.chunk.01.jsonl",
        "sea/sea.chunk.02.jsonl",
        "sea/sea.val.jsonl",
        "tokenizer.model",
        "tokenizer.vocab",
    }
    chunks = [read_jsonl(path) for path in sorted(out.glob("sea/*.chunk.*.jsonl"))]
    validation = read_jsonl(out / "sea" / "sea.val.jsonl")
    train = [document for chunk in chunks for document in chunk]
    assert sorted(train + validation) == sorted(texts())
    assert [len(chunk) for chunk in chunks] == [12, 12, 12]
    assert len(validation) == 4
    counts = manifest["counts"]
    assert counts["train"]["documents"] == 36
    assert counts["train"]["characters"] == sum(map(len, train))
    assert counts["validation"]["bytes"] == sum(len(text.encode()) for text in validation)


def test_the_manifest_describes_the_files(source, out):
    manifest = made(source, out)
    assert json.loads((out / "manifest.json").read_text()) == manifest
    files = snapshot(out)
    del files["manifest.json"]
    assert manifest["files"] == {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in files.items()
    }
    assert manifest["inputs"]["seed"] == 42
    assert manifest["inputs"]["sources"][0]["path"] == str(source)
    assert {"python", "sentencepiece", "lingua_topk"} <= manifest.keys()


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(source, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        made(source, tmp_path / name, seed=seed, chunks=2)
    a, b, c = (snapshot(tmp_path / name) for name in "abc")
    for files in (a, b, c):
        del files["manifest.json"]
    assert a == b
    assert a["sea/sea.val.jsonl"] != c["sea/sea.val.jsonl"]


def test_the_tokenizer_has_the_size_asked_for_and_never_sees_held_out_text(tmp_path):
    documents = [f"{text} {chr(0x4E00 + i) * 50}" for i, text in enumerate(texts())]
    made(write_jsonl(tmp_path / "t.jsonl", documents), tmp_path / "out", val_share=0.5)
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "out/tokenizer.model"))
    assert model.get_piece_size() == PIECES
    vocabulary = (tmp_path / "out/tokenizer.vocab").read_text(encoding="utf-8")
    (held_out,) = (tmp_path / "out").glob("*/*.val.jsonl")
    ideographs = {text[-1] for text in read_jsonl(held_out)}
    assert len(ideographs) == N_TEXTS // 2
    assert not ideographs & set(vocabulary)
    assert len(vocabulary.splitlines()) == PIECES


def test_without_a_tokenizer(source, out, capsys):
    manifest = made(source, out, vocab_size=0)
    assert manifest["tokenizer"] is None
    assert not list(out.glob("tokenizer*"))
    assert "tokenizer:" not in capsys.readouterr().out


def test_the_summary_ends_with_what_a_config_needs(source, out, capsys):
    made(source, out)
    printed = capsys.readouterr()
    config = yaml.safe_load(printed.out[printed.out.index("data:\n") :])
    assert config == {
        "data": {
            "root_dir": str(out),
            "sources": {"sea": 1.0},
            "tokenizer": {"name": "sp", "path": str(out / "tokenizer.model")},
        }
    }
    assert printed.err == ""  # no bars where there is no terminal


@pytest.mark.parametrize(
    ("name", "expected"),
    [("sea.jsonl", "sea"), ("my sea.v1.txt.gz", "my_sea_v1"), ("ж.jsonl", "text")],
)
def test_default_name(tmp_path, name, expected):
    path = write_jsonl(tmp_path / "plain.jsonl", texts())
    named = tmp_path / name
    if name.endswith(".gz"):
        import gzip

        named.write_bytes(gzip.compress("\n\n".join(texts(900)).encode()))
    else:
        path.rename(named)
    assert made(named, tmp_path / "out", vocab_size=0)["inputs"]["name"] == expected


def test_several_sources_by_commas_or_repeated(tmp_path):
    first = write_jsonl(tmp_path / "a" / "one.jsonl", texts()[:20])
    second = write_jsonl(tmp_path / "b" / "two.jsonl", texts()[20:])
    common = ["--vocab_size", "0"]
    assert run(["--source", f"{first},{second.parent}", "--out", str(tmp_path / "x"), *common]) == 0
    repeated = ["--source", str(first), f"--source={second.parent}"]
    assert run([*repeated, "--out", str(tmp_path / "y"), *common]) == 0
    whole = write_jsonl(tmp_path / "c" / "mixed.jsonl", texts())
    assert run(["--source", str(whole), "--out", str(tmp_path / "z"), *common]) == 0
    documents = {
        name: {key: value for key, value in snapshot(tmp_path / name).items() if "mixed" in key}
        for name in "xyz"
    }
    assert set(documents["x"]) == {"mixed/mixed.chunk.00.jsonl", "mixed/mixed.val.jsonl"}
    # Which file a document comes from plays no part.
    assert documents["x"] == documents["y"] == documents["z"]


def test_a_second_run_uses_what_is_there(source, out, capsys):
    made(source, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    capsys.readouterr()
    made(source, out)
    assert "already there" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 7}, "seed=7 (there: 42)"),
        ({"vocab_size": 0, "chunks": 2}, "chunks=2 (there: 1), vocab_size=0 (there: 330)"),
        ({"name": "lake"}, "name='lake' (there: 'sea')"),
    ],
)
def test_other_arguments_are_refused_and_nothing_is_touched(source, out, changed, message):
    made(source, out)
    before = snapshot(out.parent)
    with pytest.raises(ConfigError) as error:
        made(source, out, **changed)
    assert message in str(error.value)
    assert "--overwrite true" in str(error.value)
    assert snapshot(out.parent) == before


def test_a_changed_source_is_refused_and_overwrite_replaces(source, out):
    made(source, out)
    write_jsonl(source, texts(50))
    with pytest.raises(ConfigError, match=r"the files of .*, which changed since"):
        made(source, out)
    manifest = made(source, out, overwrite=True)
    assert manifest["counts"]["train"]["documents"] == 48
    assert os.listdir(out.parent) == [out.name]


def test_damaged_output_is_not_used(source, out):
    made(source, out)
    chunk = out / "sea" / "sea.chunk.00.jsonl"
    chunk.write_bytes(chunk.read_bytes()[:-10])
    with pytest.raises(DataError, match=r"sea\.chunk\.00\.jsonl is missing or of another size"):
        made(source, out)
    made(source, out, overwrite=True)
    made(source, out)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_somebody_else_is_never_replaced(source, out, overwrite):
    out.mkdir(parents=True)
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match=r"holds no readable manifest\.json"):
        made(source, out, overwrite=overwrite)
    assert snapshot(out) == {"thesis.txt": b"years of work"}


def test_files_added_to_the_output_are_never_deleted(source, out):
    made(source, out)
    (out / "sea" / "notes.md").write_text("mine")
    with pytest.raises(ConfigError, match=r"did not write \(sea/notes\.md\)"):
        made(source, out, seed=1, overwrite=True)
    assert (out / "sea" / "notes.md").read_text() == "mine"


def test_an_empty_folder_is_filled(source, out):
    out.mkdir(parents=True)
    made(source, out)
    assert (out / "manifest.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"chunks": 0}, "chunks=0 is not allowed"),
        ({"val_documents": 0}, "val_documents=0 is not allowed"),
        ({"tokenizer_mb": 0}, "tokenizer_mb=0 is not allowed"),
        ({"memory_mb": -1}, "memory_mb=-1 is not allowed"),
        ({"val_share": 0.0}, "val_share=0.0 is not between 0 and 1"),
        ({"val_share": 1.0}, "val_share=1.0 is not between 0 and 1"),
        ({"val_share": float("nan")}, "val_share=nan is not between 0 and 1"),
        ({"vocab_size": -1}, "vocab_size=-1 is not allowed"),
        ({"vocab_size": 10**12}, "vocab_size=1000000000000 is not allowed"),
        ({"name": "a.chunk.b"}, "name='a.chunk.b' is not made of letters"),
        ({"name": "../up"}, "name='../up' is not made of letters"),
        ({"text_key": " , "}, "text_key=' , ' names no key"),
        ({"source": "no/such/file"}, "source='no/such/file' is neither python-docs nor a file"),
        ({"source": ""}, "source='' is neither"),
        ({"source": "hf:a/b/c"}, "source='hf:a/b/c' is not of the form hf:OWNER/NAME"),
        ({"out": ""}, "out='' cannot be a folder to write"),
        ({"out": "/"}, "out='/' cannot be a folder to write"),
    ],
)
def test_arguments_that_are_not_allowed(source, out, arguments, message):
    with pytest.raises(ConfigError) as error:
        prepare(**{"source": str(source), "out": str(out), **arguments})
    assert message in str(error.value)
    assert not out.exists()


def test_source_and_out_may_not_overlap(source):
    for out in (source.parent, source.parent / "new", source.parent.parent):
        with pytest.raises(ConfigError, match="lie in one another"):
            made(source.parent, out)


def test_the_same_source_twice(source, out):
    with pytest.raises(ConfigError, match="names the same source twice"):
        made(f"{source},{source}", out)


@pytest.mark.parametrize(
    ("documents", "arguments", "message"),
    [
        (["one"], {}, "holds 1 distinct document"),
        (["one two", " one\ntwo "], {}, "holds 1 distinct document"),
        (["a b", "c d"], {"chunks": 2}, "chunks=2 is more than the 1 training documents"),
    ],
)
def test_text_that_cannot_be_used_leaves_nothing(tmp_path, documents, arguments, message):
    source = write_jsonl(tmp_path / "t.jsonl", documents)
    out = tmp_path / "data" / "out"
    with pytest.raises(DataError) as error:
        made(source, out, **arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not os.listdir(out.parent)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (9000, "vocab_size=9000 is more than the training text gives"),
        (100, "vocab_size=100 is too few"),
    ],
)
def test_a_vocabulary_that_the_text_does_not_allow_keeps_what_was_read(
    source, out, size, message, capsys
):
    with pytest.raises(DataError) as error:
        made(source, out, vocab_size=size)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert os.listdir(out.parent) == [".sea.prepare-work"]
    assert f"keeps the {N_TEXTS} documents" in capsys.readouterr().err
    made(source, out)
    assert f"{N_TEXTS} documents are read" in capsys.readouterr().err
    assert os.listdir(out.parent) == ["sea"]


def test_the_largest_vocabulary_named_in_the_error_works(source, out):
    with pytest.raises(DataError) as error:
        made(source, out, vocab_size=9000)
    largest = int(str(error.value).split("at most ")[1].split()[0])
    assert made(source, out, vocab_size=largest)["tokenizer"]["pieces"] == largest


def test_at_most_so_many_are_held_out(source, out):
    manifest = made(source, out, val_share=0.5, val_documents=3)
    assert manifest["counts"]["validation"]["documents"] == 3


def test_the_tokenizer_learns_from_the_first_documents_only(tmp_path):
    words = "alpha beta gamma delta".split()
    documents = [f"{words[i % 4]} " * 40_000 + str(i) for i in range(12)]  # 200 to 240 kB each
    made(write_jsonl(tmp_path / "t.jsonl", documents), tmp_path / "a", vocab_size=272)
    made(tmp_path / "t.jsonl", tmp_path / "b", vocab_size=272, tokenizer_mb=1)
    train = read_jsonl(tmp_path / "b" / "t" / "t.chunk.00.jsonl")
    all_text, first_text = ((tmp_path / name / "tokenizer.model").read_bytes() for name in "ab")
    assert all_text == train_tokenizer(train, 272)
    assert first_text == train_tokenizer(list(first_bytes(train, 1_000_000)), 272)
    assert len(list(first_bytes(train, 1_000_000))) == 5
    assert first_text != all_text


def test_problems_are_reported_with_file_and_line(source, out, capsys):
    with open(source, "a", encoding="utf-8") as file:
        file.write('{"text": "cut off\n')
    manifest = made(source, out, vocab_size=0)
    assert manifest["counts"]["problems"] == {"malformed lines skipped": 1}
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: malformed lines skipped: 1 ({source}:{N_TEXTS + 1}: ")


def test_help_names_every_flag_with_its_default(capsys):
    assert run(["--help"]) == 0
    printed = capsys.readouterr().out
    for flag in ("source (required)", "out (required)", "chunks (default: 1)"):
        assert f"--{flag}" in printed
    for flag in ("val_share (default: 0.05)", "vocab_size (default: 32000)", "seed (default: 42)"):
        assert f"--{flag}" in printed
    for flag in ("val_documents (default: 10000)", "memory_mb (default: 512)"):
        assert f"--{flag}" in printed
    for flag in ("name (default: none)", "overwrite (default: false)", "text_key (default: text,"):
        assert f"--{flag}" in printed
    assert "python-docs" in printed
    assert "hf:HuggingFaceFW/fineweb-edu:sample-10BT" in printed
    assert "20,000 characters" in " ".join(printed.split())
    assert "Raises" not in printed


def test_without_arguments_one_line_says_how_to_get_help():
    ended = subprocess.run(
        [sys.executable, "-m", "apps.topk.prepare"], cwd=ROOT, capture_output=True, text=True
    )
    assert ended.returncode == 2
    assert ended.stdout == ""
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: ")
    assert "python -m apps.topk.prepare --help" in line


def test_a_mistake_on_the_command_line_is_one_line_and_status_2(source, out, capsys):
    command = ["--source", str(source), "--out", str(out), "--vocab_sise", "300"]
    assert run(command) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "error: --vocab_sise is no known flag: did you mean vocab_size?\n"
    assert not out.exists()


def test_python_docs_by_its_name(tmp_path, monkeypatch):
    library = tmp_path / "library"
    library.mkdir()
    for number, text in enumerate(texts()):
        sentence = f"This is what you should know about the number {number}. " * 8
        (library / f"m{number}.py").write_text(f'"""{sentence}\n\n{text}"""\n')
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(library))
    monkeypatch.setattr("sys.base_prefix", str(tmp_path))
    manifest = prepare(source="python-docs", out=str(tmp_path / "out"), vocab_size=0)
    assert manifest["inputs"]["name"] == "python-docs"
    assert manifest["counts"]["train"]["documents"] == N_TEXTS - 2
