"""The torch profiler and, on CUDA, a memory snapshot, over a few steps of a run."""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, schedule

from lingua.distributed import get_global_rank
from lingua.errors import ConfigError

logger = logging.getLogger(__name__)


@dataclass
class ProfilerArgs:
    run: bool = False
    trace_folder: str = "profiling"  # inside dump_dir
    mem_warmup: int = 100  # steps before the memory snapshot
    mem_steps: int = 2
    profile_warmup: int = 102  # steps before the trace
    profile_steps: int = 2


class _Profiler:
    """Counts steps; opens and closes the two windows."""

    def __init__(self, folder: Path, config: ProfilerArgs):
        self.folder = folder
        self.config = config
        self.steps = 0
        self.trace = torch.profiler.profile(
            activities=_activities(),
            schedule=schedule(
                wait=max(config.profile_warmup - 1, 0),
                warmup=min(config.profile_warmup, 1),
                active=config.profile_steps,
                repeat=1,
            ),
            on_trace_ready=self._write_trace,
            record_shapes=True,
            with_stack=True,
        )
        self._record_memory()

    def step(self) -> None:
        """Call it once an optimizer step."""
        self.steps += 1
        self.trace.step()
        self._record_memory()

    def _record_memory(self) -> None:
        if not torch.cuda.is_available():
            return
        if self.steps == self.config.mem_warmup:
            torch.cuda.memory._record_memory_history()
        if self.steps == self.config.mem_warmup + self.config.mem_steps:
            path = self.folder / f"memory.{get_global_rank()}.pickle"
            torch.cuda.memory._dump_snapshot(str(path))
            torch.cuda.memory._record_memory_history(enabled=None)
            logger.info("memory snapshot written to %s", path)

    def _write_trace(self, profiler: torch.profiler.profile) -> None:
        path = self.folder / f"trace.{get_global_rank()}.json.gz"
        profiler.export_chrome_trace(str(path))
        logger.info("trace written to %s (open it in a Chrome or Perfetto trace viewer)", path)


def _activities() -> list[ProfilerActivity]:
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    return activities


@contextlib.contextmanager
def maybe_run_profiler(
    dump_dir: str | Path, module: nn.Module, config: ProfilerArgs
) -> Iterator[_Profiler | None]:
    """Yield None, or with `config.run` an object whose `step()` is called every step."""
    if not config.run:
        yield None
        return
    for name, least in (
        ("mem_warmup", 0),
        ("mem_steps", 1),
        ("profile_warmup", 0),
        ("profile_steps", 1),
    ):
        value = getattr(config, name)
        if value < least:
            raise ConfigError(f"profiling.{name}={value} is too small: give at least {least}")
    folder = Path(dump_dir) / config.trace_folder
    folder.mkdir(parents=True, exist_ok=True)
    profiler = _Profiler(folder, config)
    with profiler.trace:
        yield profiler
