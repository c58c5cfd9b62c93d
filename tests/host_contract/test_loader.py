"""The batches of the embedded host are those of Meta Lingua, from files to the shuffled window.

Where the number of processes is a multiple of the number of files; otherwise Lingua drops
files. The checkout runs unchanged in a process of its own, but for the order of its files,
which it takes from the file system.
"""

import base64
import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from apps.topk.corpus.tokenizer import train_tokenizer
from lingua.data import build_dataloader, init_state

pytestmark = pytest.mark.skipif(
    not os.environ.get("LINGUA_HOME"), reason="LINGUA_HOME names no checkout of Meta Lingua"
)

# Reads [{"arguments": ..., "state": ..., "n": ...}]; writes the batches and states of each.
PROGRAM = """
import itertools, json, pathlib, sys
import numpy as np
from lingua.data import build_dataloader, init_state

glob = pathlib.Path.glob
pathlib.Path.glob = lambda *arguments: iter(sorted(glob(*arguments)))
folder = pathlib.Path(sys.argv[1])
states = []
for number, job in enumerate(json.loads((folder / "jobs.json").read_text())):
    state = job["state"] or init_state(**job["arguments"])
    with build_dataloader(state) as loader:
        taken = list(itertools.islice(loader, job["n"]))
    np.save(folder / f"{number}.npy", np.stack([batch for batch, _ in taken]))
    states.append([state for _, state in taken])
(folder / "states.json").write_text(json.dumps(states))
"""
N_BATCHES = 150  # more than an epoch
# (files, processes, views, sequence length, batch size, window, tokenizer)
CASES = [
    (1, 1, 2, 16, 3, 4, "bytes"),
    (3, 3, 2, 24, 2, 5, "bytes"),
    (2, 6, 2, 7, 4, 1, "bytes"),
    (2, 4, 3, 16, 1, 6, "bytes"),
    (1, 2, 4, 5, 3, 3, "bytes"),
    (2, 2, 2, 16, 3, 4, "sp"),
    (1, 3, 2, 16, 3, 4, "tiktoken"),
]


def theirs(jobs: list[dict], folder: Path) -> tuple[list[np.ndarray], list[list[dict]]]:
    folder.mkdir()
    (folder / "jobs.json").write_text(json.dumps(jobs))
    home = str(Path(os.environ["LINGUA_HOME"]).resolve())
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": home, "PYTHONUTF8": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    batches = [np.load(folder / f"{number}.npy") for number in range(len(jobs))]
    return batches, json.loads((folder / "states.json").read_text())


def ours(state: dict, n: int) -> tuple[np.ndarray, list[dict]]:
    with build_dataloader(state) as loader:
        taken = list(islice(loader, n))
    return np.stack([batch for batch, _ in taken]), [after for _, after in taken]


def write_source(folder: Path, n_files: int) -> None:
    folder.mkdir(parents=True)
    for number in range(n_files):
        with open(folder / f"c.chunk.{number:02d}.jsonl", "w", encoding="utf-8") as file:
            for i in range(23 - number):
                text = f"{folder.name} {number}.{i} naïve 漢字 " + "tide " * (i * i % 19)
                key = "content" if i % 5 == 0 else "text"
                document = {"id": i, key: "" if i == 3 else text}
                file.write(json.dumps(document, ensure_ascii=i % 2 == 0) + "\n")


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> list[dict]:
    """What `init_state` takes, for every case and every process of it."""
    root = tmp_path_factory.mktemp("corpora")
    (root / "sp").write_bytes(train_tokenizer(["tide naïve sea land content text"] * 3, 285))
    tokens = [*(bytes([byte]) for byte in range(256)), b"ti", b"de", b"tide"]
    ranks = [b"%s %d\n" % (base64.b64encode(token), i) for i, token in enumerate(tokens)]
    (root / "tiktoken").write_bytes(b"".join(ranks))
    found = []
    for number, (files, world_size, n_views, seq_len, batch, window, tokenizer) in enumerate(CASES):
        for source in ("sea", "land"):
            write_source(root / str(number) / source, files)
        found += [
            {
                "root_dir": str(root / str(number)),
                "sources": {"sea": 3.0, "land": 1.5},
                "batch_size": batch,
                "prefetch_size": window,
                "seq_len": seq_len,
                "n_views": n_views,
                "seed": 5 + number,
                "rank": rank,
                "world_size": world_size,
                "add_bos": number != 1,
                "add_eos": True,
                "tokenizer_name": tokenizer,
                "tokenizer_path": None if tokenizer == "bytes" else str(root / tokenizer),
            }
            for rank in range(world_size)
        ]
    return found


def test_batches_are_those_of_lingua(arguments, tmp_path):
    jobs = [{"arguments": a, "state": None, "n": N_BATCHES} for a in arguments]
    expected, _ = theirs(jobs, tmp_path / "lingua")
    for given, batches in zip(arguments, expected, strict=True):
        found, states = ours(init_state(**given), N_BATCHES)
        assert found.dtype == batches.dtype
        assert np.array_equal(found, batches), given
        sources = states[-1]["it_state"]["it_state"]["it_state"]["source_to_state"]
        assert sources["sea"]["current_iter"] > 0, "too short a test: no epoch ended"


def test_each_host_goes_on_from_a_state_of_the_other(arguments, tmp_path):
    """With two views; with more Lingua resumes wrongly even from its own."""
    chosen = [a for a in arguments if a["n_views"] == 2 and a["rank"] == a["world_size"] - 1]
    starts = [{"arguments": a, "state": None, "n": N_BATCHES} for a in chosen]
    expected, their_states = theirs(starts, tmp_path / "lingua")
    jobs, rest = [], []
    for given, batches, states in zip(chosen, expected, their_states, strict=True):
        _, our_states = ours(init_state(**given), N_BATCHES)
        for i in (0, 1, 2, 3, 17):
            found, _ = ours(states[i], 30)
            assert np.array_equal(found, batches[i + 1 : i + 31])
            jobs.append({"arguments": None, "state": our_states[i], "n": 30})
            rest.append(batches[i + 1 : i + 31])
    resumed, _ = theirs(jobs, tmp_path / "resumed")
    assert all(np.array_equal(a, b) for a, b in zip(resumed, rest, strict=True))
