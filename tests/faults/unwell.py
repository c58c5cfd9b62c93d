"""A part of the gradient that is infinite in one process of several.

    python -m tests.faults.unwell CORPUS OUT       (a rank of several)

Writes OUT/RANK.json: {choice of nonfinite: [exit status, the steps left out, checkpoints]}.
"""

import json
import os
import sys
from pathlib import Path
from unittest import mock

import torch.distributed as dist
from torch import nn

from apps.topk.nonfinite import NonFiniteError
from apps.topk.train import train
from tests.apps.tiny import train_args
from tests.faults.runs import SETTINGS, checkpoints

RANK = int(os.environ["RANK"])
CHOICES = {
    "stop": ["distributed.dp_shard=2"],
    "skip": ["distributed.dp_shard=2"],
    "skip-replicated": ["distributed.dp_shard=1", "distributed.fsdp_type=no_shard"],
}


def main(corpus, out):
    ended = {}
    for name, settings in CHOICES.items():
        folder, calls, clip = out / name, [], nn.utils.clip_grad_norm_

        def harm(parameters, *args, calls=calls, clip=clip, **kwargs):
            parameters = list(parameters)
            calls.append(None)
            if len(calls) == 3 and RANK == 1:
                parameters[-1].grad.to_local().fill_(float("inf"))
            return clip(parameters, *args, **kwargs)

        changes = [*settings, f"nonfinite={name.partition('-')[0]}"]
        with (
            mock.patch.object(nn.utils, "clip_grad_norm_", harm),
            # One group for all runs: to make it again on the same port is a race.
            mock.patch.object(dist, "destroy_process_group"),
        ):
            try:
                train(train_args(corpus, folder, *SETTINGS, *changes))
                status = 0
            except NonFiniteError as error:
                status = error.exit_status
        ended[name] = [status, _skipped(folder), checkpoints(folder)]
    (out / f"{RANK}.json").write_text(json.dumps(ended), encoding="utf-8")


def _skipped(folder):
    path = folder / f"checkpoints/0000000004/train_state_{RANK:05d}.json"
    if not path.exists():
        return None
    state = json.loads(path.read_text(encoding="utf-8"))
    return state["scheduler"].get("nonfinite")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
