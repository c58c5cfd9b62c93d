"""The table of apps/bench/README.md, made from the CSV files in apps/bench/results."""

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from apps.bench.rows import RESULTS, read
from apps.bench.startup import BASE, applications
from apps.bench.training_variants import VARIANTS
from apps.topk import cli
from apps.topk.corpus import flags
from apps.topk.provenance import write_text
from lingua_topk.errors import DataError

PROGRAM = "apps.bench.table"
README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
NOT_MEASURED, NONE = "not measured", "none"
HEAD = ("what", "on", "floor", "ours", "peers", "ratio", "target")

Row = dict[str, str]


@dataclass(frozen=True)
class Line:
    """A line of the table.

    Attributes:
        file: the CSV that it is read from.
        where: what the fields of its rows must be; of several measurements the newest counts.
        ours: `what` of the row for that cell; the first that is there.
        value: a row's cell.
        floor: the cell of the floor, of our row and all rows by `what`.
        ratio: the field of ours that is shown with its percentiles, where it has them.
        target: what is wanted of it; "" where nothing was set.
        no_peers: `what` of the rows that are no peers; ours are none in any case.
    """

    title: str
    file: str
    where: dict[str, str]
    ours: tuple[str, ...]
    value: Callable[[Row], str]
    floor: Callable[[Row, dict[str, Row]], str]
    ratio: str
    target: str
    no_peers: tuple[str, ...] = ()


def _microseconds(row: Row) -> str:
    return f"{float(row['microseconds']):,.1f} us"


def _times_as_fast(row: Row) -> str:
    return f"{row['ratio']}x"


def _copy(ours: Row, rows: dict[str, Row]) -> str:
    """How long a copy of the same bytes takes, and ours in shares of its speed."""
    if not ours.get("of_copy"):
        return NONE
    share = float(ours["of_copy"])
    return f"{share * float(ours['microseconds']):,.1f} us ({share:.0%} reached)"


def _row_of(what: str, value: Callable[[Row], str]) -> Callable[[Row, dict[str, Row]], str]:
    """The floor that is a row itself."""
    return lambda _, rows: value(rows[what]) if what in rows else NOT_MEASURED


def _ceiling(ours: Row, _: dict[str, Row]) -> str:
    """What the bytes of the weights allow, and the part of that saving that was reached."""
    saving = f" ({float(ours['saving']):.0%} reached)" if ours.get("saving") else ""
    return f"{ours['ceiling']}x{saving}"


def _tokens(row: Row) -> str:
    mfu = f", MFU {100 * float(row['mfu']):.1f}%" if row.get("mfu") else ""
    return f"{int(row['tokens_a_second']):,} tokens/s, {row['peak_gib']} GiB{mfu}"


def _time_ratio(row: Row) -> str:
    return row["time_ratio"]


def _seconds_over_torch(row: Row) -> str:
    if row["what"] == BASE:
        return f"{row['seconds']} s"
    return f"{float(row['over_torch']):+.2f} s"


def _operator_lines() -> Iterable[Line]:
    cases = [("cpu", "fp32", 2048, 1024), ("cuda", "bf16", 65536, 1024),
             ("cuda", "bf16", 65536, 2048)]  # fmt: skip
    for (device, dtype, rows, width), direction, alpha in product(
        cases, ("forward", "backward", "forward+backward"), ("0.0", "0.5")
    ):
        on_gpu, form = device == "cuda", "hard" if alpha == "0.0" else "annealed"
        with_target = direction == "forward" and form == "hard"
        yield Line(
            title=f"operator, {device}: {rows:,} x {width}, {dtype}, {form}, {direction}",
            file="operator.csv",
            where={"device": device, "dtype": dtype, "rows": str(rows), "width": str(width),
                   "alpha": alpha, "direction": direction},
            ours=("triton",) if on_gpu else ("cpu",),
            value=_microseconds if on_gpu else _times_as_fast,
            floor=_copy,
            ratio="ratio",
            target=f"at least {15 if on_gpu else 3}" if with_target else "",
            no_peers=("plain",),
        )  # fmt: skip


def _training_lines() -> Iterable[Line]:
    cases = [("cpu", "1024", "4"), ("cuda", "1024", "8"), ("cuda", "2048", "24")]
    for (device, dim, layers), ours in product(cases, ("topk", "annealed")):
        value = _tokens if device == "cuda" else _time_ratio
        form = "hard" if ours == "topk" else "annealed"
        yield Line(
            title=f"training step, {device}: D = {dim}, L = {layers}, {form}",
            file="training.csv",
            where={"device": device, "dim": dim, "layers": layers},
            ours=(ours,),
            value=value,
            floor=_row_of("vanilla", value),
            ratio="time_ratio",
            target="at most 1.01" if form == "hard" else "",
            no_peers=(*VARIANTS, "lingua topk"),
        )


def _decoding_lines() -> Iterable[Line]:
    cases = [("cpu", "2048", "24"), ("cuda", "2048", "24"), ("cuda", "1024", "8")]
    for device, dim, layers in cases:
        yield Line(
            title=f"decoding, {device}: D = {dim}, L = {layers}, batch 1",
            file="decoding.csv",
            where={"device": device, "dim": dim, "layers": layers, "batch": "1",
                   "vocab": "32000", "site": "residual"},
            ours=("sparse",),
            value=_times_as_fast if device == "cpu" else _microseconds,
            floor=_ceiling,
            ratio="ratio",
            target="at least 1.15" if device == "cpu" else "60% of the saving",
        )  # fmt: skip


def _startup_lines() -> Iterable[Line]:
    helps = [f"{name} --help" for name in applications()]
    for what in ("import lingua_topk", *helps):
        yield Line(
            title=f"startup: {what}",
            file="startup.csv",
            where={},
            ours=(what,),
            value=_seconds_over_torch,
            floor=_row_of(BASE, _seconds_over_torch),
            ratio="over_torch",
            target="at most 1" if what in helps else "at most 0.3",
            no_peers=(BASE, "import lingua_topk", *helps),
        )


def lines() -> list[Line]:
    """The lines of the table, whether they were measured or not."""
    return [*_operator_lines(), *_training_lines(), *_decoding_lines(), *_startup_lines()]


def main(argv: Sequence[str] | None = None) -> None:
    flags.call(write, PROGRAM, sys.argv[1:] if argv is None else argv, "")


def write() -> None:
    """Write the table into apps/bench/README.md, between its two markers."""
    text = README.read_text(encoding="utf-8")
    write_text(README, with_table(text, table(RESULTS)))
    print(f"{README}: the table is that of {RESULTS}")


def with_table(text: str, made: str) -> str:
    """`text` with `made` between the markers. DataError where they are not there once each."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise DataError(f"the table has no place: write {BEGIN} and {END} once, each on a line")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return f"{before}{BEGIN}\n{made}{END}{after}"


def table(results: Path) -> str:
    """The table as Markdown, from the CSV files in `results`."""
    cells = [HEAD, ("---",) * len(HEAD), *(_cells(line, results) for line in lines())]
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)


def _cells(line: Line, results: Path) -> tuple[str, ...]:
    rows = {row["what"]: row for row in _newest(read(results / line.file), line)}
    ours = next((rows[name] for name in line.ours if name in rows), None)
    if ours is None:
        return (line.title, *[NOT_MEASURED] * 5, line.target)
    no_peers = {*line.ours, *line.no_peers}
    peers = [f"{name}: {line.value(row)}" for name, row in rows.items() if name not in no_peers]
    on = f"{ours['machine']}, {ours['threads']} threads, {ours['date'][:10]}"
    return (
        line.title, on, line.floor(ours, rows), line.value(ours), "; ".join(peers) or NONE,
        _with_percentiles(ours, line.ratio), line.target,
    )  # fmt: skip


def _newest(rows: list[Row], line: Line) -> list[Row]:
    """The rows of the newest measurement with what the line is about; one has one date."""
    fitting = [row for row in rows if all(row.get(n) == value for n, value in line.where.items())]
    newest = max((row["date"] for row in fitting if row["what"] in line.ours), default=None)
    return [row for row in fitting if row["date"] == newest]


def _with_percentiles(row: Row, field: str) -> str:
    tenth, ninetieth = row.get(f"{field}_p10"), row.get(f"{field}_p90")
    return f"{row[field]} ({tenth} to {ninetieth})" if tenth and ninetieth else row[field]


if __name__ == "__main__":
    cli.run(main)
