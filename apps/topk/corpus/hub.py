"""Documents of a Hugging Face dataset, streamed: nothing is downloaded beyond what is read.

No code of a dataset is ever run: what needs its own loading script is refused.
"""

import difflib
import gc
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apps.topk.corpus.local_files import describe, files_below
from apps.topk.corpus.mending import without_surrogates
from apps.topk.corpus.parquet_files import text_columns
from apps.topk.corpus.tally import Tally
from apps.topk.corpus.text_files import EMPTY, NO_TEXT, first_text
from apps.topk.corpus.work import Paused
from lingua_topk.errors import ConfigError, DataError

PREFIX = "hf:"
SYNTAX = "hf:OWNER/NAME[@REVISION][:CONFIG[:SPLIT]]"
ROWS = 256  # read at a time
READ_AHEAD = 8 << 20  # bytes of a column, asked for at once
COLLECT_EVERY = 100_000  # rows
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Name:
    """What a source name of the form SYNTAX says; a folder may stand for OWNER/NAME."""

    dataset: str
    revision: str | None = None
    config: str | None = None
    split: str = "train"

    @property
    def folder(self) -> Path | None:
        path = Path(self.dataset).expanduser()
        return path.resolve() if self.dataset and path.is_dir() else None


def parse(label: str) -> Name:
    """The parts of a name such as hf:HuggingFaceFW/fineweb-edu:sample-10BT; ConfigError."""
    parts = label.removeprefix(PREFIX).split(":")
    dataset, config, split = (*parts, "", "")[:3]
    dataset, at, revision = dataset.partition("@")
    known = Name(dataset).folder or _REPOSITORY.fullmatch(dataset)
    if len(parts) > 3 or not known or (at and not revision):
        raise ConfigError(
            f"source={label!r} is not of the form {SYNTAX}: write for example"
            " hf:HuggingFaceFW/fineweb-edu:sample-10BT"
        )
    return Name(dataset, revision or None, config or None, split or "train")


class HubDataset:
    """One split of one configuration of a dataset, row by row."""

    unit = " rows"

    def __init__(self, label: str, text_keys: list[str]):
        self.label = label
        self.text_keys = text_keys
        self.name = parse(label)
        self.size = 0  # rows, where the dataset says how many
        self.done = 0
        self._commit: str | None = None
        self._dataset: Any = None
        self._fingerprint: str | None = None
        self._found = 0

    def fingerprint(self) -> dict[str, Any]:
        """What was asked for; of a folder also the state of its files.

        The hub is not asked: what is finished can be recognised without a network.
        """
        name = self.name
        return {
            "hf": str(name.folder or name.dataset),
            "revision": name.revision,
            "config": name.config,
            "split": name.split,
            **({"files": describe(name.folder, files_below(name.folder))} if name.folder else {}),
        }

    def origin(self) -> dict[str, Any]:
        """What was read: the commit as well, where it is known."""
        asked = {key: value for key, value in self.fingerprint().items() if key != "files"}
        return {**asked, "commit": self._commit, "fingerprint": self._fingerprint}

    def open(self, commit: str | None = None) -> None:
        """Find the dataset, at `commit` where one is given, and its text columns.

        ConfigError for no such dataset, revision, configuration or split; DataError for one
        without text columns; Paused where the hub cannot be reached.
        """
        builder = self._builder(commit or self.name.revision)
        _read_parquet_in_pieces(builder.config)
        try:
            dataset = builder.as_streaming_dataset(split=self.name.split)
        except Exception as error:
            raise self._explained(error) from None
        self._commit = commit or _commit_of(builder)
        self._fingerprint = getattr(dataset, "_fingerprint", None) or builder.hash
        splits = getattr(builder.info, "splits", None) or {}
        self.size = getattr(splits.get(self.name.split), "num_examples", None) or 0
        self._dataset = self._of_text(dataset)

    def cursor(self) -> dict[str, Any]:
        state = getattr(self._dataset, "state_dict", None)
        return {
            "commit": self._commit,
            "rows": self.done,
            "found": self._found,
            "state": state() if state else None,
        }

    def documents(self, tally: Tally, start: dict[str, Any] | None = None) -> Iterator[str]:
        """Every document, or those after the cursor `start`, of the commit it was made at.

        DataError for rows that cannot be read; Paused where the network fails.
        """
        start = start or {}
        if start.get("commit") not in (None, self._commit):
            self.open(start["commit"])
        self.done, self._found = start.get("rows", 0), start.get("found", 0)
        for row in self._rows(start.get("state")):
            place = f"{self.label}: row {self.done}"
            text = first_text(row, self.text_keys)
            if text is None:
                tally.add(NO_TEXT, f"{place}: its columns are {', '.join(list(row)[:5])}")
            elif not text.strip():
                tally.add(EMPTY, place)
            else:
                self._found += 1
                yield without_surrogates(text, place, tally)
        if not self._found:
            raise DataError(
                f"source={self.label!r}: none of its {self.done:,} rows gives a document: set"
                f" --text_key (it is {','.join(self.text_keys)})"
            )

    def _rows(self, state: Any) -> Iterator[dict[str, Any]]:
        dataset = self._dataset
        if state is not None:
            dataset.load_state_dict(state)
        elif self.done:  # datasets before 2.20 have no state: all rows are read once more
            dataset = dataset.skip(self.done)
        rows = iter(dataset)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:
                raise self._explained(error) from None
            self.done += 1
            if self.done % COLLECT_EVERY == 0:
                gc.collect()  # files that were read hold on to one another
            yield row

    def _builder(self, revision: str | None) -> Any:
        import datasets

        load, options = datasets.load_dataset_builder, {}
        if "trust_remote_code" in inspect.signature(load).parameters:  # datasets before 4
            options["trust_remote_code"] = False
        name = self.name
        path = str(name.folder or name.dataset)
        try:
            return load(path, name.config, revision=revision, **options)
        except Exception as error:
            raise self._explained(error) from None

    def _of_text(self, dataset: Any) -> Any:
        """`dataset` with its text columns only, where it says which columns it has."""
        if not getattr(dataset, "features", None):
            return dataset
        schema = dataset.features.arrow_schema
        return dataset.select_columns(
            text_columns(schema, self.text_keys, f"source={self.label!r}")
        )

    def _explained(self, error: Exception) -> Exception:
        """What datasets raised, as an error that says what to do."""
        import datasets

        text, name = str(error), self.name
        if isinstance(error, (ConfigError, DataError)):
            return error
        if "BuilderConfig" in text or "Config name is missing" in text:
            return ConfigError(self._choose("config", name.config, text))
        if text.startswith(("Bad split", "Unknown split")):
            return ConfigError(self._choose("split", name.split, text))
        if "gated" in text:
            return ConfigError(
                f"source={self.label!r} is a gated dataset: ask for access on its page, then log"
                " in with `hf auth login` or set HF_TOKEN"
            )
        if "script" in text or "trust_remote_code" in text:
            return ConfigError(
                f"source={self.label!r} needs code of its own to be loaded, which is never run:"
                " choose a dataset of plain files, or a revision such as @refs/convert/parquet"
            )
        missing = getattr(datasets.exceptions, "DatasetNotFoundError", ())
        if isinstance(error, missing) or text.startswith("Revision"):
            return ConfigError(
                f"source={self.label!r}: {_first_line(text)} Correct the name or revision; a"
                " private dataset needs `hf auth login` or HF_TOKEN"
            )
        if _is_network(error):
            return Paused(
                f"source={self.label!r} cannot be read from the network after {self.done:,} rows"
                f" ({type(error).__name__}: {_first_line(text)}): see to the connection, then run"
                " the same command again"
            )
        return DataError(
            f"source={self.label!r} cannot be read after {self.done:,} rows"
            f" ({type(error).__name__}: {_first_line(text)}): correct the dataset or choose another"
        )

    def _choose(self, what: str, given: str | None, text: str) -> str:
        """That there is no such config or split, and the names nearest to it."""
        names = re.findall(r"'([^']+)'", text.partition("vailable")[2])
        near = names[:10]
        if len(names) > len(near):
            near = difflib.get_close_matches(given or "", names, n=5, cutoff=0.3) or near
        more = f" and {len(names) - len(near)} more" if len(names) > len(near) else ""
        missing = f"has no {what} {given!r}" if given else f"needs a {what}"
        return f"source={self.label!r} {missing}: choose from {', '.join(near)}{more}, as {SYNTAX}"


def _read_parquet_in_pieces(config: Any) -> None:
    """Keep pyarrow from holding all of a file that it has read, which is the library's default.

    Where the files are no parquet, or datasets is older than 4.2, nothing is changed.
    """
    if not hasattr(config, "fragment_scan_options"):
        return
    import pyarrow.dataset

    config.batch_size = ROWS
    config.fragment_scan_options = pyarrow.dataset.ParquetFragmentScanOptions(
        use_buffered_stream=True, buffer_size=READ_AHEAD, pre_buffer=False
    )


def _commit_of(builder: Any) -> str | None:
    found = str(getattr(builder, "hash", "") or "")
    return found if _COMMIT.fullmatch(found) else None


def _is_network(error: BaseException | None) -> bool:
    """Whether a connection failed here or below; the libraries have no common base for it."""
    while error is not None:
        names = {cls.__name__ for cls in type(error).__mro__}
        modules = {cls.__module__.partition(".")[0] for cls in type(error).__mro__}
        if names & {"ConnectionError", "TimeoutError", "OfflineModeIsEnabled", "HfHubHTTPError"}:
            return True
        if modules & {"requests", "httpx", "httpx2", "aiohttp", "urllib3", "socket", "ssl"}:
            return True
        error = error.__cause__ or error.__context__
    return False


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0][:200]
