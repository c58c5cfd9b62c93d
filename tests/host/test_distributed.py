"""lingua.distributed in one process. What takes two is in test_parallel.py."""

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import apps.main.train as host
import lingua.distributed
from lingua._requeue import is_preempted
from lingua.distributed import (
    DistributedArgs,
    EnvironmentArgs,
    clean_env,
    dist_max,
    dist_mean,
    dist_mean_dict,
    dist_sum,
    get_device,
    get_global_rank,
    get_is_master,
    get_is_slurm_job,
    get_is_torch_run,
    get_local_rank,
    get_master_addr,
    get_master_port,
    get_world_size,
    init_signal_handler,
    requeue_slurm_job,
    setup_env,
    setup_torch_distributed,
    validate_distributed_args,
)
from lingua.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]

TORCHRUN = {
    "LOCAL_RANK": "1", "RANK": "5", "WORLD_SIZE": "8",
    "MASTER_ADDR": "node7", "MASTER_PORT": "12345",
}  # fmt: skip
SLURM = {
    "SLURM_JOB_ID": "77", "SLURM_LOCALID": "2", "SLURM_PROCID": "10", "SLURM_NTASKS": "16",
    "SLURM_JOB_NODELIST": "node[3-4]",
}  # fmt: skip
ELEMENT = {"SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "3"}
CACHED = (
    get_is_torch_run, get_is_slurm_job, get_global_rank, get_local_rank, get_world_size,
    get_is_master, get_master_addr, get_master_port,
)  # fmt: skip


@pytest.fixture
def launch(monkeypatch):
    """Call it with variables: they are all that names a job or a rank, and nothing is cached."""

    def as_launched(variables: dict[str, str]) -> None:
        for name in list(os.environ):
            if name.startswith("SLURM") or name in (*TORCHRUN, "LAUNCH_WITH"):
                monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        clear_caches()

    yield as_launched
    clear_caches()


def clear_caches() -> None:
    for function in CACHED:
        function.cache_clear()


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """A stand-in for SLURM's program; returns the file with the arguments of its calls."""

    def install(status: int = 0, output: str = "") -> Path:
        calls, program = tmp_path / "calls", tmp_path / "scontrol"
        program.write_text(f'#!/bin/sh\necho "$@" >> {calls}\necho "{output}"\nexit {status}\n')
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
        return calls

    return install


def numbers() -> tuple[int, int, int, bool]:
    return get_global_rank(), get_local_rank(), get_world_size(), get_is_master()


def test_a_process_alone(launch):
    launch({})
    assert numbers() == (0, 0, 1, True)
    assert (get_is_torch_run(), get_is_slurm_job()) == (False, False)
    assert get_master_addr() == "127.0.0.1"


def test_a_process_of_torchrun(launch):
    launch(TORCHRUN)
    assert numbers() == (5, 1, 8, False)
    assert (get_master_addr(), get_master_port(job_id=3)) == ("node7", 12345)


def test_a_task_of_slurm(launch, scontrol):
    calls = scontrol(output="node3\nnode4")
    launch(SLURM)
    assert numbers() == (10, 2, 16, False)
    assert get_is_slurm_job()
    assert get_master_addr() == "node3"
    assert calls.read_text() == "show hostnames node[3-4]\n"


def test_torchrun_inside_slurm_is_torchrun(launch):
    launch({**SLURM, **TORCHRUN})
    assert numbers() == (5, 1, 8, False)
    assert not get_is_slurm_job()


def test_plain_python_inside_an_allocation_is_alone(launch):
    launch({"SLURM_JOB_ID": "77", "SLURM_NTASKS": "16"})
    assert numbers() == (0, 0, 1, True)


def test_all_tasks_of_a_slurm_job_find_the_same_port(launch):
    """Another than those of jobs that may share the node, of other steps, and of any socket."""
    ports = {}
    for step in range(8):
        launch({**SLURM, "SLURM_STEP_ID": str(step)})
        ports |= {(job, step): get_master_port(job) for job in range(1000, 2500)}
    assert len(set(ports.values())) == len(ports) == 12_000
    assert min(ports.values()) >= 20_000 and max(ports.values()) < 32_768
    launch({**SLURM, "SLURM_PROCID": "11", "SLURM_STEP_ID": "3"})
    assert get_master_port(1007) == ports[1007, 3]


@pytest.fixture
def environment(monkeypatch):
    """Changes to the environment are undone; a secret is in it."""
    for name in (*asdict(EnvironmentArgs()), "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "as it was")
    monkeypatch.setenv("SOME_API_KEY", "hunter2")


def test_setup_env_exports_its_arguments_and_a_cache_folder(environment):
    setup_env(EnvironmentArgs(NCCL_DEBUG="WARN"))
    assert os.environ["NCCL_DEBUG"] == "WARN"
    assert os.environ["NCCL_IB_TIMEOUT"] == "22"
    assert Path(os.environ["TRITON_CACHE_DIR"]).is_dir()


@pytest.mark.parametrize(("cuda", "threads"), [(False, "as it was"), (True, "1")])
def test_only_with_cuda_is_one_thread_enough(environment, monkeypatch, cuda, threads):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    setup_env(EnvironmentArgs())
    assert os.environ["OMP_NUM_THREADS"] == os.environ["MKL_NUM_THREADS"] == threads


@pytest.fixture
def process_group():
    """Whatever the test sets up for the whole process is undone."""
    start_method = multiprocessing.get_start_method(allow_none=True)
    yield
    torch.autograd.set_detect_anomaly(False)
    multiprocessing.set_start_method(start_method, force=True)
    if dist.is_initialized():
        dist.destroy_process_group()


def test_a_process_alone_needs_no_port_and_may_set_up_twice(launch, process_group):
    launch({})
    setup_torch_distributed(DistributedArgs())
    setup_torch_distributed(DistributedArgs(spawn_method="spawn", detect_anomaly=True))
    assert (dist.get_rank(), dist.get_world_size()) == (0, 1)
    assert multiprocessing.get_start_method() == "spawn"
    assert torch.is_anomaly_enabled()
    assert "MASTER_PORT" not in os.environ


def test_the_environment_is_not_logged(launch, environment, process_group, caplog):
    launch({})
    with caplog.at_level(logging.DEBUG):
        setup_env(EnvironmentArgs())
        setup_torch_distributed(DistributedArgs())
    assert "NCCL_DEBUG=INFO" in caplog.text
    assert "process 0 of 1" in caplog.text
    assert "hunter2" not in caplog.text and "SOME_API_KEY" not in caplog.text


def test_the_device_is_the_cpu_or_the_cuda_device_of_this_rank(launch, monkeypatch):
    launch(TORCHRUN)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert get_device() == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert get_device() == torch.device("cuda", 1)


def test_without_a_process_group_a_value_is_its_own_mean(launch):
    launch({})
    assert dist_mean(3).item() == 3.0
    assert dist_mean([1, 2]).tolist() == [1.0, 2.0]
    assert (dist_max(5).item(), dist_sum([0.1]).tolist()) == (5, [0.1])
    assert dist_mean_dict({"a": 1, "b": [2.5, 3]}) == {"a": 1.0, "b": [2.5, 3.0]}


def test_the_device_is_not_waited_for_to_ask_if_the_run_is_to_end(process_group, monkeypatch):
    """Every step asks; a tensor of the device would have to be read."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(host, "get_world_size", lambda: 2)
    monkeypatch.setattr(lingua.distributed, "get_device", lambda: torch.device("meta"))
    assert [host._any_rank(flag) for flag in (True, False)] == [True, False]


def test_a_reduced_tensor_is_a_new_one(launch):
    launch({})
    x = torch.ones(2, dtype=torch.float64)
    dist_sum(x).add_(1)
    assert x.tolist() == [1.0, 1.0]


def test_large_counts_are_summed_exactly(launch):
    launch({})
    assert dist_sum(2**60 + 1).item() == 2**60 + 1
    assert dist_max(2.0**30 + 1).item() == 2.0**30 + 1


def test_requeue_without_slurm_just_ends(launch):
    launch({})
    with pytest.raises(SystemExit) as ended:
        requeue_slurm_job()
    assert ended.value.code == 0


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({**SLURM, "SLURM_PROCID": "0"}, "requeue 77\n"),
        (SLURM, None),
        ({**SLURM, "SLURM_PROCID": "0", "LAUNCH_WITH": "DORA"}, None),
        ({**SLURM, **TORCHRUN, "RANK": "0"}, "requeue 77\n"),
        # The number alone would be that of the whole array.
        ({**SLURM, **ELEMENT, "SLURM_PROCID": "0"}, "requeue 77_3\n"),
    ],
    ids=["rank-0", "rank-10", "dora", "torchrun", "element"],
)
def test_rank_0_of_a_slurm_job_requeues_it(launch, scontrol, variables, expected):
    calls = scontrol()
    launch(variables)
    with pytest.raises(SystemExit) as ended:
        requeue_slurm_job()
    assert ended.value.code == 0
    assert (calls.read_text() if calls.exists() else None) == expected


@pytest.mark.parametrize("is_there", [True, False])
def test_a_requeue_that_fails_is_a_line_in_the_log_and_a_status(
    launch, scontrol, monkeypatch, caplog, is_there
):
    """With status 0 the job would be done, for SLURM and for what waits for it."""
    scontrol(status=1)
    launch({**SLURM, "SLURM_PROCID": "0"})
    if not is_there:
        monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit) as ended:
        requeue_slurm_job()
    assert ended.value.code == 1
    (line,) = (one.getMessage() for one in caplog.records if one.levelname == "ERROR")
    assert line.startswith("scontrol requeue 77 failed: ")
    assert line.endswith("the run is saved, and goes on when it is submitted again")


@pytest.mark.parametrize(
    ("output", "status", "expected"),
    [
        ("JobId=77 PreemptEligibleTime=2026-01-02T03:04:05 PreemptTime=None Reason=None", 0, False),
        ("JobId=77 PreemptEligibleTime=Unknown PreemptTime=2026-01-02T03:04:05", 0, True),
        ("JobId=77 JobState=RUNNING", 0, False),
        ("slurm_load_jobs error", 1, False),
    ],
)
def test_slurm_says_whether_it_preempts_a_job(launch, scontrol, output, status, expected):
    calls = scontrol(status, output)
    launch({**SLURM, **ELEMENT})
    assert is_preempted() == expected
    assert calls.read_text() == "show job -o 77_3\n"


def test_without_slurm_nothing_is_preempted(launch, scontrol):
    calls = scontrol(output="PreemptTime=2026-01-02T03:04:05")
    launch({})
    assert not is_preempted() and not calls.exists()


def test_sigusr2_calls_the_handler():
    received = []
    before = signal.getsignal(signal.SIGUSR2)
    try:
        init_signal_handler(lambda signum, frame: received.append(signum))
        os.kill(os.getpid(), signal.SIGUSR2)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert received == [signal.SIGUSR2]


def test_clean_env_hides_job_and_rank_and_restores_them(launch, monkeypatch):
    hidden = {**TORCHRUN, **SLURM, "WANDB_RUN_ID": "x", "SBATCH_A": "1", "LOCAL_WORLD_SIZE": "8"}
    launch(hidden)
    monkeypatch.setenv("SLURMLIKE", "stays")
    before = dict(os.environ)
    with pytest.raises(KeyError), clean_env():
        assert not hidden.keys() & os.environ.keys()
        assert os.environ.keys() == before.keys() - hidden.keys()
        raise KeyError
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"spawn_method": "thread"}, r"distributed\.spawn_method='thread'.* forkserver"),
        ({"model_dtype": "int8"}, r"distributed\.model_dtype='int8'.* bf16"),
        ({"fsdp_type": "ddp"}, r"distributed\.fsdp_type='ddp'.* full_shard"),
        ({"tp_size": 2}, r"distributed\.tp_size=2 .*set it to 1"),
        ({"float8_recipe": "rowwise"}, r"distributed\.float8_recipe=rowwise .*set it to null"),
        ({"dp_shard": 3, "fsdp_type": "full_shard"}, r"dp_shard=3 does not divide the 8 processes"),
        ({"dp_shard": 0, "fsdp_type": "full_shard"}, r"dp_shard=0 does not divide the 8 processes"),
        ({"dp_shard": 2}, r"distributed\.dp_shard=2 with distributed\.fsdp_type=no_shard"),
    ],
)
def test_what_cannot_run_is_named(values, text):
    with pytest.raises(ConfigError, match=text) as caught:
        validate_distributed_args(DistributedArgs(**values), world_size=8)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("given", "dp_shard", "filled"), [(1, 2, 4), (4, 2, 4), (3, 8, 1)])
def test_dp_replicate_is_filled_in(given, dp_shard, filled):
    args = DistributedArgs(dp_replicate=given, dp_shard=dp_shard, fsdp_type="full_shard")
    validate_distributed_args(args, world_size=8)
    assert args.dp_replicate == filled


def test_bf16_reduction_is_no_config_key():
    assert "allow_bf16_reduced_precision_reduction" not in asdict(DistributedArgs())
    assert DistributedArgs.allow_bf16_reduced_precision_reduction


def test_what_is_exported_is_there():
    for name in lingua.distributed.__all__:
        assert hasattr(lingua.distributed, name), name


def test_the_host_needs_no_optional_package():
    program = """
import importlib, pkgutil, sys
for name in ("xformers", "wandb", "pynvml", "viztracer", "triton"):
    sys.modules[name] = None  # importing it fails
import apps, lingua
for module in pkgutil.iter_modules(lingua.__path__):
    importlib.import_module(f"lingua.{module.name}")
import apps.main.train
"""
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
