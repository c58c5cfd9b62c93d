"""Text in; training chunks, held-out documents and a trained tokenizer out."""

import re
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sentencepiece
import yaml

from apps.topk import cli
from apps.topk.corpus import dealing, flags, hub, output, progress, work
from apps.topk.corpus.counting import plan
from apps.topk.corpus.local_files import KINDS
from apps.topk.corpus.reading import read
from apps.topk.corpus.records import Records
from apps.topk.corpus.sources import Source, open_sources
from apps.topk.corpus.tally import Tally
from apps.topk.corpus.text_files import COMPRESSIONS
from apps.topk.corpus.tokenizer import bytes_per_token, first_bytes, train_tokenizer, vocabulary
from apps.topk.corpus.work import Paused, Work, working_folder
from apps.topk.provenance import provenance, write_json
from lingua_topk.errors import ConfigError, DataError, UserError

PROGRAM = "apps.topk.prepare"
EXAMPLE = "--source python-docs --out data/mine"
MAX_CHUNKS = 10_000
MAX_VOCAB_SIZE = 1_000_000
MAX_MB = 10_000_000
MB = 1_000_000
# Of the memory that is allowed, what is read of the documents at a time while the tokenizer,
# which has the largest part of it then, is trained.
SAMPLING_SHARE = 1 / 16


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
        manifest = _find_finished(folder, inputs, overwrite)
        if manifest:
            print(f"already there, from the same arguments and sources: {out}")
        else:
            manifest = _make(folder, inputs, sources, memory_mb * MB, overwrite)
    except OSError as error:
        raise ConfigError(f"out={out!r} cannot be written: {error}") from None
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


def _find_finished(out: Path, inputs: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """The manifest of what is there from the same inputs, where no other run left a trace."""
    if work.folder_of(out).exists() or output.replaced_folder(out).exists():
        return None
    return output.find_finished(out, inputs, overwrite)


def _make(
    out: Path, inputs: dict[str, Any], sources: list[Source], memory: int, overwrite: bool
) -> dict[str, Any]:
    """Write `out`, with what an interrupted run left where it is of the same inputs."""
    with working_folder(out) as held:
        output.put_back(out, _warn)
        manifest = output.find_finished(out, inputs, overwrite)
        if manifest:  # the run was killed when nothing was left to do but remove its folder
            if not _differences(held, inputs):  # or while it did so
                held.remove()
            return manifest
        _take_up(held, inputs, overwrite)
        try:
            manifest = _build(held, inputs, sources, memory)
            output.publish(held.new, out, replace=overwrite)
        except UserError as error:
            _keep_or_remove(held, error, len(sources))
            raise
        except KeyboardInterrupt:
            print("stopped: the same command goes on from here", file=sys.stderr)
            raise
        held.remove()
    return manifest


def _differences(held: Work, inputs: dict[str, Any]) -> list[str] | None:
    """How the documents in a working folder differ from those of `inputs`; None for none there."""
    state = held.load("reading")
    return None if state is None else output.differences(_reading_inputs(inputs), state["inputs"])


def _take_up(held: Work, inputs: dict[str, Any], overwrite: bool) -> None:
    """Leave in the working folder what this run can go on with; ConfigError where it holds
    what another run could go on with."""
    differences = _differences(held, inputs)
    if differences and not overwrite:
        raise ConfigError(
            f"{held.folder} holds what an interrupted run with other inputs has done:"
            f" {', '.join(differences)}; give those to go on with it, or --overwrite true (or"
            " remove the folder) to start afresh"
        )
    if differences is None or differences:
        if differences:
            _warn(f"removing {held.folder}, left by an interrupted run with other inputs")
        held.clear()
        return
    documents = held.load("reading")["documents"]
    print(f"going on with an interrupted run: {documents:,} documents are read", file=sys.stderr)
    state = held.load("dealing")
    if not state or state["inputs"] != _dealing_inputs(inputs) or not held.new.exists():
        held.clear_dealing()


def _keep_or_remove(held: Work, error: UserError, n_sources: int) -> None:
    """Keep what was done where the run can go on when the mistake is mended."""
    state = held.load("reading")
    is_read = state is not None and state["source"] == n_sources
    if state is None or (is_read and not isinstance(error, Paused)):
        held.remove()
    else:
        _warn(f"{held.folder} keeps the {state['documents']:,} documents that were read")


def _reading_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    """Those that decide what is read, and in which order it comes."""
    return {key: inputs[key] for key in ("seed", "text_key", "sources")}


def _dealing_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    """Those that decide what the chunks and the held-out documents are."""
    return {key: inputs[key] for key in ("name", "chunks", "val_share", "val_documents")}


def _build(
    held: Work, inputs: dict[str, Any], sources: list[Source], memory: int
) -> dict[str, Any]:
    """Read, split, train the tokenizer and write into `held.new`; the manifest of it."""
    reading = read(held, sources, _reading_inputs(inputs), memory)
    tally = Tally(**reading["tally"])
    for line in tally.lines():
        _warn(line)
    records = Records(held.documents, reading["size"])
    try:
        state = held.load("dealing") or _plan(held, records, inputs, memory)
        deal = dealing.Dealing(held, state, inputs["name"], inputs["chunks"], memory)
        model = _tokenizer(held, deal, records, inputs, memory)
        deal.run(records)
    finally:
        records.close()
    for file in held.new.glob("*manifest.json*"):  # of a run that was killed after this
        file.unlink()
    manifest = {
        "format": output.FORMAT,
        "inputs": inputs,
        "counts": {
            "train": state["train"],
            "validation": state["validation"],
            "duplicates_dropped": reading["documents"] - state["distinct"],
            "problems": tally.counts,
        },
        "tokenizer": _describe_tokenizer(model, inputs, deal.validation),
        "files": output.describe_files(held.new),
        **provenance(sentencepiece=sentencepiece.__version__),
    }
    if origins := [origin for origin in reading["origins"] if origin]:
        manifest["hub"] = origins
    write_json(held.new / output.MANIFEST, manifest)
    return manifest


def _plan(held: Work, records: Records, inputs: dict[str, Any], memory: int) -> dict[str, Any]:
    """Decide what is held out; the state of a dealing that begins."""
    limit = int(memory * dealing.GROUP_SHARE)
    counted = plan(records, inputs["val_share"], inputs["val_documents"], limit)
    train, chunks = counted.distinct - counted.held_out, inputs["chunks"]
    if train < chunks:
        raise DataError(
            f"chunks={chunks} is more than the {train} training documents, and a chunk"
            " cannot be empty: set fewer --chunks, or give more text"
        )
    state = dealing.new_state(_dealing_inputs(inputs), counted.distinct, counted.last)
    held.new.mkdir()
    held.save("dealing", state)
    return state


def _tokenizer(
    held: Work, deal: dealing.Dealing, records: Records, inputs: dict[str, Any], memory: int
) -> bytes | None:
    """The tokenizer's model, trained where it is not there yet; Paused where it cannot be."""
    wanted = {key: inputs[key] for key in ("vocab_size", "tokenizer_mb")}
    files = [held.new / "tokenizer.model", held.new / "tokenizer.vocab"]
    if deal.state.get("tokenizer") != wanted:
        for file in files:
            file.unlink(missing_ok=True)
        if inputs["vocab_size"]:
            model = _trained(deal, records, inputs, memory)
            output.write_bytes(files[0], model)
            output.write_bytes(files[1], vocabulary(model).encode("utf-8"))
        deal.state["tokenizer"] = wanted
        held.save("dealing", deal.state)
    return files[0].read_bytes() if inputs["vocab_size"] else None


def _trained(deal: dealing.Dealing, records: Records, inputs: dict[str, Any], memory: int) -> bytes:
    documents = deal.training(records, int(memory * SAMPLING_SHARE))
    sample = first_bytes(documents, inputs["tokenizer_mb"] * MB)
    with progress.bar("training the tokenizer", None, " documents") as shown:
        # The bar stays when all text is read, while the pieces are merged.
        try:
            return train_tokenizer(progress.ticking(sample, shown), inputs["vocab_size"])
        except DataError as error:  # for another size, the documents need not be read again
            raise Paused(str(error)) from None


def _describe_tokenizer(
    model: bytes | None, inputs: dict[str, Any], validation: Path
) -> dict[str, Any] | None:
    if model is None:
        return None
    held_out = dealing.read_documents(validation)
    return {"pieces": inputs["vocab_size"], "bytes_per_token": bytes_per_token(model, held_out)}


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


def _warn(line: str) -> None:
    print(f"warning: {cli.one_line(line)}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
