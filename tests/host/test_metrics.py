"""lingua.metrics: lines of metrics.jsonl, Weights & Biases, memory, parameters."""

import json
import math
import sys
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta, timezone
from types import ModuleType

import pytest
import torch
from torch import nn

from lingua import metrics
from lingua.errors import ConfigError
from lingua.metrics import (
    GPUMemoryMonitor,
    LoggingArgs,
    MetricLogger,
    WandbArgs,
    get_num_params,
)


@dataclass
class Args:
    name: str = "run"
    logging: LoggingArgs = field(default_factory=LoggingArgs)


def read_lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_call_is_a_line_with_its_time(tmp_path):
    path, line = tmp_path / "metrics.jsonl", {"global_step": 1, "loss/out": 0.5}
    with MetricLogger(path, Args()) as log:
        log.log(line)
        log.log({"global_step": 2})
        assert len(read_lines(path)) == 2  # before it is closed
    first, second = read_lines(path)
    assert line == {"global_step": 1, "loss/out": 0.5}  # the caller's stays as it was
    when = datetime.fromisoformat(first.pop("created_at"))
    assert when.utcoffset() == timedelta(0)
    assert abs(datetime.now(timezone.utc) - when) < timedelta(minutes=1)
    assert first == line and second["global_step"] == 2


def test_what_is_not_finite_is_null(tmp_path):
    """A step that is left out has no loss; NaN is no JSON, and other readers end there."""
    with MetricLogger(tmp_path / "metrics.jsonl") as log:
        log.log({"global_step": 1, "loss/out": math.nan, "optim/grad_norm": math.inf, "x": 1.5})
    text = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")
    assert '"loss/out": null, "optim/grad_norm": null, "x": 1.5' in text


def test_a_resumed_run_appends(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2):
        with MetricLogger(path) as log:
            log.open()  # once more changes nothing
            log.log({"global_step": step})
    assert [line["global_step"] for line in read_lines(path)] == [1, 2]


class FakeWandb(ModuleType):
    """Keeps what it is given."""

    def __init__(self):
        super().__init__("wandb")
        self.lines, self.finished = [], False

    def init(self, **settings):
        self.settings = settings
        return self

    def log(self, line, step):
        self.lines.append((line, step))

    def finish(self):
        self.finished = True


def test_wandb_gets_settings_config_and_lines(tmp_path, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    args = Args(logging=LoggingArgs(wandb=WandbArgs(project="p", tags=["t"])))
    with MetricLogger(tmp_path / "metrics.jsonl", args) as log:
        log.log({"global_step": 3, "loss/out": 0.5})
    assert wandb.settings == {**asdict(args.logging.wandb), "config": asdict(args)}
    assert wandb.lines == [({"global_step": 3, "loss/out": 0.5}, 3)]
    assert wandb.finished
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 1


@pytest.mark.parametrize("is_master", [True, False])
def test_wandb_that_is_asked_for_and_missing_ends_every_process(tmp_path, monkeypatch, is_master):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(metrics, "get_is_master", lambda: is_master)
    args = Args(logging=LoggingArgs(wandb=WandbArgs()))
    with pytest.raises(ConfigError, match=r"pip install wandb.* logging\.wandb=null"):
        MetricLogger(tmp_path / "metrics.jsonl", args).open()


def test_only_rank_0_speaks_to_wandb(tmp_path, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(metrics, "get_is_master", lambda: False)
    args = Args(logging=LoggingArgs(wandb=WandbArgs()))
    with MetricLogger(tmp_path / "metrics.jsonl", args) as log:
        log.log({"global_step": 3})
    assert wandb.lines == [] and not hasattr(wandb, "settings")


def test_memory_of_the_cpu_is_that_of_the_process():
    monitor = GPUMemoryMonitor("cpu")
    before = monitor.get_peak_stats()
    block = torch.ones(64 * 2**20 // 4)  # 64 MiB that are touched
    after = monitor.get_peak_stats()
    monitor.reset_peak_stats()
    assert 0 < before.max_active_gib <= after.max_active_gib < monitor.device_capacity_gib
    assert after.max_active_gib >= block.nbytes / 2**30
    expected = 100 * after.max_active_gib / monitor.device_capacity_gib
    assert after.max_active_pct == pytest.approx(expected)
    assert after._fields == (
        "max_active_gib", "max_active_pct", "max_reserved_gib", "max_reserved_pct",
        "num_alloc_retries", "num_ooms", "power_draw",
    )  # fmt: skip
    assert after[4:] == (0, 0, 0)
    assert str(monitor).startswith("cpu, ")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_of_a_cuda_device():
    monitor = GPUMemoryMonitor("cuda")
    block = torch.ones(2**28 // 4, device="cuda")
    stats = monitor.get_peak_stats()
    del block
    assert 0.25 <= stats.max_active_gib <= stats.max_reserved_gib < monitor.device_capacity_gib
    monitor.reset_peak_stats()
    assert monitor.get_peak_stats().max_active_gib < stats.max_active_gib


def test_parameters_are_counted_once():
    embedding = nn.Embedding(5, 3)
    tied = nn.Linear(3, 5, bias=False)
    tied.weight = embedding.weight
    assert get_num_params(nn.ModuleList([embedding, tied, nn.Linear(3, 2)])) == 15 + 8
