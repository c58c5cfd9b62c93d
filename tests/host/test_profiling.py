"""lingua.profiling on the CPU."""

import gzip
import json

import pytest
import torch
from torch import nn

from lingua.errors import ConfigError
from lingua.profiling import ProfilerArgs, maybe_run_profiler


def run(folder, steps: int, **values) -> set[str]:
    """Profile so many steps; returns the names of the profiled ones."""
    module, config = nn.Linear(3, 3), ProfilerArgs(run=True, **values)
    with maybe_run_profiler(folder, module, config) as profiler:
        for _ in range(steps):
            module(torch.ones(2, 3))
            profiler.step()
    path = folder / "profiling" / "trace.0.json.gz"
    if not path.exists():
        return set()
    with gzip.open(path) as file:
        names = {event.get("name", "") for event in json.load(file)["traceEvents"]}
    assert "aten::linear" in names
    return {name for name in names if name.startswith("ProfilerStep")}


def test_without_run_nothing_happens(tmp_path):
    with maybe_run_profiler(tmp_path, nn.Linear(3, 3), ProfilerArgs()) as profiler:
        assert profiler is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:Profiler won't be using warmup")
@pytest.mark.parametrize(
    ("warmup", "profiled"), [(3, {3, 4}), (1, {1, 2}), (0, {0, 1})], ids=["3", "1", "0"]
)
def test_the_steps_after_the_warm_up_are_traced(tmp_path, warmup, profiled):
    steps = run(tmp_path, 7, profile_warmup=warmup, profile_steps=2)
    assert steps == {f"ProfilerStep#{step}" for step in profiled}


def test_a_run_that_ends_early_writes_what_it_has(tmp_path):
    assert "ProfilerStep#1" in run(tmp_path, 2, profile_warmup=1, profile_steps=5)
    assert run(tmp_path / "none", 2, profile_warmup=9) == set()


@pytest.mark.parametrize("field", ["profile_steps", "mem_steps"])
def test_a_window_of_no_steps_is_named(tmp_path, field):
    config = ProfilerArgs(run=True, **{field: 0})
    with (
        pytest.raises(ConfigError, match=rf"profiling\.{field}=0 is too small"),
        maybe_run_profiler(tmp_path, nn.Linear(3, 3), config),
    ):
        pass
