"""metrics.jsonl, Weights & Biases where asked for, and what memory a run takes."""

import json
import logging
import math
import os
import resource
import sys
from collections import namedtuple
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Optional, Union

import torch
from torch import nn

from lingua.distributed import get_is_master
from lingua.errors import ConfigError, UserError

logger = logging.getLogger(__name__)

GIB = 1024**3


@dataclass
class WandbArgs:
    """Passed to `wandb.init` as they are."""

    job_type: Optional[str] = None  # noqa: UP045
    dir: Optional[str] = None  # noqa: UP045
    project: Optional[str] = None  # noqa: UP045
    entity: Optional[str] = None  # noqa: UP045
    tags: Optional[list] = None  # noqa: UP045
    group: Optional[str] = None  # noqa: UP045
    name: Optional[str] = None  # noqa: UP045
    notes: Optional[str] = None  # noqa: UP045
    config_exclude_keys: Optional[list[str]] = None  # noqa: UP045
    config_include_keys: Optional[list[str]] = None  # noqa: UP045
    anonymous: Optional[str] = None  # noqa: UP045
    mode: Optional[str] = None  # noqa: UP045
    allow_val_change: Optional[bool] = None  # noqa: UP045
    resume: Optional[Union[bool, str]] = None  # noqa: UP007, UP045
    force: Optional[bool] = None  # noqa: UP045
    tensorboard: Optional[bool] = None  # noqa: UP045
    sync_tensorboard: Optional[bool] = None  # noqa: UP045
    monitor_gym: Optional[bool] = None  # noqa: UP045
    save_code: Optional[bool] = None  # noqa: UP045
    id: Optional[str] = None  # noqa: UP045
    fork_from: Optional[str] = None  # noqa: UP045
    resume_from: Optional[str] = None  # noqa: UP045


@dataclass
class LoggingArgs:
    freq: int = 10  # every so many optimizer steps
    acc_freq: Optional[int] = None  # noqa: UP045  (every so many micro-batches, besides)
    wandb: Optional[WandbArgs] = None  # noqa: UP045


class MetricLogger:
    """Appends one JSON object a line to `outdir`, which is the path of a file.

    A context manager. `args` is a dataclass with `logging.wandb`, or None.
    """

    def __init__(self, outdir: str | Path, args: Any | None = None):
        self.outdir = Path(outdir)
        self.args = args
        self.jsonl_writer = None
        self.run = None

    def open(self) -> None:
        if self.jsonl_writer is not None:
            return
        settings = getattr(getattr(self.args, "logging", None), "wandb", None)
        # On every rank, so that all fail where it is missing.
        wandb = None if settings is None else import_wandb()
        # Unbuffered: what could not be written does not come again when the file is closed.
        self.jsonl_writer = open(self.outdir, "ab", buffering=0)  # noqa: SIM115
        if wandb is not None and get_is_master():
            self.run = wandb.init(config=asdict(self.args), **asdict(settings))

    def log(self, metrics: dict[str, Any]) -> None:
        """Write one line, `created_at` (UTC) added, whole or not at all. UserError for no room.

        What is not finite is null there: JSON has no NaN.
        """
        if self.run is not None:
            self.run.log(metrics, step=metrics["global_step"])
        finite = {key: value if _is_json(value) else None for key, value in metrics.items()}
        line = {**finite, "created_at": datetime.now(timezone.utc).isoformat()}
        size = os.fstat(self.jsonl_writer.fileno()).st_size
        left = json.dumps(line).encode() + b"\n"
        try:
            while left:
                left = left[self.jsonl_writer.write(left) :]
        except OSError as error:
            self.jsonl_writer.truncate(size)
            raise UserError(
                f"{self.outdir} cannot be written ({error.strerror}): make room there, then start"
                " the run again; it goes on from its newest checkpoint"
            ) from None

    def close(self) -> None:
        if self.jsonl_writer is not None:
            self.jsonl_writer.close()
            self.jsonl_writer = None
        if self.run is not None:
            self.run.finish()
            self.run = None

    def __enter__(self) -> "MetricLogger":
        self.open()
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def _is_json(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def import_wandb():
    """The module; ConfigError where it is not installed."""
    try:
        import wandb
    except ImportError:
        raise ConfigError(
            "logging.wandb is set, but wandb is not installed: pip install wandb, or set"
            " logging.wandb=null"
        ) from None
    return wandb


GPUMemStats = namedtuple(
    "GPUMemStats",
    [
        "max_active_gib",
        "max_active_pct",
        "max_reserved_gib",
        "max_reserved_pct",
        "num_alloc_retries",
        "num_ooms",
        "power_draw",  # milliwatts; 0 where it cannot be read
    ],
)


class GPUMemoryMonitor:
    """Peak memory of a CUDA device or, on the CPU, of this process (resident set)."""

    def __init__(self, device: str | torch.device = "cuda:0"):
        self.device = torch.device(device)
        if self.device.type == "cuda":
            index = self.device.index
            self.device_index = torch.cuda.current_device() if index is None else index
            properties = torch.cuda.get_device_properties(self.device)
            self.device_name = properties.name
            self.device_capacity = properties.total_memory
            self.reset_peak_stats()
        else:
            self.device_index = 0
            self.device_name = "cpu"
            self.device_capacity = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        self.device_capacity_gib = self.device_capacity / GIB

    def get_peak_stats(self) -> GPUMemStats:
        if self.device.type == "cuda":
            stats = torch.cuda.memory_stats(self.device)
            active = stats["active_bytes.all.peak"]
            reserved = stats["reserved_bytes.all.peak"]
            retries, ooms = stats["num_alloc_retries"], stats["num_ooms"]
        else:
            active = reserved = _peak_resident_bytes()
            retries = ooms = 0
        return GPUMemStats(
            max_active_gib=active / GIB,
            max_active_pct=100 * active / self.device_capacity,
            max_reserved_gib=reserved / GIB,
            max_reserved_pct=100 * reserved / self.device_capacity,
            num_alloc_retries=retries,
            num_ooms=ooms,
            power_draw=self._power_draw(),
        )

    def _power_draw(self) -> float:
        if self.device.type != "cuda":
            return 0
        try:
            return torch.cuda.power_draw(self.device)
        except Exception:  # needs NVIDIA's management library, which is optional
            return 0

    def reset_peak_stats(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            torch.cuda.reset_accumulated_memory_stats(self.device)

    def __str__(self) -> str:
        return f"{self.device_name}, {self.device_capacity_gib:.1f} GiB"


def _peak_resident_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def get_num_params(model: nn.Module) -> int:
    """Parameters of the whole model, shards counted at full size, tied ones once."""
    return sum(parameter.numel() for _, parameter in model.named_parameters())
