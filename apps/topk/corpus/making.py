"""From sources to the folder OUT: reading, dealing, the tokenizer; taken up where it stopped."""

import sys
from pathlib import Path
from typing import Any

import sentencepiece

from apps.topk import cli
from apps.topk.corpus import dealing, output, progress, work
from apps.topk.corpus.counting import plan
from apps.topk.corpus.reading import read
from apps.topk.corpus.records import Records
from apps.topk.corpus.sources import Source
from apps.topk.corpus.tally import Tally
from apps.topk.corpus.tokenizer import bytes_per_token, first_bytes, train_tokenizer, vocabulary
from apps.topk.corpus.work import Paused, Work, working_folder
from apps.topk.provenance import provenance, write_json
from lingua_topk.errors import ConfigError, DataError, UserError

MB = 1_000_000
# Of the memory that is allowed, what is read of the documents at a time while the tokenizer,
# which has the largest part of it then, is trained.
SAMPLING_SHARE = 1 / 16


def find_finished(out: Path, inputs: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """The manifest of what is there from the same inputs, where no other run left a trace."""
    if work.folder_of(out).exists() or output.replaced_folder(out).exists():
        return None
    return output.find_finished(out, inputs, overwrite)


def make(
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


def _warn(line: str) -> None:
    print(f"warning: {cli.one_line(line)}", file=sys.stderr)
