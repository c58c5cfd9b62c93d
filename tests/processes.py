"""Several processes of a program, as torchrun starts them, that need not import torch first.

They are forked from a process that has imported what training and evaluation import and has
computed nothing. To import it takes each process of torchrun, and torchrun itself, seconds; what
torchrun does with its processes is tested where it is started.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IMPORTED = (
    "apps.main.train", "apps.topk.checkpoint", "torch._dynamo", "torch.distributed.checkpoint",
    "torch.distributed.fsdp", "torch.profiler",
)  # fmt: skip
SECONDS = 300


def run(
    count: int, module: str, *arguments: object, imported: Iterable[str] = ()
) -> subprocess.CompletedProcess:
    """`count` processes of `python -m module arguments`, to their end; one alone is in no group.

    The status is that of the first that failed, upon which the others are terminated, else 0;
    stdout and stderr are those of all, one rank after the other. imported: what is imported before
    they are forked, besides the usual.
    """
    words = [module, *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        files = {
            name: [Path(folder, f"{rank}.{name}") for rank in range(count)]
            for name in ("out", "err")
        }
        for file in (*files["out"], *files["err"]):
            file.touch()  # one may be ended before it has opened its own
        status = _ask({"count": count, "words": words, "out": folder, "imported": [*imported]})
        stdout, stderr = (
            "".join(file.read_text("utf-8") for file in files[name]) for name in ("out", "err")
        )
    return subprocess.CompletedProcess(words, status, stdout, stderr)


def results(count: int, module: str, folder: Path) -> list[dict]:
    """What each process of a module, given the folder, saved there as RANK.pt; none may fail."""
    import torch

    done = run(count, module, folder)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt") for rank in range(count)]


def _ask(request: dict) -> int:
    server = _server()
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    is_done = select.select([server.stdout], [], [], SECONDS)[0]
    answer = server.stdout.readline() if is_done else ""
    if not answer:
        os.killpg(server.pid, signal.SIGKILL)
        _server.cache_clear()
        raise RuntimeError(f"{request['words']}: no answer, at the latest after {SECONDS} s")
    return int(answer)


@cache
def _server() -> subprocess.Popen:
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.processes"],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True, start_new_session=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    atexit.register(server.kill)
    return server


def _serve() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        for name in (*IMPORTED, *request["imported"]):
            importlib.import_module(name)
        gc.freeze()  # a collection of garbage in a child need not look at them
        print(_run(request["count"], request["words"], request["out"]), flush=True)


def _run(count: int, words: Sequence[str], out: str) -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = {_fork(rank, count, port, words, out) for rank in range(count)}
    status = 0
    while running:
        pid, ended = os.wait()
        running.discard(pid)
        if os.waitstatus_to_exitcode(ended) and not status:
            status = os.waitstatus_to_exitcode(ended)
            for other in running:
                os.kill(other, signal.SIGTERM)
    return status


def _fork(rank: int, count: int, port: int, words: Sequence[str], out: str) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        _redirect(rank, out)
        if count > 1:
            os.environ |= _environment(rank, count, port)
        sys.argv = list(words)
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _redirect(rank: int, out: str) -> None:
    """Nothing to read, and what is printed goes to files."""
    for descriptor, path in enumerate((os.devnull, f"{out}/{rank}.out", f"{out}/{rank}.err")):
        opened = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 (of the server, with lines that it has read)


def _environment(rank: int, count: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip


if __name__ == "__main__":
    _serve()
