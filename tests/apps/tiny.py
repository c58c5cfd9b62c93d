"""A tiny run: a corpus of a few sentences, and a config that trains on it in a second."""

import json
from pathlib import Path

from omegaconf import OmegaConf

from apps.topk import cli
from apps.topk.model import TopKTrainArgs

SENTENCES = (
    "The quick brown fox jumps over the lazy dog. ",
    "A stream of water runs down the green hill. ",
    "Every good boy does fine, and every cat sleeps. ",
)
K = 4


def write_corpus(root: Path, documents: int = 60) -> Path:
    """root/text with one training chunk and held-out documents; returns `root`."""
    folder = root / "text"
    folder.mkdir(parents=True)
    lines = [
        json.dumps({"text": SENTENCES[i % 3] * (1 + i % 4) + SENTENCES[i % 2]})
        for i in range(documents)
    ]
    (folder / "text.chunk.00.jsonl").write_text("\n".join(lines[6:]) + "\n", encoding="utf-8")
    (folder / "text.val.jsonl").write_text("\n".join(lines[:6]) + "\n", encoding="utf-8")
    return root


CONFIG = f"""
steps: 30
seed: 7
data:
  sources: {{text: 1.0}}
  batch_size: 4
  seq_len: 32
  prefetch_size: 4
  load_async: false
  tokenizer: {{name: bytes}}
model:
  dim: 32
  n_layers: 3
  n_heads: 2
  multiple_of: 16
  topk: {{k: {K}, n_last_nontopk: 1, anneal_ratio: 0.5}}
optim: {{lr: 1.0e-2, warmup: 5}}
distributed: {{fsdp_type: full_shard, model_dtype: fp32}}
checkpoint: {{dump: {{every: 10}}, eval: {{every: 1000}}}}
logging: {{freq: 1}}
"""


def write_config(path: Path) -> Path:
    path.write_text(CONFIG, encoding="utf-8")
    return path


def train_args(root: Path, dump_dir: Path, *overrides: str) -> TopKTrainArgs:
    """The arguments of a run on the corpus in `root`; overrides as on the command line."""
    here = [f"data.root_dir={root}", f"dump_dir={dump_dir}", *overrides]
    return cli.merge(
        TopKTrainArgs,
        (OmegaConf.create(CONFIG), "the file"),
        (OmegaConf.from_dotlist(here), "the command line"),
    )


def read_metrics(dump_dir: Path) -> list[dict]:
    text = (dump_dir / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]
