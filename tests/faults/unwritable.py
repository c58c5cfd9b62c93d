"""What becomes of all processes where one of them cannot write a file.

    python -m tests.faults.unwritable CORPUS OUT       (a rank of several)

Writes OUT/RANK.json: {what could not be written: [exit status, what was said]}.
"""

import errno
import json
import os
import sys
from pathlib import Path
from unittest import mock

import torch.distributed as dist

from apps.main import _folders
from apps.topk.train import train
from lingua import _manifest, checkpoint
from lingua._writer import Writer
from lingua.errors import UserError
from tests.apps.tiny import train_args
from tests.faults.runs import SETTINGS

RANK = int(os.environ["RANK"])


def no_room(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def on(target, name, is_it, rank=0):
    """Patched, in one process, so that calls for which `is_it` fail."""
    original = getattr(target, name)

    def attempt(*args, **kwargs):
        if rank == RANK and is_it(*args):
            no_room()
        return original(*args, **kwargs)

    return mock.patch.object(target, name, attempt)


def of_last(name):
    return lambda path, *_: "0000000004" in str(path) and Path(path).name.startswith(name)


CASES = {
    "config": on(_folders, "dump_config", lambda *_: True),
    "folder": on(Path, "mkdir", of_last(".partial")),
    "weights": on(Writer, "write_data", lambda writer, *_: "0000000004" in str(writer.path)),
    "params": on(checkpoint, "_write_json", of_last("params")),
    "state": on(checkpoint, "_write_json", of_last("train_state"), rank=1),
    "checksum": on(_manifest, "_sha256", of_last(""), rank=1),
    "manifest": on(checkpoint, "_write_json", of_last("manifest")),
    "renaming": on(Path, "rename", of_last(".partial")),
}


def main(corpus, out):
    ended = {}
    for name, patch in CASES.items():
        folder = out / name
        if RANK == 0:
            (folder / "checkpoints").mkdir(parents=True)
        # One group for all runs: to make it again on the same port is a race.
        with patch, mock.patch.object(dist, "destroy_process_group"):
            try:
                train(train_args(corpus, folder, *SETTINGS))
                ended[name] = [0, ""]
            except UserError as error:
                ended[name] = [error.exit_status, str(error)]
    (out / f"{RANK}.json").write_text(json.dumps(ended), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
