"""A corpus that nobody means well with, through every program that shows what a model reads."""

import contextlib
import io
import json
import re
import shutil

import pytest

from apps.topk import analyze, compare, generate, report, steer, trace
from apps.topk.corpus.tokenizer import train_tokenizer
from tests.apps.real_text import train_on
from tests.report.browser import opened, visit
from tests.report.conftest import browser  # noqa: F401  (the fixture)

HOSTILE = (
    "</script><script>alert(1)</script>", "<img src=x onerror=alert(2)>", "<!--<script>",
    "\x1b]0;owned\x07\x1b[2J\x1b[31m", "\x9b31m", "\u202egnihtyna\u2066", "\u2028alert(3)\u2029",
    "=cmd|' /C calc'!A0", "| a | b |\n|---|---|", "[x](javascript:alert(4))", "`` ` ``",
    "![](http://127.0.0.1/x)", "{{script}}", "[/red][bold]", "''\"><svg onload=alert(5)>",
)  # fmt: skip
NAME = "[/red]=1+1|<img src=x onerror=alert(6)>[x](javascript:alert(7))"
# What a terminal takes for a command, and what turns the direction of writing around.
COMMANDS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
CPU = ["--device", "cpu"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on such a corpus, its neurons analysed, and what was printed of it all."""
    root = tmp_path_factory.mktemp("hostile")
    plain = "The river bank flows past the old stone house"
    texts = [
        f"{plain} {HOSTILE[i % len(HOSTILE)]} {HOSTILE[(i + 4) % len(HOSTILE)]} and {plain}."
        for i in range(120)
    ]
    (root / "text").mkdir()
    for name, part in (("text.val.jsonl", texts[:40]), ("text.chunk.00.jsonl", texts[40:])):
        lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in part)
        (root / "text" / name).write_text("".join(lines), encoding="utf-8")
    (root / "tokenizer.model").write_bytes(train_tokenizer(texts, 400))
    train_on(root, root / "run", "steps=24", f'name="{NAME}"', "eval.validation.max_documents=4")
    return root / "run"


@pytest.fixture(scope="module")
def analysed(run):
    """The run and what was printed of its analysis."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        analyze.main(["--ckpt", str(run), "--tokens", "2000", "--min_words", "2", *CPU])
    return run, out.getvalue()


@pytest.fixture(scope="module")
def traced(run, tmp_path_factory):
    """The folder of a trace and what was printed of it."""
    folder = tmp_path_factory.mktemp("trace")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        trace.main(["--ckpts", str(run), "--tokens", "1000", "--neuron", "0:5", "--out",
                    str(folder / "out"), *CPU])  # fmt: skip
    return folder / "out", out.getvalue()


def test_nothing_of_it_commands_a_terminal(analysed, traced, capsys):
    (run, said), prompt = analysed, HOSTILE[3] + HOSTILE[5]
    for text in (said, traced[1]):
        assert text and not COMMANDS.search(text)
    for main, words in (
        (generate.main, ["--ckpt", run, "--prompt", prompt, "--max_tokens", "60", *CPU]),
        (steer.main, ["--ckpt", run, "--neuron", "0:5", "--delta", "2", "--prompt", prompt,
                      "--max_tokens", "20", *CPU]),
        (steer.main, ["--ckpt", run, "--list", *CPU]),
        (compare.main, [run]),
        (compare.main, [run, "--csv"]),
    ):  # fmt: skip
        main([str(one) for one in words])
        said = capsys.readouterr().out
        assert said and not COMMANDS.search(said), (main, said)


def test_tables_and_documents_show_it_as_text(analysed, traced, tmp_path):
    run = analysed[0]
    compare.main([str(run), "--out", str(tmp_path / "table.md")])
    shutil.copytree(traced[0], tmp_path / "trace")
    shutil.copytree(run / "neurons", tmp_path / "neurons")
    documents = sorted(tmp_path.rglob("*.md"))
    assert {path.name for path in documents} >= {"table.md", "comparison.md"}
    for path in documents:
        text = path.read_text(encoding="utf-8")
        assert not COMMANDS.search(text) and not re.search(r"(?<!\\)\[[^\]\n]*\]\(java", text)
        for tag in re.findall(r"(?<!\\)<(?!!-- written by|br>)[A-Za-z/!][^>]*>", text):
            pytest.fail(f"{path.name} holds {tag}")
    for path in tmp_path.rglob("*.csv"):
        cells = [cell for line in path.read_text("utf-8").splitlines() for cell in line.split(",")]
        assert not [cell for cell in cells if cell.lstrip('"')[:1] in ("=", "@")]
    for path in tmp_path.rglob("*.svg"):
        assert not re.search(r"<script|onerror|onload|javascript:", path.read_text("utf-8"))


@pytest.fixture(scope="module")
def page(analysed, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    texts = [f"--text={text}" for text in HOSTILE]
    report.main(["--run", str(analysed[0]), "--out", str(path), "--rows", "12", *texts, *CPU])
    return path


ACTING = "img, script, iframe, svg[onload], a[href^=java], [onerror], [onload], [onclick]"


def squeezed(text):
    return re.sub("[^a-z0-9]", "", text.lower())


def test_the_page_of_it_runs_nothing(browser, page):  # noqa: F811
    """`opened` also sees to it that no dialog came up and nothing was asked of anyone."""
    with opened(browser, page) as tab:
        for i, text in enumerate(HOSTILE):
            visit(tab, f"#text/{i}")
            seen = tab.locator("#view-text").evaluate("one => one.textContent")
            assert not text.isprintable() or squeezed(text) in squeezed(seen)
            assert not COMMANDS.search(seen) and not re.search("[\u2028\u2029]", seen)
            assert tab.locator("main").locator(ACTING).count() == 0
        for where in ("#neurons", "#neuron/0:5", "#neuron/1:7", "#texts", ""):
            visit(tab, where)
            assert not COMMANDS.search(tab.locator("main").evaluate("one => one.textContent"))
            assert tab.locator("main").locator(ACTING).count() == 0
