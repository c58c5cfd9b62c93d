"""What is refused before Meta Lingua's loop begins, as far as no checkout is needed to see it."""

import signal

import pytest

from apps.topk import lingua_host
from lingua_topk.errors import ConfigError


@pytest.mark.parametrize("loss", ["torch", "liger", "cce"])
def test_a_loss_that_only_the_embedded_host_has_is_refused(loss, monkeypatch):
    monkeypatch.setenv("LINGUA_TOPK_LOSS", loss)
    with pytest.raises(ConfigError, match=f"LINGUA_TOPK_LOSS={loss}: Meta Lingua has its own"):
        lingua_host._validate_loss()


@pytest.mark.parametrize("loss", ["", "auto", "plain"])
def test_its_own_loss_may_be_named(loss, monkeypatch):
    monkeypatch.setenv("LINGUA_TOPK_LOSS", loss)
    lingua_host._validate_loss()


@pytest.mark.parametrize(
    ("number", "answer", "asked", "status"),
    [
        (signal.SIGTERM, "PreemptTime=None", ["show job -o 77_3"], None),
        (signal.SIGTERM, "PreemptTime=2026-01-02", ["show job -o 77_3", "requeue 77_3"], None),
        (signal.SIGUSR2, "", ["requeue 77_3"], None),
        (signal.SIGUSR2, "refused", ["requeue 77_3"], 1),
    ],
)
def test_an_element_asks_to_be_requeued_where_it_is_to_go_on(
    tmp_path, monkeypatch, number, answer, asked, status
):
    import lingua.distributed

    scontrol = tmp_path / "scontrol"
    scontrol.write_text(
        f'#!/bin/sh\necho "$@" >>$0.words\necho {answer}\n[ {answer}. != refused. ]'
    )
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    job = {"JOB_ID": "77", "ARRAY_JOB_ID": "77", "ARRAY_TASK_ID": "3"}
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setattr(lingua.distributed, "get_is_master", lambda: True)
    stops = lingua_host.Stops()
    if number == signal.SIGTERM:
        stops._end(number, None)
    ended = None
    try:
        stops.requeue()
    except SystemExit as end:
        ended = end.code
    assert ended == status
    assert (tmp_path / "scontrol.words").read_text("utf-8").splitlines() == asked


def test_a_process_that_is_not_the_first_asks_for_nothing(monkeypatch):
    import lingua.distributed

    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setattr(lingua.distributed, "get_is_master", lambda: False)
    lingua_host.Stops().requeue()
