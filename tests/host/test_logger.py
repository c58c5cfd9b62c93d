"""lingua.logger: what a line looks like, and where it goes."""

import logging
import re
import sys

import pytest
from tqdm import tqdm

from lingua import logger as host_logger
from lingua.logger import LogFormatter, init_logger, set_root_log_level

NAME = "test_logger"


@pytest.fixture
def rank(monkeypatch):
    """Call it with a rank, and whether SLURM runs it."""

    def set_rank(number: int, slurm: bool = False) -> None:
        monkeypatch.setattr(host_logger, "get_global_rank", lambda: number)
        monkeypatch.setattr(host_logger, "get_is_slurm_job", lambda: slurm)

    set_rank(0)
    yield set_rank
    target = logging.getLogger(NAME)
    for handler in list(target.handlers):
        target.removeHandler(handler)
        handler.close()


@pytest.fixture
def log(rank) -> logging.Logger:
    target = logging.getLogger(NAME)
    target.propagate = False
    return target


def formatted(message="", level=logging.INFO, exc_info=None, sinfo=None) -> str:
    record = logging.LogRecord(NAME, level, __file__, 1, message, (), exc_info, sinfo=sinfo)
    formatter = LogFormatter()
    formatter.start_time -= 3661.4  # it was made so many seconds ago
    return formatter.format(record)


@pytest.mark.parametrize(
    ("number", "slurm", "level", "start"),
    [
        (0, False, logging.INFO, "0: INFO    "),
        (12, False, logging.WARNING, "12: WARNING "),
        (12, True, logging.ERROR, "ERROR   "),
    ],
)
def test_a_line_begins_with_rank_level_and_times(rank, number, slurm, level, start):
    rank(number, slurm)
    line = formatted("50% done", level)
    pattern = re.escape(start) + r"\d\d-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6} - 1:01:01 - 50% done"
    assert re.fullmatch(pattern, line), line


def test_continued_lines_are_indented(rank):
    first, second = formatted("a\nb").split("\n")
    assert second == " " * (len(first) - 1) + "b"


def test_a_traceback_and_a_stack_follow_the_message(rank):
    try:
        raise KeyError("missing")
    except KeyError as error:
        line = formatted("failed", exc_info=(type(error), error, error.__traceback__))
    assert re.search(r"- failed\n +Traceback .*\n +KeyError: 'missing'$", line, re.DOTALL)
    assert formatted("here", sinfo="Stack (most recent call last):").endswith("last):")


def test_each_record_is_printed_once_warnings_to_stderr(log, capsys):
    init_logger(name=NAME)
    log.debug("detail")
    log.info("news")
    log.warning("careful")
    log.error("broken")
    out, err = capsys.readouterr()
    assert [line.split(" - ")[-1] for line in out.splitlines()] == ["news"]
    assert [line.split(" - ")[-1] for line in err.splitlines()] == ["careful", "broken"]


def test_records_are_written_above_a_progress_bar(log, capsys):
    init_logger(name=NAME)
    with tqdm(total=2, file=sys.stderr, mininterval=0) as bar:
        bar.update()
        log.info("news")
        log.warning("careful")
    out, err = capsys.readouterr()
    assert re.fullmatch(r"0: INFO .* - news\n", out)
    assert re.search(r"\r0: WARNING [^\r\n]* - careful\n", err), repr(err)


def test_the_level_can_be_lowered(log, capsys):
    init_logger(name=NAME, level="DEBUG")
    log.debug("detail")
    assert capsys.readouterr().out.endswith("detail\n")


def test_the_file_gets_everything_and_is_appended_to(log, tmp_path):
    path = tmp_path / "train.log"
    path.write_text("before\n")
    for _ in range(2):  # the second call replaces the handlers of the first
        init_logger(path, name=NAME)
    log.info("größer")
    log.warning("careful")
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [line.split(" - ")[-1] for line in lines] == ["before", "größer", "careful"]


def test_only_rank_0_writes_the_file(rank, log, tmp_path, capsys):
    rank(1)
    init_logger(tmp_path / "train.log", name=NAME)
    log.info("news")
    assert not (tmp_path / "train.log").exists()
    assert capsys.readouterr().out.startswith("1: INFO")


def test_by_default_the_root_is_set_up(rank, monkeypatch):
    root = logging.RootLogger(logging.WARNING)
    monkeypatch.setattr(logging, "getLogger", lambda name=None: root)
    init_logger()
    assert (root.level, len(root.handlers)) == (logging.INFO, 2)
    set_root_log_level("error")
    assert root.level == logging.ERROR
    with pytest.raises(ValueError, match="LOUD"):
        set_root_log_level("loud")
