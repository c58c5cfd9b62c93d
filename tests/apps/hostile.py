"""What the rows of test_hostile are made of: inputs that are whole, and ways to harm them."""

import gc
import json
import logging
import os
import pickle
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import sentencepiece
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

import apps.main.train as host_train
from apps.topk import cli, eval, plan, prepare, quickstart, train
from lingua import stool
from lingua._manifest import describe_files
from lingua.checkpoint import consolidate_checkpoints, read_model
from tests.apps.tiny import CONFIG, SENTENCES, train_args, write_corpus

ROOT = Path(__file__).resolve().parents[2]
NEWEST = "run/checkpoints/0000000004"
OLDEST = "run/checkpoints/0000000002"
PLAIN = "plain/checkpoints/0000000001"
WIDE = "wide/checkpoints/0000000001"
# A file that code hidden in an input would make: see `Payload`.
MARK = "executed"

Harm = Callable[[Path], None]
PROGRAMS = {
    "train": (train.main, ["config=config.yaml", "dump_dir=new", "steps=3"]),
    "eval": (eval.main, ["config=eval.yaml", f"ckpt_dir={NEWEST}", "dump_dir=new"]),
    "plan": (plan.main, ["config=config.yaml"]),
    "quickstart": (quickstart.main, []),
    "host": (host_train.main, ["config=plain.yaml", "dump_dir=new", "steps=3"]),
    "stool": (stool.main, ["config=job.yaml", "dry_run=true", "nodes=1"]),
    "prepare": (prepare.main, []),
}
MODULES = {
    "train": "apps.topk.train", "eval": "apps.topk.eval", "plan": "apps.topk.plan",
    "quickstart": "apps.topk.quickstart", "host": "apps.main.train", "stool": "lingua.stool",
    "prepare": "apps.topk.prepare",
}  # fmt: skip


@dataclass
class Row:
    """One hostile input, and the answer to it.

    `words` follow the program's usual ones; a first word "only" leaves those out. `writes` is
    what a run has begun to write before it can know: a path, or a folder with all in it ("new/").
    """

    name: str
    program: str
    words: list[str]
    says: tuple[str, ...]
    harm: Harm | None = None
    error: str = "ConfigError"
    writes: tuple[str, ...] = field(default=())

    def argv(self) -> list[str]:
        if self.words[:1] == ["only"]:
            return self.words[1:]
        return [*PROGRAMS[self.program][1], *self.words]


def build(root: Path) -> None:
    """Everything whole, in the working directory: text, configs, tokenizers, three runs."""
    write_corpus(root)
    base = f"name: tiny\n{CONFIG}".replace("data:\n", "data:\n  root_dir: .\n")
    plain = base.replace("  topk: {k: 4, n_last_nontopk: 1, anneal_ratio: 0.5}\n", "")
    assert plain != base
    (root / "config.yaml").write_text(base, encoding="utf-8")
    (root / "plain.yaml").write_text(plain, encoding="utf-8")
    (root / "job.yaml").write_text(f"dump_dir: new\n{base}", encoding="utf-8")
    (root / "eval.yaml").write_text("validation: {window: 16, context: 8}\n", encoding="utf-8")
    shutil.copytree(ROOT / "configs", root / "configs")
    _tokenizers(root)
    for name, changes in (
        ("run", ["steps=4", "checkpoint.dump.every=2"]),
        ("plain", ["steps=1", "model.topk=null"]),
        ("wide", ["steps=1", "model.dim=64"]),
    ):
        with undisturbed():
            train.train(train_args(Path("."), Path(name), *changes))
    consolidate_checkpoints(PLAIN)


def _tokenizers(root: Path) -> None:
    folder = root / "tokenizers"
    folder.mkdir()
    text = folder / "text"
    text.write_text("\n".join(SENTENCES * 20), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "sp"), vocab_size=300, model_type="bpe",
        byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (folder / "sp.vocab").unlink()


@contextmanager
def undisturbed() -> Iterator[None]:
    """Puts back what a program takes over in its process: handlers, environment, numbers."""
    root = logging.getLogger()
    handlers, level, generator = list(root.handlers), root.level, torch.get_rng_state()
    numbers = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
    before, environment = [signal.getsignal(number) for number in numbers], dict(os.environ)
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
        for handler in root.handlers:
            if handler not in handlers:
                handler.close()
        root.handlers[:], root.level = handlers, level
        torch.set_rng_state(generator)
        os.environ.clear()
        os.environ.update(environment)
        gc.enable()


def answer(row: Row, monkeypatch) -> SimpleNamespace:
    """The program's exit status and the exception behind it, in this process."""

    def late(number, frame):
        raise TimeoutError(f"{row.name} hangs")

    monkeypatch.setattr(sys, "argv", [row.program, *row.argv()])
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(30)
    try:
        with undisturbed():
            cli.run(PROGRAMS[row.program][0])
        return SimpleNamespace(status=0, error=None)
    except SystemExit as ended:
        return SimpleNamespace(status=ended.code, error=ended.__context__)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def snapshot(root: Path, without: tuple[str, ...] = ()) -> dict[str, tuple]:
    """Kind, size, time and bytes of everything below `root`, links not followed."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root)
        if str(name) in without or f"{name.parts[0]}/" in without:
            continue
        state = path.lstat()
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        found[str(name)] = (state.st_mode, state.st_size, state.st_mtime_ns, content)
    return found


# Ways to harm a file. Each gives a function of the folder that `build` filled.


def write(name: str, content: str | bytes) -> Harm:
    def harm(root: Path) -> None:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return harm


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(bytes(content))


def removed(path: Path) -> None:
    path.unlink()


def on(name: str, *damages: Callable[[Path], None]) -> Harm:
    def harm(root: Path) -> None:
        for damage in damages:
            damage(root / name)

    return harm


def every(*harms: Harm) -> Harm:
    def harm(root: Path) -> None:
        for one in harms:
            one(root)

    return harm


def move(source: str, target: str) -> Harm:
    def harm(root: Path) -> None:
        (root / source).rename(root / target)

    return harm


def copy(source: str, target: str) -> Harm:
    def harm(root: Path) -> None:
        shutil.copyfile(root / source, root / target)

    return harm


def link(name: str, target: str) -> Harm:
    return lambda root: (root / name).symlink_to(target)


def folder(name: str) -> Harm:
    return lambda root: (root / name).mkdir(parents=True)


def no_folder(name: str) -> Harm:
    return lambda root: shutil.rmtree(root / name)


def params(name: str, change: Callable[[dict], None], sealed: bool = True) -> Harm:
    """Other content of a checkpoint's params.json, with a manifest that agrees."""

    def harm(root: Path) -> None:
        path = root / name / "params.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        change(content)
        path.write_text(json.dumps(content), encoding="utf-8")
        if sealed:
            seal(root / name)

    return harm


def seal(path: Path) -> None:
    """A manifest of what is there now, as whoever forges a checkpoint would write it."""
    names = [one.name for one in path.iterdir() if one.is_file() and one.name != "manifest.json"]
    content = {"files": describe_files(path, sorted(names))}
    (path / "manifest.json").write_text(json.dumps(content), encoding="utf-8")


def sealed(name: str) -> Harm:
    return lambda root: seal(root / name)


class Payload:
    """Makes a file where it is unpickled."""

    def __reduce__(self):
        return os.mkdir, (MARK,)


def not_a_number(name: str) -> Harm:
    """The weights of a checkpoint with one NaN, written as a whole checkpoint of weights."""

    def harm(root: Path) -> None:
        weights = read_model(root / name)
        weights["norm.weight"][3] = float("nan")
        _save({"model": weights}, root / name)

    return harm


def flipped_weight(name: str) -> Harm:
    """One bit of a checkpoint's embedding."""

    def harm(root: Path) -> None:
        places = dcp.FileSystemReader(root / name).read_metadata().storage_data
        (place,) = (at for key, at in places.items() if key.fqn == "model.tok_embeddings.weight")
        path = root / name / place.relative_path
        content = bytearray(path.read_bytes())
        content[place.offset + place.length // 2] ^= 4
        path.write_bytes(bytes(content))

    return harm


def code_in_objects(name: str) -> Harm:
    """A checkpoint whose optimizer settings are code, in a .distcp file; its manifest agrees."""

    def harm(root: Path) -> None:
        path = root / name
        entries = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        state: dict[str, Any] = {
            key: torch.empty(entry.size, dtype=entry.properties.dtype)
            for key, entry in entries.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        dcp.load(state, checkpoint_id=path, no_dist=True)
        state.update({key: Payload() for key in entries.keys() - state.keys()})
        _save(state, path)

    return harm


def _save(state: dict[str, Any], path: Path) -> None:
    for name in (".metadata", "__0_0.distcp"):
        (path / name).unlink()
    dcp.save(state, checkpoint_id=path, no_dist=True)
    seal(path)


def pickled(name: str) -> Harm:
    """A bare pickle that makes a file, in place of an index or of weights."""
    return write(name, pickle.dumps(Payload()))


def pickled_by_torch(name: str) -> Harm:
    """What torch.save makes of an object that makes a file."""
    return lambda root: torch.save({"model": Payload()}, root / name)
