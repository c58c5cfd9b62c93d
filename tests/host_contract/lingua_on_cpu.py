#!/usr/bin/env python
"""Run a module's main() with Meta Lingua's CUDA and NCCL calls answered by the CPU and gloo.

Lingua's own training loop is hard-wired to CUDA. For integration tests on a
machine without a GPU this launcher stands in for the few calls it makes, and
changes nothing of Lingua itself:

    LINGUA_HOME=/path/to/lingua python lingua_on_cpu.py -m apps.topk.train config=... [...]
    LINGUA_HOME=... torchrun --nproc-per-node 2 lingua_on_cpu.py -m apps.topk.train config=...

Run it from the root of the project whose module is meant (or of the checkout, for
`-m apps.main.train`). Settings that suit it: distributed.model_dtype=fp32,
distributed.compile=false, data.load_async=false, profiling.run=false,
logging.wandb=null, and no in-training evaluation with lm-eval >= 0.4.12.
Speeds, memory figures and anything numeric about devices are meaningless here.
"""

import contextlib
import importlib
import os
import sys
import time
import types

import torch
import torch.distributed as dist
import torch.distributed.device_mesh as device_mesh


class _Event:
    def __init__(self, **_):
        self.at = 0.0

    def record(self):
        self.at = time.time()

    def elapsed_time(self, other):
        return (other.at - self.at) * 1e3


def _stand_in():
    with contextlib.suppress(RuntimeError):  # already there on builds with flash attention
        torch.library.define("xformers_flash::flash_fwd", "(Tensor x) -> Tensor")
    torch.Tensor.cuda = lambda self, *a, **k: self
    torch.nn.Module.cuda = lambda self, *a, **k: self
    to_empty = torch.nn.Module.to_empty
    torch.nn.Module.to_empty = lambda self, *, device, recurse=True: to_empty(
        self, device="cpu", recurse=recurse
    )
    torch.random.fork_rng = lambda *a, **k: contextlib.nullcontext()

    cuda = torch.cuda
    cuda.Event = _Event
    cuda.current_device = lambda: 0
    cuda.device_count = lambda: 1
    cuda.get_device_name = lambda *a: "cpu stand-in"
    cuda.get_device_properties = lambda *a: types.SimpleNamespace(total_memory=1 << 34)
    cuda.memory_stats = lambda *a: {
        "active_bytes.all.peak": 0,
        "reserved_bytes.all.peak": 0,
        "num_alloc_retries": 0,
        "num_ooms": 0,
    }
    cuda.power_draw = lambda *a: 0
    for name in (
        "synchronize",
        "reset_peak_memory_stats",
        "reset_accumulated_memory_stats",
        "empty_cache",
        "set_device",
    ):
        setattr(cuda, name, lambda *a, **k: None)

    init = dist.init_process_group
    dist.init_process_group = lambda *a, **k: init(*a, **{**k, "backend": "gloo"})
    mesh = device_mesh.init_device_mesh
    device_mesh.init_device_mesh = lambda _device, *a, **k: mesh("cpu", *a, **k)
    all_reduce = dist.all_reduce

    def averaging(tensor, op=dist.ReduceOp.SUM, group=None, async_op=False):
        if op != dist.ReduceOp.AVG:  # gloo knows no average
            return all_reduce(tensor, op=op, group=group, async_op=async_op)
        all_reduce(tensor, op=dist.ReduceOp.SUM, group=group)
        tensor /= dist.get_world_size(group)

    dist.all_reduce = averaging


def _find_lingua():
    # A checkout for this file alone, where LINGUA_HOME itself is what is tested.
    home = os.environ.get("LINGUA_ON_CPU") or os.environ.get("LINGUA_HOME") or os.getcwd()
    if not os.path.isfile(os.path.join(home, "lingua", "transformer.py")):
        sys.exit(f"LINGUA_HOME={home!r} is not a checkout of facebookresearch/lingua")
    sys.path[0] = os.getcwd()
    if home not in sys.path:
        sys.path.append(home)


# At the top level on purpose: Lingua's worker processes import this file again.
_find_lingua()
_stand_in()

if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] != "-m":
        sys.exit(__doc__)
    name, sys.argv = sys.argv[2], sys.argv[2:]
    importlib.import_module(name).main()
