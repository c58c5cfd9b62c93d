"""Data sets of the Hugging Face hub: a local copy is streamed; the hub itself is a stand-in."""

import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from apps.topk.corpus import work
from apps.topk.corpus.hub import HubDataset, Name, parse
from apps.topk.corpus.tally import Tally
from apps.topk.corpus.work import Paused
from apps.topk.prepare import prepare
from lingua_topk.errors import ConfigError, DataError

KEYS = ["text", "content"]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CARD = """---
configs:
- config_name: default
  data_files:
  - {split: train, path: data/train-*.parquet}
  - {split: test, path: data/test-*.parquet}
- config_name: sample-10BT
  data_files: [{split: test, path: data/test-*.parquet}]
---
"""


def texts(split: str = "train") -> list[str]:
    return [f"{split} row {number} — naïve" for number in range(300 if split == "train" else 20)]


@pytest.fixture
def copy(tmp_path):
    """A data set as the hub has them: three files of its train split, one of test."""
    folder = tmp_path / "hub" / "pond"
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    for shard in range(3):
        part = texts()[shard * 100 : (shard + 1) * 100]
        table = pyarrow.table({"id": list(range(100)), "text": part, "score": [0.5] * 100})
        path = folder / "data" / f"train-{shard}.parquet"
        pyarrow.parquet.write_table(table, path, row_group_size=30)
    table = pyarrow.table({"id": [1] * 20, "text": texts("test"), "score": [0.5] * 20})
    pyarrow.parquet.write_table(table, folder / "data" / "test-0.parquet")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def opened(label, keys=KEYS) -> HubDataset:
    source = HubDataset(str(label), keys)
    source.open()
    return source


def read(label, keys=KEYS):
    tally = Tally()
    return list(opened(label, keys).documents(tally)), tally


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("hf:a/b", Name("a/b")),
        ("hf:squad", Name("squad")),
        (
            "hf:HuggingFaceFW/fineweb-edu:sample-10BT",
            Name("HuggingFaceFW/fineweb-edu", None, "sample-10BT"),
        ),
        (
            "hf:wiki.media/w-p_1:20231101.en:test",
            Name("wiki.media/w-p_1", None, "20231101.en", "test"),
        ),
        ("hf:a/b@v1.0::test", Name("a/b", "v1.0", None, "test")),
        ("hf:a/b@refs/convert/parquet", Name("a/b", "refs/convert/parquet")),
    ],
)
def test_names(label, expected):
    assert parse(label) == expected


@pytest.mark.parametrize(
    "label", ["hf:", "hf:a/b/c", "hf:a/b:c:d:e", "hf:a/b@", "hf:../x", "hf: a"]
)
def test_names_of_another_form(label):
    with pytest.raises(ConfigError, match=r"is not of the form hf:OWNER/NAME"):
        parse(label)


def test_a_split_is_read_in_order(copy):
    assert read(f"hf:{copy}") == (texts(), Tally())
    assert read(f"hf:{copy}::test") == (texts("test"), Tally())
    assert read(f"hf:{copy}:sample-10BT:test") == (texts("test"), Tally())


def test_a_folder_of_json_lines(tmp_path):
    rows = [{"body": "one"}, {"body": " "}, {"body": None}, {"body": "lone \ud800 half"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    documents, tally = read(f"hf:{tmp_path}", ["body"])
    assert documents == ["one"]
    assert tally.counts == {
        "empty documents skipped": 1,
        "lines without the text key skipped": 1,
    }
    (tmp_path / "a.jsonl").write_text('{"body": "cut off\n')
    with pytest.raises(DataError, match=r"cannot be read after 0 rows"):
        read(f"hf:{tmp_path}", ["body"])


def test_reading_goes_on_after_any_row(copy):
    # Stopped again and again: what a resumed reader says must hold as well.
    documents, cursor = [], None
    while len(documents) < 300:
        source, tally = opened(f"hf:{copy}"), Tally()
        left = source.documents(tally, cursor)
        documents += [next(left) for _ in range(min(7, 300 - len(documents)))]
        cursor = json.loads(json.dumps(source.cursor()))
    assert documents == texts()
    source = opened(f"hf:{copy}")
    assert list(source.documents(Tally(), cursor)) == []


def test_going_on_without_a_state(copy):
    # As datasets before 2.20, which cannot give one.
    cursor = {"commit": None, "rows": 123, "found": 123, "state": None}
    assert list(opened(f"hf:{copy}").documents(Tally(), cursor)) == texts()[123:]


@pytest.mark.parametrize(
    ("name", "keys", "error", "message"),
    [
        (
            ":sample-10B:test",
            KEYS,
            ConfigError,
            "has no config 'sample-10B': choose from default, sample-10BT",
        ),
        ("::validation", KEYS, ConfigError, "has no split 'validation': choose from train, test"),
        ("", ["body"], DataError, "has no column body: its columns are id, text, score"),
        ("", ["id"], DataError, "column id holds int64, not text"),
    ],
)
def test_mistakes(copy, name, keys, error, message):
    with pytest.raises(error) as raised:
        opened(f"hf:{copy}{name}", keys)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("raised", "error", "message"),
    [
        (
            datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub or"),
            ConfigError,
            "Correct the name or revision",
        ),
        (
            datasets.exceptions.DatasetNotFoundError(
                "Dataset 'a/b' is a gated dataset on the Hub."
            ),
            ConfigError,
            "ask for access on its page",
        ),
        (
            RuntimeError("Dataset scripts are no longer supported, but found b.py"),
            ConfigError,
            "needs code of its own to be loaded, which is never run",
        ),
        (
            ValueError(
                "Config name is missing.\nPlease pick one among the available configs: ['x']"
            ),
            ConfigError,
            "needs a config: choose from x",
        ),
        (ConnectionError("Couldn't reach 'a/b'"), Paused, "see to the connection"),
        (RuntimeError("who knows"), DataError, "cannot be read after 0 rows (RuntimeError: who"),
    ],
)
def test_what_the_library_raises_says_what_to_do(monkeypatch, raised, error, message):
    def failing(*args, **options):
        raise raised

    monkeypatch.setattr(datasets, "load_dataset_builder", failing)
    with pytest.raises(error) as ended:
        opened("hf:a/b")
    assert type(ended.value) is error
    assert message in str(ended.value)
    assert "\n" not in str(ended.value)


class Hub:
    """In the library's place: `copy` at COMMIT, with a connection that breaks at `breaks`."""

    def __init__(self, copy, monkeypatch, breaks=()):
        self.copy, self.breaks, self.revisions = copy, list(breaks), []
        self.load = datasets.load_dataset_builder
        monkeypatch.setattr(datasets, "load_dataset_builder", self.builder)

    def builder(self, path, config, revision=None):
        assert path == "a/pond"
        self.revisions.append(revision)
        builder = self.load(str(self.copy), config)
        builder.hash = COMMIT
        stream = builder.as_streaming_dataset

        def breaking(split):
            dataset = stream(split=split)
            select = dataset.select_columns
            dataset.select_columns = lambda names: _Breaking(select(names), self)
            return dataset

        builder.as_streaming_dataset = breaking
        return builder


class _Breaking:
    def __init__(self, dataset, hub):
        self.dataset, self.hub = dataset, hub
        self.state_dict, self.load_state_dict = dataset.state_dict, dataset.load_state_dict

    def __iter__(self):
        for count, row in enumerate(self.dataset):
            if self.hub.breaks and count == self.hub.breaks[0]:
                self.hub.breaks.pop(0)
                raise ConnectionError("reset by peer\nby and by")
            yield row


def test_a_broken_connection_costs_nothing(copy, tmp_path, monkeypatch, capsys):
    Hub(copy, monkeypatch, breaks=[120, 50, 0])
    monkeypatch.setattr(work, "LONGEST_UNSAVED", 0)  # seconds: saved after every document
    monkeypatch.setattr("os.fsync", lambda descriptor: None)  # which takes its time
    wanted = {"source": "hf:a/pond", "vocab_size": 0, "chunks": 2}
    for rows in (120, 170, 170):
        with pytest.raises(Paused, match=rf"after {rows} rows \(ConnectionError: reset by peer\)"):
            prepare(out=str(tmp_path / "out"), **wanted)
        assert f"keeps the {rows} documents that were read" in capsys.readouterr().err
    manifest = prepare(out=str(tmp_path / "out"), **wanted)
    whole = prepare(out=str(tmp_path / "whole"), **wanted)
    assert manifest["files"] == whole["files"]
    assert manifest["counts"]["train"]["documents"] == 285
    assert manifest["inputs"]["name"] == "pond"
    assert manifest["hub"][0]["hf"] == "a/pond"
    assert manifest["hub"][0]["commit"] == COMMIT


def test_going_on_reads_the_commit_that_was_begun(copy, monkeypatch):
    hub = Hub(copy, monkeypatch)
    source = opened("hf:a/pond")
    documents = source.documents(Tally())
    first = [next(documents) for _ in range(5)]
    cursor = {**source.cursor(), "commit": "f" * 40}
    again = opened("hf:a/pond")
    assert first + list(again.documents(Tally(), cursor)) == texts()
    assert hub.revisions == [None, None, "f" * 40]


def test_the_hub_is_not_asked_for_what_is_there(copy, tmp_path, monkeypatch, capsys):
    hub = Hub(copy, monkeypatch)
    wanted = {"source": "hf:a/pond", "vocab_size": 0, "out": str(tmp_path / "out")}
    prepare(**wanted)
    asked = len(hub.revisions)
    prepare(**wanted)
    assert len(hub.revisions) == asked
    assert "already there" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"source hf:a/pond::test \(there: hf:a/pond::train\)"):
        prepare(**{**wanted, "source": "hf:a/pond::test"}, name="pond")


def test_a_copy_that_changed_is_noticed(copy, tmp_path):
    wanted = {"source": f"hf:{copy}", "vocab_size": 0, "out": str(tmp_path / "out")}
    prepare(**wanted)
    (copy / "data" / "train-2.parquet").unlink()
    with pytest.raises(ConfigError, match=r"the files of hf:.*/pond::train, which changed since"):
        prepare(**wanted)


def test_a_copy_and_the_output_may_not_overlap(copy):
    with pytest.raises(ConfigError, match="lie in one another"):
        prepare(source=f"hf:{copy}", out=str(copy / "out"))
