"""Documents from one .parquet file, read in small batches of its text columns only."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from apps.topk.corpus.mending import decode
from apps.topk.corpus.tally import Tally
from apps.topk.corpus.text_files import EMPTY, NO_TEXT
from lingua_topk.errors import DataError

_BATCH = 64  # rows
_BUFFER = 1 << 20  # bytes read ahead of a column


class ParquetFile:
    """The documents of one file, from its first row or from a `position` given before.

    Members as those of TextFile; `read` counts rows.
    """

    unit = "rows"

    def __init__(self, file: Path, text_keys: list[str], tally: Tally, position: Any = None):
        self.file, self.text_keys, self.tally = file, text_keys, tally
        self.done = 0
        self.read = (position or {}).get("row", 0)

    @property
    def position(self) -> dict[str, int]:
        return {"row": self.read}

    def documents(self) -> Iterator[str]:
        """Every document that is left; DataError for a damaged file and for one whose columns
        hold no text."""
        import pyarrow
        import pyarrow.parquet

        try:
            with open(self.file, "rb") as raw:
                size = raw.seek(0, 2)
                if not size:
                    return
                # Neither ahead of the batch nor in threads: a row group can be large.
                table = pyarrow.parquet.ParquetFile(raw, buffer_size=_BUFFER, pre_buffer=False)
                columns = text_columns(table.schema_arrow, self.text_keys, str(self.file))
                rows = table.metadata.num_rows
                for texts in _rows(table, columns, self.read):
                    self.read += 1
                    # The columns of a row lie apart in the file: its share of the rows.
                    self.done = size * self.read // rows
                    text = self._text(texts)
                    if text is not None:
                        yield text
        except pyarrow.ArrowException as error:
            raise DataError(self._damaged(error)) from None
        except OSError as error:
            if error.errno is None:  # from a decompressor
                raise DataError(self._damaged(error)) from None
            raise DataError(f"{self.file} cannot be read: {error.strerror or error}") from None

    def _text(self, texts: list[bytes | None]) -> str | None:
        place = f"{self.file}: row {self.read}"
        content = next((text for text in texts if text is not None), None)
        if content is None:
            self.tally.add(NO_TEXT, f"{place}: null")
            return None
        text = decode(content, place, self.tally)
        if not text.strip():
            self.tally.add(EMPTY, place)
            return None
        return text

    def _damaged(self, error: Exception) -> str:
        return (
            f"{self.file} is damaged or truncated, or no parquet, after row {self.read:,}"
            f" ({error}): get a whole copy"
        )


def text_columns(schema: Any, text_keys: list[str], where: str) -> list[str]:
    """Those of `text_keys` that are columns of text, in their order; DataError for none."""
    import pyarrow

    present = [key for key in text_keys if key in schema.names]
    if not present:
        known = ", ".join(schema.names[:10]) or "none"
        raise DataError(
            f"{where} has no column {' or '.join(text_keys)}: its columns are {known}; set"
            " --text_key"
        )
    kinds = {key: schema.field(key).type for key in present}
    text = [
        key
        for key, kind in kinds.items()
        if pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)
    ]
    if not text:
        key, kind = next(iter(kinds.items()))
        raise DataError(
            f"{where}: column {key} holds {kind}, not text: set --text_key to a column of strings"
        )
    return text


def _rows(table: Any, columns: list[str], start: int) -> Iterator[list[bytes | None]]:
    """The values of `columns`, row by row from row `start`, as the bytes they are stored as."""
    import pyarrow

    groups = table.metadata.num_row_groups
    for group in range(groups):
        rows = table.metadata.row_group(group).num_rows
        if start >= rows:
            start -= rows
            continue
        batches = table.iter_batches(_BATCH, row_groups=[group], columns=columns, use_threads=False)
        for batch in batches:
            if start >= batch.num_rows:
                start -= batch.num_rows
                continue
            # As bytes: a string that is no UTF-8 could not be converted.
            parts = [
                batch.column(name).cast(pyarrow.large_binary()).to_pylist()[start:]
                for name in columns
            ]
            start = 0
            yield from map(list, zip(*parts, strict=True))
