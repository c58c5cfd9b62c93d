"""Text in; training chunks, held-out documents and a trained tokenizer out."""

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import yaml
from tqdm import tqdm

from apps.topk import cli
from apps.topk.corpus import flags, output
from apps.topk.corpus.local_files import COMPRESSIONS, KINDS
from apps.topk.corpus.sources import Source, open_sources
from apps.topk.corpus.split import Split, split
from apps.topk.corpus.tally import Tally
from apps.topk.corpus.tokenizer import bytes_per_token, train_tokenizer, vocabulary
from apps.topk.provenance import provenance, write_json
from lingua_topk.errors import ConfigError, DataError

PROGRAM = "apps.topk.prepare"
EXAMPLE = "--source python-docs --out data/mine"
MAX_CHUNKS = 10_000
MAX_VOCAB_SIZE = 1_000_000


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    flags.call(prepare, PROGRAM, argv, EXAMPLE, repeatable=["source"])


def prepare(
    *,
    source: str,
    out: str,
    name: str = "",
    chunks: int = 1,
    val_share: float = 0.05,
    vocab_size: int = 32_000,
    seed: int = 42,
    text_key: str = "text,content",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Make training chunks, held-out documents and a tokenizer from text.

    Writes OUT/NAME/NAME.chunk.NN.jsonl, OUT/NAME/NAME.val.jsonl, OUT/tokenizer.model and
    OUT/manifest.json, whole or not at all. Documents that differ in whitespace only are
    kept once; then a share of them is held out for validation and the rest is shuffled.
    A second run with the same arguments and sources uses what is there.

    Args:
        source: "python-docs" (the documentation, docstrings and longer comments of the
            Python that runs this: about 2.4 MB of English, no download), or a file or
            folder of .txt and .jsonl, each also as .gz or .xz; several separated by commas,
            or give the flag several times. A .txt file of up to 20,000 characters is one
            document; a longer one is cut between paragraphs into passages of about 6,000.
        out: the folder to write; use it in a config as data.root_dir.
        name: what the folder and files inside OUT are called, of letters, digits, - and _;
            by default the source's name, or "mixed" for several.
        chunks: how many training files; 1 can be read by any number of processes.
        val_share: the share of the documents that is held out, between 0 and 1; at least
            one document is, and at least one is not.
        vocab_size: how many pieces the tokenizer has (SentencePiece BPE, trained on the
            training documents); 0 trains none.
        seed: decides which documents are held out, and the order of the others.
        text_key: the keys of .jsonl files that hold the text; the first one present counts.
        overwrite: replace what an earlier run wrote to OUT.

    Returns: the manifest.

    Raises: ConfigError for an argument that is not allowed, DataError for text that
    cannot be used.
    """
    _check(name, chunks, val_share, vocab_size)
    out = str(Path(out).expanduser()) if out else ""
    folder = _absolute(out)
    sources = open_sources(source, text_key, folder)
    name = name or _default_name(source, sources)
    inputs = {
        "name": name,
        "chunks": chunks,
        "val_share": val_share,
        "vocab_size": vocab_size,
        "seed": seed,
        "text_key": text_key,
        "sources": [one.fingerprint() for one in sources],
    }
    try:
        output.clear_leftovers(folder, _warn)
        manifest = output.find_finished(folder, inputs, overwrite)
        if manifest:
            print(f"already there, from the same arguments and sources: {out}")
        else:
            with output.whole_folder(folder, replace=overwrite) as new:
                manifest = _build(new, inputs, sources)
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


def _check(name: str, chunks: int, val_share: float, vocab_size: int) -> None:
    # No dot: NAME.chunk.NN.val.jsonl would be taken for training text.
    if name and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}", name):
        raise ConfigError(f"name={name!r} is not made of letters, digits, - and _: choose another")
    if not 1 <= chunks <= MAX_CHUNKS:
        raise ConfigError(f"chunks={chunks} is not allowed: give 1 to {MAX_CHUNKS:,}")
    if not 0 < val_share < 1:
        raise ConfigError(f"val_share={val_share} is not between 0 and 1: give for example 0.05")
    if not 0 <= vocab_size <= MAX_VOCAB_SIZE:
        raise ConfigError(
            f"vocab_size={vocab_size} is not allowed: give up to {MAX_VOCAB_SIZE:,}, or 0 for"
            " no tokenizer"
        )


def _absolute(out: str) -> Path:
    folder = Path(out).resolve()
    if not out or folder == folder.parent or (folder.exists() and not folder.is_dir()):
        raise ConfigError(f"out={out!r} cannot be a folder to write: give the path of a new one")
    return folder


def _default_name(source: str, sources: list[Source]) -> str:
    if len(sources) > 1:
        return "mixed"
    stem = Path(source).expanduser().resolve().name
    for suffix in (*COMPRESSIONS, *KINDS):
        stem = re.sub(re.escape(suffix) + "$", "", stem, flags=re.IGNORECASE)
    return re.sub(r"[^A-Za-z0-9_-]+", "_", stem).strip("_-")[:100] or "text"


def _build(new: Path, inputs: dict[str, Any], sources: list[Source]) -> dict[str, Any]:
    """Read, split, train the tokenizer and write into `new`; the manifest of what was written."""
    name, chunks, tally = inputs["name"], inputs["chunks"], Tally()
    parts = split(_read(sources, tally), inputs["val_share"], inputs["seed"])
    for line in tally.lines():
        _warn(line)
    if len(parts.train) < chunks:
        raise DataError(
            f"chunks={chunks} is more than the {len(parts.train)} training documents, and a chunk"
            " cannot be empty: set fewer --chunks, or give more text"
        )
    tokenizer = _write_tokenizer(new, parts, inputs["vocab_size"])
    _write_documents(new / name, name, parts, chunks)
    manifest = {
        "format": output.FORMAT,
        "inputs": inputs,
        "counts": {
            "train": _count(parts.train),
            "validation": _count(parts.validation),
            "duplicates_dropped": parts.duplicates,
            "problems": tally.counts,
        },
        "tokenizer": tokenizer,
        "files": output.describe_files(new),
        **provenance(sentencepiece=sentencepiece.__version__),
    }
    write_json(new / output.MANIFEST, manifest)
    return manifest


def _read(sources: list[Source], tally: Tally) -> Iterator[str]:
    for one in sources:
        with _progress(f"reading {Path(one.label).name}", one.size) as bar:
            for document in one.documents(tally):
                bar.update(one.done - bar.n)
                yield document


def _write_tokenizer(folder: Path, parts: Split, vocab_size: int) -> dict[str, Any] | None:
    if not vocab_size:
        return None
    with _progress("training the tokenizer", len(parts.train)) as bar:
        # The bar is full when all text is read; it stays while the pieces are merged.
        model = train_tokenizer(_ticking(parts.train, bar), vocab_size)
    output.write_bytes(folder / "tokenizer.model", model)
    output.write_bytes(folder / "tokenizer.vocab", vocabulary(model).encode("utf-8"))
    return {"pieces": vocab_size, "bytes_per_token": bytes_per_token(model, parts.validation)}


def _write_documents(folder: Path, name: str, parts: Split, chunks: int) -> None:
    folder.mkdir()
    with _progress("writing", len(parts.train)) as bar:
        for chunk in range(chunks):
            # Dealt like cards, so that the chunks differ by one document at most.
            documents = _ticking(parts.train[chunk::chunks], bar)
            output.write_documents(folder / output.chunk_name(name, chunk, chunks), documents)
    output.write_documents(folder / output.validation_name(name), parts.validation)


def _count(documents: list[str]) -> dict[str, int]:
    return {
        "documents": len(documents),
        "characters": sum(map(len, documents)),
        "bytes": sum(len(document.encode("utf-8")) for document in documents),
    }


def _progress(what: str, total: int) -> tqdm:
    """A bar on a terminal, nothing elsewhere."""
    return tqdm(desc=what, total=total, disable=None, leave=False, unit="", unit_scale=True)


def _ticking(items: Iterable[Any], bar: tqdm) -> Iterator[Any]:
    for item in items:
        yield item
        bar.update()


def _rounded(number: float) -> int:
    """Two significant digits."""
    return int(float(f"{number:.1e}"))


def _warn(line: str) -> None:
    print(f"warning: {cli.one_line(line)}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
