"""Processes, devices and collectives, on CPU (gloo) and CUDA (NCCL).

How a model is spread over them is in `lingua.parallel`; its names are importable from
here as well, where Lingua has them.
"""

import atexit
import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from typing import Optional

import numpy
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ReduceOp
from torch.distributed.device_mesh import DeviceMesh
from torch.multiprocessing import get_start_method, set_start_method

from lingua import _requeue
from lingua._rendezvous import is_torchruns, store_of_this_start
from lingua._timeout import get_timeout
from lingua.errors import ConfigError
from lingua.parallel import (
    check_model_value_range,
    check_parallelism,
    default_fsdp_grouping_plan,
    get_default_policy,
    get_device_mesh,
    get_module,
    parallelize_model,
    set_module,
)

logger = logging.getLogger(__name__)

SPAWN_METHODS = ("fork", "forkserver", "spawn")


@dataclass
class DistributedArgs:
    dp_shard: int = 1  # processes that share one copy of the weights
    dp_replicate: int = 1  # copies
    tp_size: int = 1
    selective_activation_checkpointing: bool = False
    compile: bool = False
    fsdp_type: str = "no_shard"
    model_dtype: str = "bf16"
    float8_recipe: Optional[str] = None  # noqa: UP045
    float8_filter: str = r"layers\.[0-9]+\."
    matmul_allow_tf32: bool = False
    # No annotation, so that it is no config key: as in Lingua.
    allow_bf16_reduced_precision_reduction = True
    detect_anomaly: bool = False
    compile_cache_size_limit: int = 8
    spawn_method: str = "forkserver"


@dataclass
class EnvironmentArgs:
    """Environment variables set at the start of a run, one a field."""

    MKL_SERVICE_FORCE_INTEL: str = "GNU"
    OMP_NUM_THREADS: str = "1"
    MKL_NUM_THREADS: str = "1"
    ENABLE_INTRA_NODE_COMM: str = "1"
    TORCH_NCCL_AVOID_RECORD_STREAMS: str = "1"
    NCCL_IB_TIMEOUT: str = "22"
    NCCL_DEBUG: str = "INFO"
    TORCH_NCCL_ASYNC_ERROR_HANDLING: str = "1"


@cache
def get_is_torch_run() -> bool:
    return os.environ.get("LOCAL_RANK") is not None


@cache
def get_is_slurm_job() -> bool:
    return "SLURM_JOB_ID" in os.environ and not get_is_torch_run()


@cache
def get_global_rank() -> int:
    return _launch_number("RANK", "SLURM_PROCID", 0)


@cache
def get_local_rank() -> int:
    return _launch_number("LOCAL_RANK", "SLURM_LOCALID", 0)


@cache
def get_world_size() -> int:
    return _launch_number("WORLD_SIZE", "SLURM_NTASKS", 1)


def _launch_number(torchrun_name: str, slurm_name: str, alone: int) -> int:
    if get_is_torch_run():
        return int(os.environ[torchrun_name])
    # A plain `python` inside an allocation (salloc, sbatch without srun) has no rank.
    if get_is_slurm_job() and "SLURM_PROCID" in os.environ:
        return int(os.environ[slurm_name])
    return alone


@cache
def get_is_master() -> bool:
    return get_global_rank() == 0


@cache
def get_master_addr() -> str:
    if get_is_torch_run():
        return os.environ["MASTER_ADDR"]
    if get_is_slurm_job() and "SLURM_JOB_NODELIST" in os.environ:
        hostnames = subprocess.check_output(
            ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]], text=True
        )
        return hostnames.split()[0]
    return "127.0.0.1"


@cache
def get_master_port(job_id: int) -> int:
    """torchrun's port, or one that all tasks of a step of a SLURM job compute alike.

    Jobs may share a node, and a job may have several steps at once: 8 steps of 1,596 jobs in a
    row have ports of their own. All are below those that Linux gives to whoever asks for any.
    """
    if get_is_torch_run():
        return int(os.environ["MASTER_PORT"])
    step = int(os.environ.get("SLURM_STEP_ID", 0))
    return 20_000 + (8 * job_id + step % 8) % 12_768


def get_device() -> torch.device:
    """The device of this process: its CUDA device, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", get_local_rank() % torch.cuda.device_count())
    return torch.device("cpu")


def setup_env(env_args: EnvironmentArgs) -> None:
    """Export the arguments, and give each process a compilation cache of its own.

    The thread counts are for CUDA runs, where the CPU only feeds the device; on the CPU
    they would leave all cores but one idle, and what the user exported stays.
    """
    triton_cache = tempfile.mkdtemp(prefix="triton_")
    atexit.register(shutil.rmtree, triton_cache, ignore_errors=True)
    wanted = {**asdict(env_args), "TRITON_CACHE_DIR": triton_cache}
    if not torch.cuda.is_available():
        del wanted["OMP_NUM_THREADS"], wanted["MKL_NUM_THREADS"]
    changed = {name: str(v) for name, v in wanted.items() if os.environ.get(name) != str(v)}
    if changed:
        logger.info("environment: %s", " ".join(f"{k}={v}" for k, v in changed.items()))
    os.environ.update(changed)


def setup_torch_distributed(dist_args: DistributedArgs) -> None:
    """Choose the device, join the process group, set torch's global flags.

    May be called again: what is set up already stays.
    """
    if get_start_method(allow_none=True) != dist_args.spawn_method:
        set_start_method(dist_args.spawn_method, force=True)
    torch.backends.cuda.matmul.allow_tf32 = dist_args.matmul_allow_tf32
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = (
        dist_args.allow_bf16_reduced_precision_reduction
    )
    device = get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    init_process_group(device)
    torch.autograd.set_detect_anomaly(dist_args.detect_anomaly)


def init_process_group(device: torch.device) -> None:
    """Join the group of all processes; one process alone needs no port."""
    if dist.is_initialized():
        return
    rank, world_size = get_global_rank(), get_world_size()
    logger.info("process %d of %d on %s", rank, world_size, device)
    timeout = get_timeout()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    # Only a single CUDA device may be named here, and gloo has none.
    device_id = device if device.type == "cuda" else None
    if world_size == 1:
        dist.init_process_group(
            backend, store=dist.HashStore(), rank=0, world_size=1, device_id=device_id
        )
        return
    os.environ["RANK"] = str(rank)
    os.environ["WORLD_SIZE"] = str(world_size)
    os.environ["MASTER_ADDR"] = get_master_addr()
    os.environ["MASTER_PORT"] = str(get_master_port(int(os.environ.get("SLURM_JOB_ID", -1))))
    where = {"init_method": "env://"}
    if is_torchruns():
        store = store_of_this_start(rank, world_size, timeout)
        where = {"store": store, "rank": rank, "world_size": world_size}
    dist.init_process_group(backend, **where, timeout=timeout, device_id=device_id)


def _group(mesh: DeviceMesh | None):
    return mesh.get_group() if mesh is not None else None


def _reduce(x: float | int | list | Tensor, op, mesh: DeviceMesh | None) -> Tensor:
    """All processes' x, reduced; integers stay integers, floats become float64."""
    tensor = torch.as_tensor(x if isinstance(x, Tensor) else numpy.asarray(x)).detach()
    dtype = torch.float64 if tensor.is_floating_point() else torch.int64
    tensor = tensor.to(get_device(), dtype, copy=True)
    if dist.is_initialized():
        dist.all_reduce(tensor, op=op, group=_group(mesh))
    return tensor


def dist_max(x: float | int | list | Tensor, mesh: DeviceMesh | None = None) -> Tensor:
    """The largest over all processes, element by element."""
    return _reduce(x, ReduceOp.MAX, mesh)


def dist_sum(x: float | int | list | Tensor, mesh: DeviceMesh | None = None) -> Tensor:
    """The sum over all processes, element by element."""
    return _reduce(x, ReduceOp.SUM, mesh)


def dist_mean(x: float | int | list | Tensor, mesh: DeviceMesh | None = None) -> Tensor:
    """The mean over all processes, element by element. (gloo has no average.)"""
    total = _reduce(x, ReduceOp.SUM, mesh).double()
    size = dist.get_world_size(_group(mesh)) if dist.is_initialized() else 1
    return total / size


def dist_mean_dict(x: dict) -> dict:
    """`dist_mean` of every value; a float stays a float, a list a list."""
    means = {}
    for key, value in x.items():
        mean = dist_mean(value)
        means[key] = mean.item() if mean.dim() == 0 else mean.tolist()
    return means


def init_signal_handler(callable: Callable) -> None:
    """Have `callable(signum, frame)` called on SIGUSR2, SLURM's warning in our scripts."""
    signal.signal(signal.SIGUSR2, callable)


def requeue_slurm_job() -> None:
    """Ask SLURM to run this job again, where there is one, and end this process.

    With status 1 where SLURM does not take it: a job that ends with 0 is done.
    """
    asks = _requeue.is_slurm_job() and get_is_master() and os.environ.get("LAUNCH_WITH") != "DORA"
    sys.exit(0 if not asks or _requeue.requeue() else 1)


_LAUNCH_PREFIXES = ("SLURM_", "SLURMD_", "SRUN_", "SBATCH_", "SUBMITIT_", "WANDB_")
_LAUNCH_NAMES = {
    "MASTER_ADDR",
    "MASTER_PORT",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "TORCHELASTIC_RUN_ID",
    "DORA_FORCE_DISTRIB",
}


@contextlib.contextmanager
def clean_env() -> Iterator[None]:
    """Within it, the environment names no job and no rank, so that another can be started."""
    hidden = {
        name: os.environ.pop(name)
        for name in list(os.environ)
        if name.startswith(_LAUNCH_PREFIXES) or name in _LAUNCH_NAMES
    }
    try:
        yield
    finally:
        os.environ.update(hidden)


def validate_distributed_args(args: DistributedArgs, world_size: int) -> None:
    """Fill in dp_replicate where the product does not fit, and refuse what cannot run."""
    if args.spawn_method not in SPAWN_METHODS:
        raise ConfigError(
            f"distributed.spawn_method={args.spawn_method!r} is not known: choose one of"
            f" {', '.join(SPAWN_METHODS)}"
        )
    check_parallelism(args)
    if args.dp_shard < 1 or world_size % args.dp_shard != 0:
        raise ConfigError(
            f"distributed.dp_shard={args.dp_shard} does not divide the {world_size} processes:"
            " give a divisor"
        )
    if args.dp_replicate * args.dp_shard != world_size:
        args.dp_replicate = world_size // args.dp_shard
        logger.info(
            "distributed.dp_replicate set to %d: %d processes, %d a copy of the weights",
            args.dp_replicate, world_size, args.dp_shard,
        )  # fmt: skip


__all__ = [
    "DistributedArgs",
    "EnvironmentArgs",
    "check_model_value_range",
    "clean_env",
    "default_fsdp_grouping_plan",
    "dist_max",
    "dist_mean",
    "dist_mean_dict",
    "dist_sum",
    "get_default_policy",
    "get_device",
    "get_device_mesh",
    "get_global_rank",
    "get_is_master",
    "get_is_slurm_job",
    "get_is_torch_run",
    "get_local_rank",
    "get_master_addr",
    "get_master_port",
    "get_module",
    "get_world_size",
    "init_process_group",
    "init_signal_handler",
    "parallelize_model",
    "requeue_slurm_job",
    "set_module",
    "setup_env",
    "setup_torch_distributed",
    "validate_distributed_args",
]
