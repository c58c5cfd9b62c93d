"""Text with some grammar and repeated names, and runs that are trained on it in seconds."""

import json
import logging
import random
from pathlib import Path

from apps.topk.checkpoint import newest_checkpoint
from apps.topk.corpus.tokenizer import train_tokenizer
from apps.topk.train import train
from tests.apps.tiny import train_args

NAMES = "Anna Boris Clara David Emma Felix Greta Henry".split()
PLACES = "river market station garden library harbour castle kitchen".split()
THINGS = "letter basket lantern violin ladder bottle painting map".split()
VERBS = "carried found lost painted sold wanted hid broke".split()
SEQ_LEN = 96
VOCAB_SIZE = 400


def document(generator: random.Random) -> str:
    """A story of a few people and things, who come back in it."""
    names, things = generator.sample(NAMES, 2), generator.sample(THINGS, 2)
    sentences = []
    for _ in range(generator.randint(6, 16)):
        name, thing = generator.choice(names), generator.choice(things)
        place = generator.choice(PLACES)
        sentences.append(
            generator.choice(
                [
                    f"{name} {generator.choice(VERBS)} the {thing} near the {place}.",
                    f"In the {place} there was a {thing}, and it belonged to {name}.",
                    f"Nobody at the {place} had seen the {thing} of {name} before.",
                    f"The {thing} that {name} {generator.choice(VERBS)} was in the {place}.",
                ]
            )
        )
    return " ".join(sentences)


def write_stories(root: Path, documents: int = 240) -> Path:
    """root/text with a training chunk and held-out documents, root/tokenizer.model; `root`."""
    generator = random.Random(5)
    texts = [document(generator) for _ in range(documents)]
    folder = root / "text"
    folder.mkdir(parents=True)
    parts = {"text.val.jsonl": texts[:40], "text.chunk.00.jsonl": texts[40:]}
    for name, part in parts.items():
        lines = (json.dumps({"text": text}) + "\n" for text in part)
        (folder / name).write_text("".join(lines), encoding="utf-8")
    (root / "tokenizer.model").write_bytes(train_tokenizer(texts[40:], VOCAB_SIZE))
    return root


def train_on(root: Path, folder: Path, *overrides: str) -> Path:
    """The last checkpoint of a short run, its annealing behind it."""
    handlers = list(logging.getLogger().handlers)
    here = [
        f"data.seq_len={SEQ_LEN}", "data.tokenizer.name=sp",
        f"data.tokenizer.path={root}/tokenizer.model", "steps=60",
    ]  # fmt: skip
    train(train_args(root, folder, *here, *overrides))
    logging.getLogger().handlers[:] = handlers
    return newest_checkpoint(folder)
