"""What an evaluation's job runs: apps.topk.eval on the last checkpoint of a run that is done.

    python -m apps.topk.submission.evaluate config=FILE

The config is one of apps.topk.eval, but for ckpt_dir, which is the run's dump_dir.
"""

import signal
import sys
from pathlib import Path

from apps.topk import cli, eval
from apps.topk.submission.finished import finished_checkpoint
from lingua_topk.errors import ConfigError


def main() -> None:
    """The command line; a user's mistake, or a run that is not done, ends it with status 2."""
    # SLURM's warning before the time limit is for training; an evaluation goes on to it, and
    # repeats one task at most when it is started again.
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    cli.run(_name_checkpoint)
    eval.main()


def _name_checkpoint() -> None:
    words = cli.dot_list(sys.argv[1:])
    if "config" not in words:
        raise ConfigError("config=FILE is missing: give the base_config.yaml of an evaluation")
    run = cli.read_yaml(str(words.config)).get("ckpt_dir")
    sys.argv.append(f"ckpt_dir={finished_checkpoint(Path(str(run)))}")


if __name__ == "__main__":
    main()
