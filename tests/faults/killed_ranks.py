"""Trains a tiny run in two processes again and again, loses one each time, and compares.

    python -m tests.faults.killed_ranks CORPUS OUT LOSSES SEED

The first loss is a process that is stopped (SIGSTOP); the others are kills, of one process or of
both, when it touches a file of the dump_dir for the n-th time (so also within a save) or after a
time. Whoever is left must end by itself, with one line. After each loss the same command goes on,
and may lose a process again. Prints one JSON object: see `Tally`.

The processes are forked from this one, which has imported everything and computed nothing.
"""

import gc
import json
import os
import random
import shutil
import signal
import socket
import sys
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from apps.topk import cli
from apps.topk.train import train
from tests.apps.killed_runs import OVERRIDES, STEPS, Killer, differences, forked, records
from tests.apps.tiny import train_args

TIMEOUT = 8  # seconds that a process waits for the other
LATEST = 300  # seconds after which one that is left counts as hanging
LINE = "error: another process of this run has ended or cannot be reached"


@dataclass
class Loss:
    """Which ranks a pair loses: at a touch of their files, or some seconds after the start."""

    ranks: tuple[int, ...]
    touch: int | None = None
    seconds: float | None = None
    number: int = signal.SIGKILL

    def __str__(self) -> str:
        when = f"touch {self.touch}" if self.touch else f"{self.seconds:.2f} s"
        return f"{signal.Signals(self.number).name} of {list(self.ranks)} at {when}"


@dataclass
class Tally:
    """lost: how. left: how many ended by the line, after `longest` seconds at most."""

    lost: list[str] = field(default_factory=list)
    within_a_save: int = 0
    left: int = 0
    longest: float = 0.0
    wrong: list[str] = field(default_factory=list)  # what did not end as it should
    differing: dict[str, list[str]] = field(default_factory=dict)  # from the run that lost none


class Pair:
    """Two processes of one run, under way."""

    def __init__(self, corpus: Path, folder: Path, loss: Loss | None, report: int | None = None):
        self.folder, self.loss, self.report = folder, loss, report
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.pids = [
            forked(partial(self._train, corpus, rank), self.errors(rank)) for rank in range(2)
        ]

    def _train(self, corpus: Path, rank: int) -> None:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.port),
            "LINGUA_TOPK_TIMEOUT": str(TIMEOUT),
        }  # fmt: skip
        loss = self.loss if self.loss is not None and rank in self.loss.ranks else None
        killer = Killer(self.folder, loss and loss.touch, loss.number if loss else 0)
        sys.addaudithook(killer)
        cli.run(lambda: train(train_args(corpus, self.folder, *OVERRIDES)))
        if self.report is not None:
            os.write(self.report, f"{rank} {killer.seen}\n".encode())

    def errors(self, rank: int) -> Path:
        return self.folder.with_suffix(f".{rank}.err")

    def wait(self) -> tuple[dict[int, int], float]:
        """Statuses by rank, and the seconds between the loss and the end of who was left.

        A rank that was stopped is killed once the other has ended; so is one that hangs.
        """
        began, lost_at, statuses = time.monotonic(), None, {}
        stopped = self.loss is not None and self.loss.number == signal.SIGSTOP
        while len(statuses) < 2:
            now = time.monotonic()
            if lost_at is None and self._is_due(now - began, statuses):
                lost_at = now
            if (stopped and statuses) or now - (lost_at or began) > LATEST:
                self._signal(signal.SIGKILL, statuses)
            for rank, pid in enumerate(self.pids):
                if rank in statuses:
                    continue
                changed, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
                lost_at = lost_at or (now if changed else None)
                if changed and not os.WIFSTOPPED(status):
                    statuses[rank] = os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        return statuses, now - lost_at

    def _is_due(self, elapsed: float, statuses: dict[int, int]) -> bool:
        """Whether the time of the loss has come; then it is done."""
        if self.loss is None or self.loss.seconds is None or elapsed < self.loss.seconds:
            return False
        self._signal(self.loss.number, statuses, self.loss.ranks)
        return True

    def _signal(self, number: int, statuses: dict[int, int], ranks=(0, 1)) -> None:
        for rank in ranks:
            if rank not in statuses:
                os.kill(self.pids[rank], number)


def draw_loss(draw: random.Random, touches: dict[int, int], seconds: float) -> Loss:
    ranks = draw.choice(((0,), (1,), (0, 1)))
    if len(ranks) == 2 or draw.random() < 0.3:
        return Loss(ranks, seconds=draw.uniform(0, seconds))
    return Loss(ranks, touch=draw.randint(1, touches[ranks[0]]))


def lose(corpus: Path, folder: Path, loss: Loss, tally: Tally) -> bool:
    """Start the pair and lose; False where it came to its end before."""
    pair = Pair(corpus, folder, loss)
    statuses, seconds = pair.wait()
    lost = [rank for rank, status in statuses.items() if status == -signal.SIGKILL]
    if not lost:
        tally.wrong += [f"{loss}: {statuses}"] if any(statuses.values()) else []
        return False
    tally.lost.append(str(loss))
    tally.within_a_save += any((folder / "checkpoints").glob(".partial_*"))
    for rank in {0, 1} - set(lost):
        lines = pair.errors(rank).read_text(encoding="utf-8").splitlines()
        said = [line for line in lines if line.startswith("error: ")]
        if statuses[rank] == 0 and not said:
            continue  # it had done its part before
        tally.left, tally.longest = tally.left + 1, max(tally.longest, round(seconds, 2))
        if statuses[rank] != 1 or len(said) != 1 or not said[0].startswith(LINE):
            tally.wrong.append(f"{loss}: rank {rank}: {statuses[rank]}: {lines[-30:]}")
    return True


def finish(corpus: Path, folder: Path, report: int | None = None) -> None:
    """Go on to the end."""
    pair = Pair(corpus, folder, None, report)
    statuses, _ = pair.wait()
    if any(statuses.values()):
        said = [pair.errors(rank).read_text(encoding="utf-8")[-3000:] for rank in range(2)]
        raise RuntimeError(f"{statuses}: {said}")


def both_states(folder: Path) -> dict:
    """Those of `killed_runs`, and where the other process was in the data."""
    last = folder / "checkpoints" / f"{STEPS:010d}" / "train_state_00001.json"
    return {**records(folder), "state of the other": json.loads(last.read_text(encoding="utf-8"))}


def main(corpus: Path, out: Path, losses: int, seed: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    gc.freeze()  # a collection of garbage in a run need not look at what is imported
    reader, writer = os.pipe()
    began = time.monotonic()
    finish(corpus, out / "whole", writer)
    seconds = time.monotonic() - began
    lines = os.read(reader, 99).decode().splitlines()
    touches = {int(rank): int(n) for rank, n in map(str.split, lines)}
    draw, tally = random.Random(seed), Tally()
    while len(tally.lost) < losses:
        folder = out / str(len(tally.lost))
        loss = draw_loss(draw, touches, seconds)
        if not tally.lost:
            loss = Loss((1,), touch=touches[1] // 2, number=signal.SIGSTOP)
        while lose(corpus, folder, loss, tally) and draw.random() < 0.4:
            loss = draw_loss(draw, touches, seconds)
        finish(corpus, folder)
        print(f"{len(tally.lost)} lost: {tally.lost[-1:]}", file=sys.stderr, flush=True)
        names = differences(both_states(folder), both_states(out / "whole"))
        if names:
            tally.differing[folder.name] = names
        else:
            shutil.rmtree(folder)
    print(json.dumps({"touches": touches, **asdict(tally)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
