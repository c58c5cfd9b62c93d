"""The command line of compare: what it shows, what it writes, what it answers a mistake with."""

import csv
import io
import json
import os

import pytest
from markdown_it import MarkdownIt
from rich.console import Console

from apps.topk import cli, compare
from apps.topk.comparison import compare as compared
from tests.apps.compared_runs import (
    TOPK,
    mean_task,
    write_harness,
    write_json,
    write_validation,
)

NLL, TWIN_NLL, TOKENS, SIZES = [44.0, 90.0, 66.0], [40.0, 80.0, 60.0], [10, 20, 20], [40, 80, 99]
HOSTILE = "=1+1|`a`<b>\n# [red]x[/red] *c* _d_ \x1b[31m\ud800"

# As one printable line.
SHOWN = "=1+1|`a`<b> # [red]x[/red] *c* _d_ [31m"


@pytest.fixture
def folders(tmp_path):
    return [
        str(write_validation(tmp_path / "sparse", NLL, TOKENS, SIZES, topk=TOPK, name="sparse")),
        str(write_validation(tmp_path / "plain", TWIN_NLL, TOKENS, SIZES, name="plain")),
    ]


def run(*argv) -> None:
    cli.run(lambda: compare.main([str(one) for one in argv]))


def mistake(capsys, *argv) -> str:
    """The one line that a call ends with."""
    with pytest.raises(SystemExit) as ended:
        run(*argv)
    said = capsys.readouterr()
    assert ended.value.code == 2 and said.out == ""
    assert said.err.startswith("error: ") and said.err.count("\n") == 1
    return said.err


def test_it_prints_a_table_and_writes_both_files(folders, tmp_path, capsys):
    out = tmp_path / "new" / "table.md"
    run(*folders, "--out", out)
    shown = capsys.readouterr().out
    assert "+49.2" in shown and "differences to plain" in shown
    text = out.read_text(encoding="utf-8")
    assert "| sparse | 64 | 8 | 16 | 2 | 4.21 M | 1.02 M |" in text
    assert "| plain | 64 | 8 | all | all | 4.21 M | 1.02 M |" in text
    assert "commit c0ffee" in text and "checkpoints/0000000100 (step 100)" in text
    assert len(list(csv.DictReader(io.StringIO((out.with_suffix(".csv")).read_text())))) == 5
    assert sorted(os.listdir(out.parent)) == ["table.csv", "table.md"]
    run(*reversed(folders), "--out", out)  # its own files are replaced
    assert out.read_text(encoding="utf-8") != text


def test_it_prints_the_csv_alone(folders, capsys):
    run("--csv", *folders)
    found = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert {row["run"] for row in found} == {"sparse", "plain"}


@pytest.mark.parametrize("width", [80, 60, 200])
def test_the_table_fits_the_terminal(folders, width):
    names = {f"run number {i}": folders[i % 2] for i in range(7)}
    console = Console(width=width, record=True, file=io.StringIO())
    tables = compared(names).tables(width)
    for table in tables:
        console.print(table)
    shown = console.export_text()
    assert max(map(len, shown.splitlines())) <= width
    assert "\u2026" not in shown  # nothing is cut off
    assert (len(tables) == 1) == (width == 200)


def test_names_are_data(tmp_path, capsys):
    task = {HOSTILE: mean_task([1, 0])}
    folder = write_harness(tmp_path / "x", task, name=HOSTILE, topk=TOPK)
    out = tmp_path / "t.md"
    run(folder, "--out", out)
    shown = capsys.readouterr().out
    # Folded, it stands on several lines of the table.
    assert "[red]" in shown and "\x1b[31m" not in shown

    text = out.read_text(encoding="utf-8")
    page = MarkdownIt("commonmark").enable("table").parse(text)
    cells = [one.children for one in page if one.type == "inline"][:16]
    # Two rows of eight cells, and the name in the second is text and nothing else.
    assert {one.type for one in cells[8]} <= {"text", "text_special"}
    assert "".join(one.content for one in cells[8]) == SHOWN
    assert "".join(one.content for one in cells[7]) == f"{SHOWN} acc % \u2191"
    assert sum(one.type == "tr_open" for one in page) == 2
    assert not any(one.type in ("heading_open", "html_block") for one in page[1:])

    (row,) = csv.DictReader(io.StringIO(out.with_suffix(".csv").read_text(encoding="utf-8")))
    assert row["run"].startswith("'=1+1|`a`") and row["task"].startswith("'=1+1")
    assert "\n" not in row["run"]


def test_runs_of_one_name_get_their_folder(tmp_path, capsys):
    paths = [write_validation(tmp_path / x, NLL, TOKENS, SIZES, name="same") for x in "ab"]
    run(*paths, "--csv")
    found = {row["run"] for row in csv.DictReader(io.StringIO(capsys.readouterr().out))}
    assert found == {f"same ({path})" for path in paths}
    assert "is given twice: give it once" in mistake(capsys, paths[0], paths[0])


def test_a_twin_can_be_named(folders, capsys):
    run(*folders, "--twin", "sparse", "--csv")
    found = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert {row["twin"] for row in found if row["run"] == "plain"} == {"sparse"}
    assert "choose one of 'sparse', 'plain'" in mistake(capsys, *folders, "--twin=other")


def test_help_says_what_a_run_is(capsys):
    run("--help")
    assert "RUN is the dump_dir of a training run" in capsys.readouterr().out


def test_no_run(capsys):
    assert "no RUN is given" in mistake(capsys)
    assert "no RUN is given" in mistake(capsys, "--csv")


def test_a_flag_that_is_not_known(folders, capsys):
    assert "--outt is no known flag: did you mean out?" in mistake(capsys, *folders, "--outt=x.md")
    assert "--out needs a value" in mistake(capsys, *folders, "--out")


def test_a_run_that_is_not_there(tmp_path, capsys):
    assert "is not a folder" in mistake(capsys, tmp_path / "gone")


def test_a_run_without_an_evaluation(tmp_path, capsys):
    checkpoint = tmp_path / "my run" / "checkpoints" / "0000000007"
    checkpoint.mkdir(parents=True)
    (checkpoint / ".metadata").touch()
    said = mistake(capsys, tmp_path / "my run")
    assert "python -m apps.topk.eval config=configs/eval/validation.yaml" in said
    assert f"'ckpt_dir={checkpoint}'" in said


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"provenance": []}', b'{"provenance": {}}',
     b'{"docs": 3}'],
)  # fmt: skip
@pytest.mark.parametrize("name", ["validation.json", "results.json"])
def test_a_file_that_cannot_be_read(tmp_path, capsys, content, name):
    (tmp_path / name).write_bytes(content)
    assert name in mistake(capsys, tmp_path)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("docs", "perplexity"), "high"),
        (("docs", "perplexity"), -1.0),
        (("docs", "bits_per_byte"), None),
        (("docs", "documents"), 1.5),
        (("docs", "tokens"), 10**400),
        (("docs", "l0"), [1]),
        (("docs",), 5),
        (("provenance", "model", "dim"), "wide"),
        (("provenance", "model", "topk"), {"layers": [0]}),
        (("provenance", "model", "topk"), 3),
        (("provenance", "step"), [1]),
        (("provenance", "args"), "x"),
    ],
)
def test_a_field_of_another_type(folders, capsys, place, value):
    path = f"{folders[0]}/validation.json"
    with open(path) as file:
        content = json.load(file)
    inner = content
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    with open(path, "w") as file:
        json.dump(content, file)
    assert path in mistake(capsys, *folders)


@pytest.mark.parametrize("line", ["{", "3", '{"source": "docs", "document": 0}', None])
def test_documents_that_cannot_be_read(folders, capsys, line):
    path = f"{folders[0]}/validation_documents.jsonl"
    with open(path) as file:
        first = file.readline()
    with open(path, "a") as file:
        file.write((line or first) + "\n")
    assert "validation_documents.jsonl" in mistake(capsys, *folders)


@pytest.mark.parametrize(
    "change",
    [
        {"results": {"t": 3}},
        {"results": {"t": {"acc,none": 0.5}}, "samples": 3},
        {"results": {"t": {"acc,none": 0.5}}, "configs": {"t": []}},
    ],
)
def test_results_of_another_form(tmp_path, capsys, change):
    folder = write_harness(tmp_path / "x", {"t": mean_task([1, 0])})
    content = json.loads((folder / "results.json").read_text())
    write_json(folder / "results.json", content | change)
    assert "results.json" in mistake(capsys, folder)


@pytest.mark.parametrize(
    "value",
    [[], [1, 2, 3], {"a": 1}, "x", None, [None, 1], float("nan"), 10**400, [1, 0], [[1], 1]],
)
def test_samples_of_another_form_are_not_used(tmp_path, value):
    folder = write_harness(tmp_path / "x", {"t": mean_task([1, 0])})
    content = json.loads((folder / "results.json").read_text())
    content["samples"]["t"][0]["acc"] = value
    content["group_subtasks"] = {"t": ["t", 3], "u": None}
    write_json(folder / "results.json", content)
    (result,) = compared({"x": folder}).runs[0].results.values()
    assert result.items is None


def test_values_that_are_too_far_apart(tmp_path, capsys):
    paths = [
        write_validation(tmp_path / name, [x], [10], [40], False, name=name, topk=topk)
        for name, x, topk in (("a", 3400.0, TOPK), ("b", -3700.0, None))
    ]
    run(*paths)
    assert "too far apart" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("name", ["table.txt", "table", "table.md.bak", ".md"])
def test_out_must_be_markdown(folders, tmp_path, capsys, name):
    assert "does not end in .md" in mistake(capsys, *folders, "--out", tmp_path / name)


@pytest.mark.parametrize("name", ["table.md", "table.csv"])
@pytest.mark.parametrize("content", ["", "# mine\n", "run,suite\n"])
def test_foreign_files_are_left_alone(folders, tmp_path, capsys, name, content):
    (tmp_path / name).write_text(content)
    assert "is no table of this program" in mistake(
        capsys, *folders, "--out", tmp_path / "table.md"
    )
    assert (tmp_path / name).read_text() == content


def test_a_folder_or_a_dangling_link_is_not_replaced(folders, tmp_path, capsys):
    (tmp_path / "a.md").mkdir()
    (tmp_path / "b.md").symlink_to(tmp_path / "nowhere")
    for name in ("a.md", "b.md"):
        assert "is no table" in mistake(capsys, *folders, "--out", tmp_path / name)


def test_a_place_that_cannot_be_written(folders, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    with pytest.raises(SystemExit) as ended:
        run(*folders, "--out", tmp_path / "file" / "table.md")
    assert ended.value.code == 2
    assert "file/table.md cannot be written" in capsys.readouterr().err
