"""Trains with the global batches of a fixed stream, whatever the number of processes.

    torchrun --nproc-per-node N -m tests.apps.fixed_batches ROOT OUT

The loader's own order depends on the number of processes; here process r of n gets rows
r * B / n and on of batch number t. Writes the losses and the final weights of every case
to OUT/<case>.<number of processes>.pt.
"""

import json
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from apps.topk.seam import install
from lingua.checkpoint import read_model
from lingua.distributed import get_global_rank, get_world_size
from tests.apps.tiny import read_metrics, train_args

GLOBAL_BATCH, SEQ_LEN, STEPS = 4, 32, 20
COMMON = [f"steps={STEPS}", "model.topk.dead_window=256", "eval.validation.context=8"]
CASES = {
    "topk-fp64": ["distributed.model_dtype=fp64"],
    "topk-fp32": [],
    "vanilla-fp32": ["model.topk=null"],
    "accumulated-fp64": ["distributed.model_dtype=fp64", "grad_acc_steps=2"],
}


def fixed_stream(rank, size, micro_batches):
    """Batches [B, S, 2] of text-like tokens, and a state that is not used."""
    generator = torch.Generator().manual_seed(11)
    steps = torch.randint(1, 4, (64, SEQ_LEN + 1), generator=generator).cumsum(1) % 40 + 60
    rows = GLOBAL_BATCH // size // micro_batches
    t = 0
    while True:
        order = torch.randperm(64, generator=torch.Generator().manual_seed(t))[:GLOBAL_BATCH]
        batch = torch.stack((steps[order, :-1], steps[order, 1:]), dim=-1)
        for part in range(micro_batches):
            first = (part * size + rank) * rows
            yield batch[first : first + rows].numpy(), {}
        t += 1


def train_all(root, out):
    rank, size = get_global_rank(), get_world_size()
    for case, overrides in CASES.items():
        args = train_args(root, out / f"{case}.{size}", *COMMON, *overrides)
        args.data.batch_size = GLOBAL_BATCH // size // args.grad_acc_steps

        @contextmanager
        def loader(data_args, state=None, accumulate=args.grad_acc_steps):
            yield fixed_stream(rank, size, accumulate)

        with install(args) as train_module:
            original = train_module.build_dataloader_from_args
            train_module.build_dataloader_from_args = loader
            try:
                train_module.train(args)
            finally:
                train_module.build_dataloader_from_args = original
        if rank == 0:
            metrics = read_metrics(Path(args.dump_dir))
            validation = Path(args.dump_dir, "evals", f"{STEPS:010d}", "validation.json")
            weights = read_model(Path(args.dump_dir, "checkpoints", f"{STEPS:010d}"))
            torch.save(
                {
                    "metrics": metrics,
                    "weights": weights,
                    "validation": json.loads(validation.read_text(encoding="utf-8"))["text"],
                },
                out / f"{case}.{size}.pt",
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    train_all(*map(Path, sys.argv[1:]))
