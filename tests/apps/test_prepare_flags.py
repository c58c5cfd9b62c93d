"""Flags off a signature: every mistake is one line, and values are taken as they are."""

import pytest

from apps.topk.corpus.flags import call, help_text
from lingua_topk.errors import ConfigError


def tool(*, path: str, count: int = 3, rate: float = 0.5, dry_run: bool = False) -> dict:
    """Do a thing with a file.

    Twice, if need be,
    and in two paragraphs.

    Args:
        path: the file: which one,
            and where.
        count: how often.
        rate: how fast.
        dry_run: only say so.

    Returns: not for the help.
    """
    return {"path": path, "count": count, "rate": rate, "dry_run": dry_run}


def flags(*argv: str) -> dict:
    return call(tool, "apps.tool", argv, "--path FILE", repeatable=["path"])


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--path", "a"], {}),
        (["--path=a", "--count=4"], {"count": 4}),
        (["--path", "a", "--count", "-4"], {"count": -4}),
        (["--path", "a", "--rate", "1"], {"rate": 1.0}),
        (["--path", "a", "--rate=1e-3"], {"rate": 0.001}),
        (["--path", "a", "--dry_run"], {"dry_run": True}),
        (["--dry-run", "--path", "a"], {"dry_run": True}),
        (["--dry_run", "False", "--path", "a"], {"dry_run": False}),
        (["--path", "a", "--path", "b"], {"path": "a,b"}),
    ],
)
def test_values(argv, expected):
    defaults = {"path": "a", "count": 3, "rate": 0.5, "dry_run": False}
    result = flags(*argv)
    assert result == {**defaults, **expected}
    assert [type(value) for value in result.values()] == [str, int, float, bool]


@pytest.mark.parametrize("text", ["007", "1e3", "a,b", "[1]", "None", "-", "a b", "", "x=y", "'q'"])
def test_text_stays_as_it_is(text):
    assert flags(f"--path={text}")["path"] == text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "apps.tool needs flags, for example --path FILE (python -m apps.tool --help lists"),
        (["--count", "4"], "--path is missing: see python -m apps.tool --help"),
        (["--paht", "a"], "--paht is no known flag: did you mean path?"),
        (["--zzz=1"], "--zzz is no known flag: allowed are count, dry_run, path, rate"),
        (["a"], "argument 'a' belongs to no flag"),
        (["-p", "a"], "argument '-p' belongs to no flag"),
        (["--path", "a", "b"], "argument 'b' belongs to no flag"),
        (["--path"], "--path needs a value"),
        (["--path", "--count", "4"], "--path needs a value"),
        (["--path", "a", "--count", "1", "--count", "2"], "--count is given twice"),
        (["--path", "a", "--count", "many"], "--count='many' is not a whole number"),
        (["--path", "a", "--count", "1.5"], "--count='1.5' is not a whole number"),
        (["--path", "a", "--rate", "fast"], "--rate='fast' is not a number"),
        (["--path", "a", "--dry_run", "perhaps"], "--dry_run='perhaps' is not true or false"),
    ],
)
def test_mistakes(argv, message, capsys):
    with pytest.raises(ConfigError) as error:
        flags(*argv)
    assert str(error.value).startswith(message)
    assert capsys.readouterr() == ("", "")


def test_errors_of_the_function_pass_through():
    def broken(*, path: str) -> None:
        """Break."""
        raise ConfigError(f"path={path!r}")

    with pytest.raises(ConfigError, match="path='a'"):
        call(broken, "apps.tool", ["--path", "a"], "")


def test_nothing_is_printed_for_the_result(capsys):
    flags("--path", "a")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["--count", "4", "--help"]])
def test_help(argv, capsys):
    assert flags(*argv) is None
    assert capsys.readouterr().out == help_text(tool, "apps.tool", "--path FILE") + "\n"


def test_help_text(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    assert help_text(tool, "apps.tool", "--path FILE").splitlines() == [
        "usage: python -m apps.tool --path FILE",
        "",
        "Do a thing with a file.",
        "",
        "Twice, if need be, and in two paragraphs.",
        "",
        "  --path (required)",
        "      the file: which one, and where.",
        "  --count (default: 3)",
        "      how often.",
        "  --rate (default: 0.5)",
        "      how fast.",
        "  --dry_run (default: false)",
        "      only say so.",
    ]
