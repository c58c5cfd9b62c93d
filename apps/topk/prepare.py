"""Text in; training chunks, held-out documents and a trained tokenizer out."""

import re
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from apps.topk import cli
from apps.topk.corpus import flags, hub
from apps.topk.corpus.local_files import KINDS
from apps.topk.corpus.making import find_finished, make
from apps.topk.corpus.sources import Source, open_sources
from apps.topk.corpus.text_files import COMPRESSIONS
from lingua_topk.errors import ConfigError

PROGRAM = "apps.topk.prepare"
EXAMPLE = "--source python-docs --out data/mine"
MAX_CHUNKS = 10_000
MAX_VOCAB_SIZE = 1_000_000
MAX_MB = 10_000_000
MB = 1_000_000


class Terminated(KeyboardInterrupt):
    """SIGTERM, which is treated as Ctrl-C is."""


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    try:
        with _sigterm_as_interrupt():
            flags.call(prepare, PROGRAM, argv, EXAMPLE, repeatable=["source"])
    except Terminated:
        raise SystemExit(128 + signal.SIGTERM) from None


def prepare(
    *,
    source: str,
    out: str,
    name: str = "",
    chunks: int = 1,
    val_share: float = 0.05,
    val_documents: int = 10_000,
    vocab_size: int = 32_000,
    tokenizer_mb: int = 100,
    seed: int = 42,
    text_key: str = "text,content",
    memory_mb: int = 512,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Make training chunks, held-out documents and a tokenizer from text of any size.

    Writes OUT/NAME/NAME.chunk.NN.jsonl, OUT/NAME/NAME.val.jsonl, OUT/tokenizer.model and
    OUT/manifest.json, whole or not at all. Documents that differ in whitespace only are
    kept once; then a share of them is held out for validation and the rest is shuffled.
    A second run with the same arguments and sources uses what is there.

    The text passes through a working folder beside OUT, .OUT.prepare-work, which takes about
    as much disk as the text does and is removed at the end. A run that was stopped, by
    Ctrl-C, SIGTERM, SIGKILL, a full disk or a lost connection, goes on from there when the
    same command is given again, and its output is that of a run that was not stopped.

    Args:
        source: "python-docs" (the documentation, docstrings and longer comments of the
            Python that runs this: about 2.4 MB of English, no download); a file or folder of
            .txt and .jsonl, each also as .gz, .xz or .zst, and .parquet; or a data set of the
            Hugging Face hub, streamed, as hf:OWNER/NAME[@REVISION][:CONFIG[:SPLIT]]. The split
            is train where none is given, and OWNER/NAME may be a folder that holds a copy.
            FineWeb-Edu is hf:HuggingFaceFW/fineweb-edu:sample-10BT (10 billion tokens, about
            45 GB of text), :sample-100BT, :sample-350BT, :CC-MAIN-2024-10 and so on for one
            crawl, or :default for all of it. Several sources are separated by commas, or give
            the flag several times. A .txt file of up to 20,000 characters is one document; a
            longer one is cut between paragraphs into passages of about 6,000.
        out: the folder to write; use it in a config as data.root_dir.
        name: what the folder and files inside OUT are called, of letters, digits, - and _;
            by default the source's name, or "mixed" for several.
        chunks: how many training files; 1 can be read by any number of processes.
        val_share: the share of the documents that is held out, between 0 and 1; at least
            one document is, and at least one is not.
        val_documents: how many documents are held out at most, whatever the share.
        vocab_size: how many pieces the tokenizer has (SentencePiece BPE, trained on the
            training documents); 0 trains none.
        tokenizer_mb: how much text the tokenizer is trained on, in MB: the first of the
            shuffled training documents, a fair sample of them. Training takes 4 to 10 times
            as much memory (10 MB: 93, 100 MB: 434, of English and for 32,000 pieces).
        seed: decides which documents are held out, and the order of the others.
        text_key: the keys of .jsonl files, or columns, that hold the text; the first one
            present counts.
        memory_mb: how much memory may be used, in MB, beside what the program takes to start
            (240 MB; 280 with .zst or .parquet, 480 with a data set of the hub). It does not
            bound training the tokenizer, which the default of tokenizer_mb keeps below 512,
            nor a single long document. Below 64 the readers of compressed files need more.
        overwrite: replace what an earlier run wrote to OUT, and do not go on with what an
            interrupted run with other arguments or sources left.

    Returns: the manifest.

    Raises: ConfigError for an argument that is not allowed, DataError for text that
    cannot be used.
    """
    inputs = {
        "name": name,
        "chunks": chunks,
        "val_share": val_share,
        "val_documents": val_documents,
        "vocab_size": vocab_size,
        "tokenizer_mb": tokenizer_mb,
        "seed": seed,
        "text_key": text_key,
    }
    _check(inputs, memory_mb)
    out = str(Path(out).expanduser()) if out else ""
    folder = _absolute(out)
    sources = open_sources(source, text_key, folder)
    inputs["name"] = name or _default_name(source, sources)
    inputs["sources"] = [one.fingerprint() for one in sources]
    try:
        manifest = find_finished(folder, inputs, overwrite)
        if manifest:
            print(f"already there, from the same arguments and sources: {out}")
        else:
            manifest = make(folder, inputs, sources, memory_mb * MB, overwrite)
    except OSError as error:
        raise ConfigError(f"out={out!r} cannot be written: {error}: {cli.MAKE_ROOM}") from None
    print(summary(out, manifest))
    return manifest


def summary(out: str, manifest: dict[str, Any]) -> str:
    """What was made, in a few lines, and the keys of a config that use it."""
    name, counts = manifest["inputs"]["name"], manifest["counts"]
    rows = [("", "files", "documents", "characters")]
    for part, files in (("train", manifest["inputs"]["chunks"]), ("validation", 1)):
        count = counts[part]
        rows.append((part, *(f"{n:,}" for n in (files, count["documents"], count["characters"]))))
    lines = [f"{row[0]:<12}{row[1]:>7}{row[2]:>12}{row[3]:>16}" for row in rows]
    if counts["duplicates_dropped"]:
        lines.append(f"duplicates dropped: {counts['duplicates_dropped']:,}")
    data: dict[str, Any] = {"root_dir": out, "sources": {name: 1.0}}
    if tokenizer := manifest["tokenizer"]:
        tokens = counts["train"]["bytes"] / tokenizer["bytes_per_token"]
        lines.append(
            f"tokenizer: {tokenizer['pieces']:,} pieces, {tokenizer['bytes_per_token']:.2f} bytes"
            f" a token on held-out text; about {_rounded(tokens):,} training tokens"
        )
        data["tokenizer"] = {"name": "sp", "path": str(Path(out) / "tokenizer.model")}
    config = yaml.safe_dump({"data": data}, sort_keys=False, allow_unicode=True)
    return "\n".join([*lines, "to train on it, say in a config:", config.rstrip()])


def _check(inputs: dict[str, Any], memory_mb: int) -> None:
    name, val_share, vocab_size = inputs["name"], inputs["val_share"], inputs["vocab_size"]
    # No dot: NAME.chunk.NN.val.jsonl would be taken for training text.
    if name and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}", name):
        raise ConfigError(f"name={name!r} is not made of letters, digits, - and _: choose another")
    if not 0 < val_share < 1:
        raise ConfigError(f"val_share={val_share} is not between 0 and 1: give for example 0.05")
    if not 0 <= vocab_size <= MAX_VOCAB_SIZE:
        raise ConfigError(
            f"vocab_size={vocab_size} is not allowed: give up to {MAX_VOCAB_SIZE:,}, or 0 for"
            " no tokenizer"
        )
    _check_range("chunks", inputs["chunks"], MAX_CHUNKS)
    _check_range("val_documents", inputs["val_documents"], 10**12)
    _check_range("tokenizer_mb", inputs["tokenizer_mb"], MAX_MB)
    _check_range("memory_mb", memory_mb, MAX_MB)


def _check_range(name: str, value: int, largest: int) -> None:
    if not 1 <= value <= largest:
        raise ConfigError(f"{name}={value} is not allowed: give 1 to {largest:,}")


def _absolute(out: str) -> Path:
    folder = Path(out).resolve()
    if not out or folder == folder.parent or (folder.exists() and not folder.is_dir()):
        raise ConfigError(f"out={out!r} cannot be a folder to write: give the path of a new one")
    return folder


def _default_name(source: str, sources: list[Source]) -> str:
    if len(sources) > 1:
        return "mixed"
    stem = Path(source.removeprefix(hub.PREFIX)).expanduser().resolve().name
    for suffix in (*COMPRESSIONS, *KINDS):
        stem = re.sub(re.escape(suffix) + "$", "", stem, flags=re.IGNORECASE)
    return re.sub(r"[^A-Za-z0-9_-]+", "_", stem).strip("_-")[:100] or "text"


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    def terminate(number: int, frame: Any) -> None:
        raise Terminated

    try:
        before = signal.signal(signal.SIGTERM, terminate)
    except ValueError:  # not the main thread, which alone gets signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _rounded(number: float) -> int:
    """Two significant digits."""
    return int(float(f"{number:.1e}"))


if __name__ == "__main__":
    cli.run(main)
