"""The table of apps/bench/README.md: that it is what the CSV files give; and those files."""

import csv

import pytest

from apps.bench import table
from apps.bench.rows import RESULTS, append, read
from lingua_topk.errors import DataError

ORIGIN = {"date": "2026-01-02T03:04:05+00:00", "machine": "A GPU", "threads": 4}


def operator_row(what: str, **values: object) -> dict[str, object]:
    shape = {"device": "cuda", "dtype": "bf16", "rows": 65536, "width": 1024, "alpha": 0.0}
    numbers = {"ratio": 1.0, "ratio_p10": 0.9, "ratio_p90": 1.1, "microseconds": 1500.0,
               "of_copy": 0.05}  # fmt: skip
    return {**ORIGIN, **shape, "direction": "forward", "what": what, **numbers, **values}


def training_row(what: str, **values: object) -> dict[str, object]:
    shape = {"device": "cpu", "dim": 1024, "layers": 4}
    numbers = {"time_ratio": 1.0, "time_ratio_p10": 1.0, "time_ratio_p90": 1.0}
    return {**ORIGIN, **shape, "what": what, **numbers, **values}


def cells(results, start: str) -> list[str]:
    (line,) = [row for row in table.table(results).splitlines() if row.startswith(f"| {start} |")]
    return line.strip("| ").split(" | ")[1:]


def test_the_readme_has_the_table_of_the_results():
    text = table.README.read_text(encoding="utf-8")
    made = table.with_table(text, table.table(RESULTS))
    assert text == made, "run python -m apps.bench.table"


def test_without_measurements_nothing_is_claimed(tmp_path):
    lines = table.table(tmp_path).splitlines()[2:]
    assert len(lines) == len(table.lines()) > 20
    assert all(line.count("| not measured ") == 5 for line in lines)


def test_a_line_of_the_operator(tmp_path):
    for row in (
        operator_row("topk + mask"),
        operator_row("plain", microseconds=1600.0),
        operator_row("triton", ratio=12.5, ratio_p10=12.1, ratio_p90=12.8, microseconds=120.0,
                     of_copy=0.8),
        operator_row("quack", microseconds=300.0),
    ):  # fmt: skip
        append(tmp_path / "operator.csv", row)
    assert cells(tmp_path, "operator, cuda: 65,536 x 1024, bf16, hard, forward") == [
        "A GPU, 4 threads, 2026-01-02", "96.0 us (80% reached)", "120.0 us",
        "topk + mask: 1,500.0 us; quack: 300.0 us", "12.5 (12.1 to 12.8)", "at least 15",
    ]  # fmt: skip
    other = cells(tmp_path, "operator, cuda: 65,536 x 1024, bf16, annealed, forward")
    assert other[0] == "not measured"


def test_a_line_of_training_is_that_of_the_newest_measurement(tmp_path):
    for date, ratio in (("2026-03-01", 1.05), ("2026-02-01", 1.5)):
        append(tmp_path / "training.csv", training_row("vanilla", date=date))
        row = training_row("topk", date=date, time_ratio=ratio, time_ratio_p90=1.1)
        append(tmp_path / "training.csv", row)
        append(tmp_path / "training.csv", training_row("llama", date=date, time_ratio=0.9))
    append(tmp_path / "training.csv", training_row("vanilla", date="2026-04-01"))  # alone
    assert cells(tmp_path, "training step, cpu: D = 1024, L = 4, hard") == [
        "A GPU, 4 threads, 2026-03-01", "1.0", "1.05", "llama: 0.9", "1.05 (1.0 to 1.1)",
        "at most 1.01",
    ]  # fmt: skip


def test_a_line_of_decoding(tmp_path):
    shape = {"device": "cuda", "dim": 2048, "layers": 24, "batch": 1, "vocab": 32000,
             "site": "residual"}  # fmt: skip
    for what, ratio, saving, time in (
        ("dense", 1.0, None, 900.0), ("sparse", 1.2, 0.8, 750.0), ("transformers", 0.2, None, 4500)
    ):  # fmt: skip
        numbers = {"ratio": ratio, "ceiling": 1.26, "saving": saving, "microseconds": time}
        append(tmp_path / "decoding.csv", {**ORIGIN, **shape, "what": what, **numbers})
    assert cells(tmp_path, "decoding, cuda: D = 2048, L = 24, batch 1") == [
        "A GPU, 4 threads, 2026-01-02", "1.26x (80% reached)", "750.0 us",
        "dense: 900.0 us; transformers: 4,500.0 us", "1.2", "60% of the saving",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text", ["no marker", table.BEGIN, f"{table.END}\n{table.BEGIN}", f"{table.BEGIN}\n" * 2]
)
def test_a_readme_without_a_place_for_it(text):
    with pytest.raises(DataError, match="the table has no place: write <!-- table: begin -->"):
        table.with_table(text, "")


def test_only_what_is_between_the_markers_is_replaced():
    text = f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n"
    made = table.with_table(text, "| new |\n")
    assert made == f"before\n{table.BEGIN}\n| new |\n{table.END}\nafter\n"
    assert table.with_table(made, "| new |\n") == made


@pytest.mark.parametrize("row", [{"a": 1}, {"a": 1, "b": 2, "c": 3}, {"b": 2, "a": 1}])
def test_a_row_with_other_columns_is_refused(tmp_path, row):
    path = tmp_path / "some.csv"
    append(path, {"a": 1, "b": 2})
    before = path.read_text(encoding="utf-8")
    with pytest.raises(DataError, match=r"some\.csv has other columns than this row") as caught:
        append(path, row)
    assert "\n" not in str(caught.value)
    assert path.read_text(encoding="utf-8") == before


def test_columns_are_the_fields_of_the_first_row_in_their_order(tmp_path):
    path = tmp_path / "new" / "some.csv"
    append(path, {"b": 1, "a": None})
    append(path, {"b": 2, "a": "x, y"})
    assert read(path) == [{"b": "1", "a": ""}, {"b": "2", "a": "x, y"}]
    with open(path, encoding="utf-8", newline="") as file:
        assert next(csv.reader(file)) == ["b", "a"]
    assert read(tmp_path / "none.csv") == []
