"""Inputs that nobody means well with, or that an accident made: one line, status 2, files untouched."""

# ruff: noqa: E501  (a row of a table is a line)

import os
import shutil
import subprocess
import sys

import pytest

from lingua_topk.host import EMBEDDED_ROOT
from tests.apps.hostile import (
    MARK,
    MODULES,
    NEWEST,
    OLDEST,
    PLAIN,
    ROOT,
    WIDE,
    Row,
    answer,
    build,
    code_in_objects,
    copy,
    emptied,
    every,
    flipped,
    flipped_weight,
    folder,
    link,
    move,
    no_folder,
    not_a_number,
    on,
    params,
    pickled,
    pickled_by_torch,
    removed,
    sealed,
    snapshot,
    truncated,
    write,
)

DEEP = "[" * 3000
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)
LONG = "x" * 5000


def value(word: str, *says: str, program: str = "train", also: str = "", **more) -> Row:
    """A value on the command line that is not allowed."""
    words = [word, also] if also else [word]
    return Row(f"{program}: {' '.join(words)[:60]!r}", program, words, says, **more)


def file(name: str, content: str | bytes, *says: str, program: str = "train", **more) -> Row:
    """A config file that cannot be what is meant."""
    target = {"eval": "eval.yaml", "stool": "job.yaml", "host": "plain.yaml"}.get(
        program, "config.yaml"
    )
    return Row(f"{program} config: {name}", program, [], says, write(target, content), **more)


CONFIG_FILES = [
    file("empty", "", "data.sources is empty"),
    file("nothing but a comment", "# steps: 3\n", "data.sources is empty"),
    file("null", "null\n", "data.sources is empty"),
    file("a list", "- steps: 3\n", "config=config.yaml holds no mapping"),
    file("a scalar", "steps\n", "steps (in config.yaml)"),
    file("binary", bytes(range(256)) * 8, "config=config.yaml is not readable as YAML"),
    file("UTF-16", "steps: 3\n".encode("utf-16"), "config=config.yaml is not readable as YAML"),
    file("Latin-1", "name: caf\xe9\n".encode("latin-1"), "config=config.yaml is not readable as YAML"),
    file("a tab", "data:\n\tseq_len: 3\n", "config=config.yaml is not readable as YAML", "line 2"),
    file("an open bracket", "steps: [\n", "config=config.yaml is not readable as YAML"),
    file("a key twice", "steps: 3\nsteps: 4\n", "config=config.yaml is not readable as YAML", "steps"),
    file("a bomb of anchors", BOMB, "config.yaml"),
    file("an anchor within itself", "data: &a {sources: *a}\n", "config.yaml"),
    file("brackets 3,000 deep", f"steps: {DEEP}\n", "config=config.yaml is not readable as YAML"),
    file("mappings 3,000 deep", "a: " + "{b: " * 3000, "config=config.yaml is not readable as YAML"),
    file("a merge key of itself", "<<: *a\nsteps: 3\n", "config=config.yaml is not readable as YAML"),
    file("code as a tag", f"name: !!python/object/apply:os.mkdir [{MARK}]\n", "config=config.yaml is not"),
    file("a Python name", "name: !!python/name:os.system\n", "config=config.yaml is not readable as YAML"),
    file("an unknown tag", "name: !secret x\n", "config=config.yaml is not readable as YAML"),
    file("two documents", "steps: 3\n---\nsteps: 4\n", "config=config.yaml is not readable as YAML"),
    file("an escape sequence", 'st\x1bep: 3\n', "config=config.yaml is not readable as YAML"),
    file("a key with an escape sequence", '"st\\e[31mep": 3\n', "is no known key"),
    file("a key of another type", "3: 4\n", "3 (in config.yaml) is no known key"),
    file("a null key", "null: 4\n", "config=config.yaml is not readable as YAML"),
    file("a list as a key", "[a]: 4\n", "config=config.yaml is not readable as YAML"),
    file("an unknown key", "stepz: 3\n", "stepz (in config.yaml) is no known key: did you mean steps?"),
    file("an unknown section", "modell: {dim: 3}\n", "modell (in config.yaml) is no known key: did you mean model?"),
    file("an unknown key of a section", "optim: {learning_rate: 1}\n", "optim.learning_rate (in config.yaml) is no known key"),
    file("an unknown key of model.topk", "model: {topk: {kk: 3}}\n", "model.topk.kk (in config.yaml) is no known key: did you mean k?"),
    file("an unknown key of model.topk, like none", "model: {topk: {zzz: 3}}\n", "model.topk.zzz (in config.yaml) is no known key: allowed are activation, anneal_ratio"),
    file("an unknown key, three deep", "data: {tokenizer: {pth: x}}\n", "data.tokenizer.pth (in config.yaml) is no known key: did you mean path?"),
    file("an unknown key of checkpoint.dump", "checkpoint: {dump: {evry: 3}}\n", "checkpoint.dump.evry (in config.yaml) is no known key: did you mean every?"),
    file("a key in the wrong section", "anneal_ratio: 0.2\n", "anneal_ratio (in config.yaml) is no known key"),
    file("a string for an integer", "steps: many\n", "steps (in config.yaml): Value 'many'"),
    file("a float for an integer", "steps: 2.5\n", "steps (in config.yaml): Value '2.5'"),
    file("infinity for an integer", "steps: .inf\n", "steps (in config.yaml): Value 'inf'"),
    file("NaN for an integer", "model: {topk: {k: .nan}}\n", "model.topk.k (in config.yaml): Value 'nan'"),
    file("a date for an integer", "steps: 2020-01-01\n", "steps (in config.yaml)"),
    file("null for an integer", "steps: null\n", "steps (in config.yaml)"),
    file("null for a section", "data: null\n", "data (in config.yaml)"),
    file("null for model.dim", "model: {dim: null}\n", "model.dim (in config.yaml)"),
    file("a list for an integer", "steps: [3]\n", "steps (in config.yaml)"),
    file("a mapping for an integer", "steps: {a: 3}\n", "steps"),
    file("a list for a section", "model: [dim]\n", "model (in config.yaml) has the wrong form"),
    file("a string for a section", "model: large\n", "model (in config.yaml) has the wrong form"),
    file("a number for model.topk", "model: {topk: 3}\n", "model.topk (in config.yaml) has the wrong form"),
    file("a string for model.topk.layers", "model: {topk: {layers: all}}\n", "model.topk.layers (in config.yaml)"),
    file("a string for a weight", "data: {sources: {text: a lot}}\n", "data.sources.text (in config.yaml): Value 'a lot'"),
    file("a list for data.sources", "data: {sources: [text]}\n", "data.sources (in config.yaml)"),
    file("a string for a boolean", "data: {add_bos: perhaps}\n", "data.add_bos (in config.yaml): Value 'perhaps'"),
    file("a fraction for a boolean", "data: {load_async: 0.5}\n", "data.load_async (in config.yaml)"),
    file("a mapping for a path", "data: {root_dir: {a: b}}\n", "data.root_dir"),
    file("a boolean for a number", "steps: yes\n", "steps"),
    file("an interpolation that loops", "grad_acc_steps: ${seed}\nseed: ${grad_acc_steps}\n", "config"),
    file("an interpolation of itself", "name: ${name}\n", "config"),
    file("an unknown interpolation", "name: ${nowhere.at.all}\n", "nowhere"),
    file("an unknown resolver", "name: ${shell:ls}\n", "shell"),
    file("an interpolation left open", "name: ${seed\n", "name"),
    file("an environment variable that is not set", "name: ${oc.env:HOSTILE_NOT_SET}\n", "HOSTILE_NOT_SET"),
    file("a mandatory value left out", "name: ???\n", "name"),
    file("a NUL in a path", 'data: {sources: {text: 1}, root_dir: "a\\0b"}\n', "data.root_dir"),
    file("a NUL in a tokenizer path", 'data: {tokenizer: {name: sp, path: "a\\0b"}}\n', "data.tokenizer.path"),
    file("a NUL in the environment", 'data: {sources: {text: 1}, root_dir: .}\nenv: {NCCL_DEBUG: "a\\0b"}\nmodel: {n_heads: 2, dim: 32}\n', "env.NCCL_DEBUG"),
    file("for eval: unknown key", "validation: {windw: 3}\n", "validation.windw (in eval.yaml) is no known key: did you mean window?", program="eval"),
    file("for eval: that of a training run", "steps: 3\nmodel: {dim: 3}\n", "(in eval.yaml) is no known key", program="eval"),
    file("for eval: a string for a list", "validation: {sources: text}\n", "validation.sources", program="eval"),
    file("for eval: null for a section", "validation: null\n", "nothing is left to evaluate", program="eval"),
    file("for plan: an unknown key", "stepz: 3\n", "stepz (in config.yaml) is no known key: did you mean steps?", program="plan"),
    file("for plan: binary", b"\xff\x00\x01", "config=config.yaml is not readable as YAML", program="plan"),
    file("for the host: an unknown key", "stepz: 3\n", "stepz", program="host"),
    file("for the host: a section TopK", "model: {topk: {k: 3}}\n", "topk", program="host"),
    file("for the host: a wrong type", "steps: many\n", "steps", program="host"),
    file("for the host: a list", "- a\n", "plain.yaml", program="host"),
    file("for the host: binary", bytes(range(256)), "plain.yaml", program="host"),
    file("for the host: an open bracket", "steps: [\n", "plain.yaml", program="host"),
    file("for the host: code as a tag", f"name: !!python/object/apply:os.mkdir [{MARK}]\n", "plain.yaml", program="host"),
    file("for the host: an unknown interpolation", "name: ${nowhere}\n", "nowhere", program="host"),
    file("for stool: empty", "", "config needs dump_dir and name", program="stool"),
    file("for stool: a list", "- a\n", "config=job.yaml holds no mapping", program="stool"),
    file("for stool: an open bracket", "steps: [\n", "job.yaml", program="stool"),
    file("for stool: Latin-1", b"name: caf\xe9\n", "job.yaml", program="stool"),
    file("for stool: an unknown interpolation", "name: ${nowhere}\ndump_dir: new\n", "nowhere", program="stool"),
    file("for stool: a number for a path", "name: x\ndump_dir: 5\n", "dump_dir", program="stool"),
    file("for stool: a list for a path", "name: x\ndump_dir: [a]\n", "dump_dir", program="stool"),
    file("for stool: a line end in a name", 'name: "x\\n#SBATCH --uid=0"\ndump_dir: new\n', "name=", program="stool"),
    file("for stool: a quote in a path", "name: x\ndump_dir: 'a\"b'\n", "dump_dir=", program="stool"),
]  # fmt: skip

VALUES = [
    value("steps=0", "steps=0 is too small: give at least 1"),
    value("steps=-5", "steps=-5 is too small: give at least 1"),
    value("steps=1e400", "steps (in the command line): Value 'inf'"),
    value("seed=-99999999999999999999999", "seed=-99999999999999999999999"),
    value("seed=99999999999999999999999", "seed=99999999999999999999999"),
    value("model.seed=99999999999999999999999", "model.seed=99999999999999999999999"),
    value("data.seed=-1", "data.seed=-1", "at least 0"),
    value("data.batch_size=-1", "data.batch_size=-1 is too small: give at least 1"),
    value("data.seq_len=-32", "data.seq_len=-32 is too small: give at least 1"),
    value("data.seq_len=1000000000000000", "data.seq_len=1000000000000000", writes=("new/",)),
    value("data.n_views=1", "data.n_views=1 is too small: give at least 2"),
    value("data.prefetch_size=0", "data.prefetch_size=0 is too small"),
    value("data.max_malformed=-1", "data.max_malformed=-1"),
    value("data.max_malformed=nan", "data.max_malformed=nan"),
    value("data.sources.text=nan", "weight nan of text is not allowed"),
    value("data.sources.text=inf", "weight inf of text is not allowed"),
    value("data.sources.text=0", "weight 0.0 of text is not allowed"),
    value("data.sources.../..=1", "data.sources"),
    value("data.root_dir=" + LONG, "data.root_dir"),
    value("model.dim=0", "model.dim=0 is too small"),
    value("model.dim=-32", "model.dim=-32 is too small"),
    value("model.dim=33", "model.n_heads=2 does not divide model.dim=33: give a divisor"),
    value("model.dim=1000000000", "model.dim=1000000000", writes=("new/",)),
    value("model.n_layers=0", "model.n_layers=0 is too small"),
    value("model.n_heads=0", "model.n_heads=0 is too small"),
    value("model.n_heads=3", "model.n_heads=3 does not divide model.dim=32: give a divisor"),
    value("model.n_kv_heads=3", "model.n_kv_heads=3 does not divide model.n_heads=2"),
    value("model.head_dim=3", "model.head_dim=3 is odd"),
    value("model.multiple_of=0", "model.multiple_of=0 is too small"),
    value("model.ffn_dim_multiplier=nan", "model.ffn_dim_multiplier=nan"),
    value("model.ffn_dim_multiplier=inf", "model.ffn_dim_multiplier=inf"),
    value("model.ffn_dim_multiplier=-1", "model.ffn_dim_multiplier=-1.0 leaves the feed-forward no width"),
    value("model.rope_theta=0", "model.rope_theta=0"),
    value("model.rope_theta=nan", "model.rope_theta=nan"),
    value("model.norm_eps=nan", "model.norm_eps=nan"),
    value("model.norm_eps=-1", "model.norm_eps=-1"),
    value("model.init_base_std=nan", "model.init_base_std=nan"),
    value("model.sliding_window=0", "model.sliding_window=0"),
    value("model.vocab_size=0", "model.vocab_size=0 is smaller than the tokenizer's 258"),
    value("model.vocab_size=257", "model.vocab_size=257 is smaller than the tokenizer's 258"),
    value("model.topk.k=0", "model.topk.k=0 is too small"),
    value("model.topk.k=-1", "model.topk.k=-1 is too small"),
    value("model.topk.k=2.5", "model.topk.k (in the command line): Value '2.5'"),
    value("model.topk.k=true", "model.topk.k"),
    value("model.topk.n_last_nontopk=3", "model.topk.n_last_nontopk=3 leaves no TopK block", "at most 2"),
    value("model.topk.n_last_nontopk=99999999999999999999", "leaves no TopK block"),
    value("model.topk.n_last_nontopk=-1", "model.topk.n_last_nontopk=-1 is too small"),
    value("model.topk.layers=[]", "model.topk.layers=[] leaves no TopK block"),
    value("model.topk.layers=[0,0]", "model.topk.layers=[0, 0] is not a set of blocks"),
    value("model.topk.layers=[-1]", "model.topk.layers=[-1] is not a set of blocks"),
    value("model.topk.layers=[3]", "model.topk.layers=[3] names a block", "0..2"),
    value("model.topk.anneal_ratio=1.5", "model.topk.anneal_ratio=1.5 is out of range"),
    value("model.topk.anneal_ratio=-0.1", "model.topk.anneal_ratio=-0.1 is out of range"),
    value("model.topk.anneal_ratio=nan", "model.topk.anneal_ratio=nan is out of range"),
    value("model.topk.anneal_schedule=sine", "model.topk.anneal_schedule='sine' is not known: choose one of"),
    value("model.topk.site=head", "model.topk.site='head' is not known: choose one of residual, mlp"),
    value("model.topk.activation=RELU", "model.topk.activation='RELU' is not known"),
    value("model.topk.dead_window=0", "model.topk.dead_window=0 is too small"),
    value("optim.lr=nan", "optim.lr=nan is not allowed: give a number of at least 0"),
    value("optim.lr=1e400", "optim.lr=inf is not allowed"),
    value("optim.lr=-1", "optim.lr=-1.0 is not allowed"),
    value("optim.beta1=1", "optim.beta1=1.0 is not allowed: give at least 0 and below 1"),
    value("optim.warmup=-1", "optim.warmup=-1 is not allowed"),
    value("optim.clip=nan", "optim.clip=nan is not allowed"),
    value("optim.scheduler=cosin", "optim.scheduler='cosin' is not known: choose one of"),
    value("distributed.tp_size=2", "distributed.tp_size=2 is not offered by the embedded host"),
    value("distributed.dp_shard=0", "distributed.dp_shard=0 does not divide the 1 processes"),
    value("distributed.dp_shard=7", "distributed.dp_shard=7 does not divide the 1 processes"),
    value("distributed.model_dtype=float32", "distributed.model_dtype='float32' is not known: choose one of"),
    value("distributed.fsdp_type=ddp", "distributed.fsdp_type='ddp' is not known: choose one of"),
    value("save_at=[0]", "save_at=[0] is not allowed: give steps, counted from 1"),
    value("save_at=[-3]", "save_at=[-3] is not allowed"),
    value("save_at=3", "save_at (in the command line)"),
    value("checkpoint.dump.every=0", "checkpoint.dump.every=0 is too small"),
    value("checkpoint.eval.every=-1", "checkpoint.eval.every=-1 is too small"),
    value("checkpoint.dump.keep=-1", "checkpoint.dump.keep=-1 is too small"),
    value("checkpoint.path=config.yaml", "checkpoint.path=config.yaml"),
    value("logging.freq=0", "logging.freq=0 is too small"),
    value("grad_acc_steps=0", "grad_acc_steps=0 is too small"),
    value("gc_collect_freq=0", "gc_collect_freq=0 is too small"),
    value("eval={validation: {window: 99}}", "validation.window=99 is not allowed: give 2 to 32"),
    value("eval={validation: {context: 40}}", "validation.context=40 is not allowed: give 1 to 31"),
    value("eval={validation: {batch_tokens: 0}}", "validation.batch_tokens=0 is too small"),
    value("eval={validation: {sources: [nowhere.jsonl]}}", "nowhere.jsonl is neither a file nor a folder", error="DataError"),
    value("eval={dtype: int4}", "dtype='int4' is not known: choose one of fp64"),
    value("eval={validation: {widow: 3}}", "eval.validation.widow (in the config) is no known key: did you mean window?"),
    value("eval=yes please", "eval"),
    value("eval=[1]", "eval"),
    value("dump_dir=", "dump_dir (in the command line)"),
    value("dump_dir=''", "dump_dir is not set: give a folder"),
    value("dump_dir=config.yaml", "dump_dir=config.yaml", "cannot be written"),
    value("dump_dir=config.yaml/run", "dump_dir=config.yaml/run", "cannot be written"),
    value("dump_dir=/proc/1", "dump_dir=/proc/1", "give another folder"),
    value("dump_dir=" + LONG, "File name too long", error="ConfigError|OSError"),
    value("dump_dir=[a]", "dump_dir"),
    value("dump_dir=plain", "model.topk=", "the run in dump_dir=plain is of a plain model", "another dump_dir"),
    value("dump_dir=wide", "model.dim=32, but the run in dump_dir=wide has 64"),
    value("dump_dir=run", "model.topk=None makes a plain model", "another dump_dir", also="model.topk=null"),
    value("dump_dir=run", "model.topk.k=5, but the run in dump_dir=run has 4", also="model.topk.k=5"),
    value("dump_dir=run", "optim.lr=0.5, but the run in dump_dir=run has 0.01", also="optim.lr=0.5"),
    value("probe_freq=1", "probe_freq=1 is not offered by the embedded host"),
    value("async_eval_gpus=1", "async_eval_gpus=1 is not offered"),
    value("ckpt_dir=''", "ckpt_dir is not set", program="eval"),
    value("dump_dir=", "dump_dir is not set", program="eval"),
    value("dump_dir=config.yaml", "dump_dir=config.yaml cannot be written", program="eval"),
    value("metric_log_dir=config.yaml", "metric_log_dir=config.yaml cannot be written", program="eval"),
    value("dtype=int8", "dtype='int8' is not known: choose one of fp64", program="eval"),
    value("validation.window=33", "validation.window=33 is not allowed: give 2 to 32", program="eval"),
    value("validation.context=16", "validation.context=16 is not allowed: give 1 to 15", program="eval"),
    value("validation.batch_tokens=-1", "validation.batch_tokens=-1 is too small", program="eval"),
    value("validation.max_documents=0", "validation.max_documents=0 is too small", program="eval"),
    value("validation.use_val_from_train_src=false", "validation.sources is empty", program="eval"),
    value("validation.sources=[nowhere]", "nowhere is neither a file nor a folder", program="eval", error="DataError"),
    value("gpus=0", "gpus=0 is not allowed: give at least 1", program="plan"),
    value("mfu=nan", "mfu=nan is not allowed", program="plan"),
    value("peak_tflops=inf", "peak_tflops=inf is not allowed", program="plan"),
    value("memory_gib=-1", "memory_gib=-1.0 is not allowed", program="plan"),
    value("vocab_size=-1", "vocab_size=-1 is not allowed", program="plan"),
    value("model.n_heads=3", "model.n_heads=3 does not divide model.dim=32", program="plan"),
    value("model.topk.k=0", "model.topk.k=0 is too small", program="plan"),
    value("data.seq_len=0", "data.seq_len=0 is too small", program="plan"),
    value("steps=-1", "steps=-1 is too small", program="plan"),
    value("distributed.model_dtype=int8", "distributed.model_dtype='int8' is not known", program="plan"),
    value("gpuz=3", "gpuz (in the command line) is no known key", program="plan"),
    value("steps=0", "steps=0 is too small", program="quickstart"),
    value("model.topk=null", "model.topk and eval cannot be null here", program="quickstart"),
    value("model.topk.k=-1", "model.topk.k=-1 is too small", program="quickstart"),
    value("stepz=3", "stepz (in the command line) is no known key: did you mean steps?", program="quickstart"),
    value("optim.lr=nan", "optim.lr=nan is not allowed", program="quickstart"),
    value("steps=0", "steps=0 is too small: give at least 1", program="host"),
    value("data.root_dir=/nowhere", "text is not a folder in data.root_dir=/nowhere", program="host"),
    value("dump_dir=config.yaml", "dump_dir=config.yaml", program="host"),
    value("model.topk.k=3", "topk", program="host"),
    value("eval={}", "eval is set, but apps.main.train of the embedded host does not evaluate", program="host"),
    value("dump_dir=run", "the run in dump_dir=run", program="host"),
    value("nodes=0", "nodes=0 is too small: give at least 1", program="stool"),
    value("time=0", "time=0 is not allowed", program="stool"),
    value("script=os;ls", "script='os;ls' is no module", program="stool"),
    value("script=apps.nowhere", "script=apps.nowhere is not in", program="stool"),
    value("partition=''", "partition='' is empty", program="stool"),
    value('partition="a\\nb"', "partition='a\\nb' has a character that sbatch reads as its own", program="stool"),
    value("anaconda=nowhere", "anaconda=nowhere has no bin/python", program="stool"),
    value("nodez=1", "nodez", "nodes", program="stool"),
    value("nodes=many", "nodes", program="stool"),
]  # fmt: skip


def line(name: str, program: str, words: list[str], *says: str, **more) -> Row:
    """A command line as it stands."""
    return Row(f"{program} line: {name}", program, ["only", *words], says, **more)


def flags(name: str, words: str, *says: str, **more) -> Row:
    return line(name, "prepare", words.split(), *says, **more)


COMMAND_LINES = [
    line("nothing", "train", [], "apps.topk.train needs config=FILE", "--help"),
    line("nothing", "eval", [], "apps.topk.eval needs config=FILE", "--help"),
    line("nothing", "plan", [], "apps.topk.plan needs config=FILE", "--help"),
    line("nothing", "prepare", [], "apps.topk.prepare needs flags"),
    line("nothing", "host", [], "config=FILE"),
    line("no config", "train", ["steps=3"], "config=FILE is missing"),
    line("no config", "host", ["steps=3"], "config=FILE"),
    line("no config", "stool", ["nodes=1"], "config="),
    line("a bare word", "train", ["config.yaml"], "argument 'config.yaml' is not of the form key=value"),
    line("a bare word", "host", ["config=plain.yaml", "steps"], "steps"),
    line("a flag", "train", ["--config=config.yaml"], "argument '--config=config.yaml' is not of the form"),
    line("a flag", "eval", ["--ckpt_dir", "x"], "argument '--ckpt_dir' is not of the form key=value"),
    line("an empty word", "train", ["config=config.yaml", ""], "argument '' is not of the form key=value"),
    line("an empty key", "train", ["config=config.yaml", "=3"], "'=3'"),
    line("a key of dots", "train", ["config=config.yaml", "...=3"], "..."),
    line("a key that ends in a dot", "train", ["config=config.yaml", "model.=3"], "model"),
    line("no file", "train", ["config=nowhere.yaml"], "config=nowhere.yaml is not a file"),
    line("no file", "plan", ["config=nowhere.yaml"], "config=nowhere.yaml is not a file"),
    line("no file", "host", ["config=nowhere.yaml"], "config=nowhere.yaml is not a file"),
    line("no file", "stool", ["config=nowhere.yaml"], "config=nowhere.yaml is not a file"),
    line("a folder as config", "train", ["config=text"], "config=text is not a file"),
    line("a folder as config", "host", ["config=text"], "config=text is not a file"),
    line("an empty config", "train", ["config="], "config=FILE is missing"),
    line("null as config", "train", ["config=null"], "config="),
    line("a list as config", "train", ["config=[a,b]"], "config="),
    line("config twice", "train", ["config=config.yaml", "config=nowhere.yaml"], "config=nowhere.yaml is not a file"),
    line("a config with a long name", "train", ["config=" + LONG], "File name too long", error="ConfigError|OSError"),
    line("a config with a long name", "stool", ["config=" + LONG], "config=", error="ConfigError"),
    line("the terminal's colours", "train", ["config=\x1b]0;owned\x07\x1b[31m.yaml"], "the command line: unacceptable character"),
    line("the terminal's colours", "host", ["config=plain.yaml", "data.root_dir=/\x1b[31mred\r\n"], "unacceptable character"),
    line("the terminal's colours", "stool", ["config=\x1b[31m\n.yaml"], "the command line: unacceptable character"),
    line("the terminal's colours, escaped", "train", ["config=config.yaml", "dump_dir=new", 'data.root_dir="/\\e[31mred\\n"'], "text is not a folder in data.root_dir=/ [31mred"),
    line("the terminal's colours, escaped", "host", ["config=plain.yaml", 'dump_dir="plain.yaml/\\e[31mred\\n"'], "dump_dir=plain.yaml/ [31mred"),
    line("the terminal's colours, escaped", "stool", ['config="\\e[31m\\n.yaml"'], "is not a file"),
    line("a line end in a value", "train", ["config=config.yaml", "dump_dir=new", "model.topk.site=a\nerror: b"], "the command line: mapping values are not allowed"),
    line("Unicode that turns the line around", "train", ["config=\u202efdp.yaml"], "is not a file"),
    line("unknown Unicode key", "train", ["config=config.yaml", "st\xe9ps=3"], "st\xe9ps (in the command line) is no known key: did you mean steps?"),
    line("a long key", "train", ["config=config.yaml", f"{LONG}=3"], "is no known key"),
    line("a surrogate", "train", ["config=\udcff.yaml"], "the command line"),
    line("an open brace", "train", ["config=config.yaml", "model={"], "the command line"),
    line("an interpolation", "train", ["config=config.yaml", "steps=${oc.env:HOSTILE_NOT_SET}"], "HOSTILE_NOT_SET"),
    line("brackets 3,000 deep", "train", ["config=config.yaml", f"steps={DEEP}"], "the command line"),
    line("code as a tag", "train", ["config=config.yaml", f"name=!!python/object/apply:os.mkdir [{MARK}]"], "the command line"),
    line("a bare word", "plan", ["config=config.yaml", "gpus"], "argument 'gpus' is not of the form key=value"),
    line("a bare word", "quickstart", ["quick"], "argument 'quick' is not of the form key=value"),
    flags("a key=value", "source=text", "argument 'source=text' belongs to no flag"),
    flags("unknown flag", "--sauce text --out new", "--sauce is no known flag: did you mean source?"),
    flags("missing flag", "--source text", "--out is missing"),
    flags("no value", "--source text --out", "--out needs a value"),
    flags("twice", "--source text --out new --out newer", "--out is given twice"),
    flags("a word for a number", "--source text --out new --chunks many", "--chunks='many' is not a whole number"),
    flags("no chunks", "--source text --out new --chunks 0", "chunks=0"),
    flags("a share of all", "--source text --out new --val_share 1", "val_share=1"),
    flags("a share that is no number", "--source text --out new --val_share nan", "val_share=nan"),
    flags("a negative vocabulary", "--source text --out new --vocab_size -5", "vocab_size=-5"),
    flags("perhaps", "--source text --out new --overwrite perhaps", "--overwrite='perhaps' is not true or false"),
    flags("a name that leaves the folder", "--source text --out new --name ../x", "name="),
    flags("no source", "--source nowhere --out new", "nowhere", error="DataError|ConfigError"),
    flags("out is a file", "--source text --out config.yaml", "out=", error="DataError|ConfigError"),
]  # fmt: skip


def data(name: str, harm, *says: str, words=(), error="DataError", writes=("new/",), **more) -> Row:
    return Row(f"data: {name}", "train", list(words), says, harm, error, writes, **more)


CHUNK, HELD_OUT = "text/text.chunk.00.jsonl", "text/text.val.jsonl"
TEXT = '{"text": "The quick brown fox."}\n'
EVAL = ["eval={validation: {}}"]

DATA = [
    data("no folder", no_folder("text"), "text is not a folder in data.root_dir=.", error="ConfigError", writes=()),
    data("a file in place of the folder", every(no_folder("text"), write("text", TEXT)), "text is not a folder", error="ConfigError", writes=()),
    data("a folder without chunks", on(CHUNK, removed), "text holds no file called *.chunk.*.jsonl", writes=()),
    data("a folder in place of a chunk", every(on(CHUNK, removed), folder(CHUNK)), "text holds no file called", writes=()),
    data("a link to nothing", every(on(CHUNK, removed), link(CHUNK, "nowhere")), CHUNK, "cannot be read", writes=()),
    data("a link to itself", every(on(CHUNK, removed), link(CHUNK, "text.chunk.00.jsonl")), CHUNK, "cannot be read", writes=()),
    data("an empty chunk", on(CHUNK, emptied), CHUNK),
    data("a chunk of blank lines", write(CHUNK, "\n" * 200), CHUNK),
    data("all lines malformed", write(CHUNK, "{\n" * 200), CHUNK, "malformed", "line 1"),
    data("half of the lines malformed", write(CHUNK, (TEXT + "{\n") * 90), CHUNK, "malformed, more than data.max_malformed=0.1 allows", words=["steps=20"]),
    data("binary", write(CHUNK, bytes(range(256)) * 400), CHUNK, "malformed"),
    data("one line of 3 MB, binary", write(CHUNK, bytes(range(1, 10)) * 333_333), CHUNK),
    data("gzip called .jsonl", write(CHUNK, b"\x1f\x8b\x08" + os.urandom(20_000)), CHUNK),
    data("UTF-16", write(CHUNK, (TEXT * 200).encode("utf-16")), CHUNK, "malformed"),
    data("a JSON array", write(CHUNK, "[" + ",\n".join([TEXT.strip()] * 200) + "]"), CHUNK, "malformed"),
    data("JSON that is no object", write(CHUNK, '"text"\n' * 200), CHUNK, "not a JSON object"),
    data("no text key", write(CHUNK, '{"body": "x"}\n' * 200), CHUNK, "no string under 'text' or 'content'"),
    data("a text that is a number", write(CHUNK, '{"text": 3}\n' * 200), CHUNK, "no string under"),
    data("brackets 100,000 deep", write(CHUNK, ("[" * 100_000 + "\n") * 20), CHUNK, "not JSON"),
    data("a number of 5,000 digits", write(CHUNK, ('{"text": ' + "9" * 5000 + "}\n") * 20), CHUNK),
    data("one malformed line where none is allowed", write(CHUNK, TEXT * 20 + "{\n"), f"{CHUNK}", "data.max_malformed=0 allows", words=["data.max_malformed=0"]),
    data("no validation file", on(HELD_OUT, removed), "text is neither a file nor a folder with *.val.jsonl files", words=EVAL, writes=()),
    data("an empty validation file", on(HELD_OUT, emptied), HELD_OUT, words=EVAL),
    data("a malformed validation file", write(HELD_OUT, "{\n" * 9), HELD_OUT, words=EVAL),
]  # fmt: skip


def held_out(name: str, harm, *says: str, words=(), **more) -> Row:
    return Row(
        f"eval data: {name}", "eval", list(words), says, harm, "DataError", ("new/",), **more
    )


EVAL_DATA = [
    held_out("no file", on(HELD_OUT, removed), "text is neither a file nor a folder with *.val.jsonl"),
    held_out("an empty file", on(HELD_OUT, emptied), "text"),
    held_out("malformed", write(HELD_OUT, "{\n" * 9), HELD_OUT, "none of its 9 lines gives a document"),
    held_out("binary", write(HELD_OUT, bytes(range(256)) * 40), HELD_OUT),
    held_out("UTF-16", write(HELD_OUT, TEXT.encode("utf-16")), HELD_OUT),
    held_out("no text key", write(HELD_OUT, '{"body": "x"}\n'), HELD_OUT, "its keys are 'body'"),
    held_out("empty texts", write(HELD_OUT, '{"text": ""}\n' * 3), HELD_OUT),
    held_out("gzip cut short", every(write("more.jsonl.gz", b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03abc")), "more.jsonl.gz", words=["validation.sources=[more.jsonl.gz]"]),
    held_out("a kind of file that it does not read", every(write("more.pdf", b"%PDF")), "more.pdf", words=["validation.sources=[more.pdf]"]),
]  # fmt: skip


def tokenizer(name: str, kind: str, path: str, harm, *says: str, program="train", **more) -> Row:
    words = [f"data.tokenizer.name={kind}", f"data.tokenizer.path={path}"]
    return Row(f"{program} tokenizer: {kind}, {name}", program, words, says, harm, **more)


SP = "tokenizers/sp.model"
TOKENIZERS = [
    tokenizer("no file", "sp", "nowhere.model", None, "data.tokenizer.path=nowhere.model is not a file"),
    tokenizer("a folder", "sp", "tokenizers", None, "data.tokenizer.path=tokenizers is not a file"),
    tokenizer("a long path", "sp", LONG, None, "File name too long", error="ConfigError|OSError"),
    tokenizer("empty", "sp", SP, on(SP, emptied), f"data.tokenizer.path={SP} is no SentencePiece model"),
    tokenizer("truncated", "sp", SP, on(SP, truncated), f"data.tokenizer.path={SP} is no SentencePiece model"),
    tokenizer("random", "sp", SP, write(SP, bytes(range(256)) * 30), f"{SP} is no SentencePiece model"),
    tokenizer("a text", "sp", "config.yaml", None, "config.yaml is no SentencePiece model"),
    tokenizer("a JSON", "sp", f"{NEWEST}/params.json", None, "is no SentencePiece model"),
    tokenizer("a file of tiktoken", "sp", SP, write(SP, "IQ== 0\nIg== 1\n"), f"{SP} is no SentencePiece model"),
    tokenizer("no file", "tiktoken", "nowhere", None, "data.tokenizer.path=nowhere is not a file"),
    tokenizer("empty", "tiktoken", SP, on(SP, emptied), f"data.tokenizer.path={SP}", "not 0, 1, 2"),
    tokenizer("a file of SentencePiece", "tiktoken", SP, None, f"data.tokenizer.path={SP} line 2 is not a token in base64"),
    tokenizer("ranks with a gap", "tiktoken", SP, write(SP, "IQ== 0\nIg== 2\n"), "not 0, 1, 2"),
    tokenizer("too few ranks", "tiktoken", SP, write(SP, "IQ== 0\nIg== 1\n"), "254 of the 256 bytes are no token"),
    tokenizer("unknown kind", "gpt2", SP, None, "data.tokenizer.name='gpt2' is not known: choose one of bytes, sp"),
    tokenizer("no file", "sp", "nowhere.model", None, "nowhere.model", "vocab_size=N", program="plan"),
    tokenizer("random", "sp", SP, write(SP, bytes(range(256)) * 30), f"{SP} is no SentencePiece model", program="plan"),
    tokenizer("truncated", "sp", SP, on(SP, truncated), f"{SP} is no SentencePiece model", program="host"),
]  # fmt: skip

FILES = [".metadata", "__0_0.distcp", "params.json", "train_state_00000.json", "manifest.json"]
DAMAGES = [truncated, emptied, flipped, removed]


def checkpoint(name: str, harm, *says: str, path=NEWEST, words=(), **more) -> Row:
    """A checkpoint that is evaluated."""
    more = {"error": "CheckpointError", **more}
    return Row(f"ckpt_dir: {name}", "eval", [f"ckpt_dir={path}", *words], says, harm, **more)


def initial(name: str, harm, *says: str, path=NEWEST, words=(), program="train", **more) -> Row:
    """A checkpoint whose weights a new run begins with."""
    more = {"error": "CheckpointError", **more}
    words = [f"checkpoint.init_ckpt_path={path}", *words]
    return Row(f"{program} init_ckpt_path: {name}", program, words, says, harm, **more)


DAMAGED_FILES = [
    *(
        checkpoint(f"{file} {damage.__name__}", on(f"{NEWEST}/{file}", damage), NEWEST)
        for file in FILES
        for damage in DAMAGES
        if (file, damage) not in [("manifest.json", removed)]  # as Meta Lingua writes it
    ),
    *(
        initial(f"{file} {damage.__name__}", on(f"{NEWEST}/{file}", damage), NEWEST)
        for file in [".metadata", "__0_0.distcp"]
        for damage in DAMAGES
    ),
]


CHECKPOINTS = [
    checkpoint("no folder", None, "ckpt_dir='nowhere' is not a folder", path="nowhere"),
    checkpoint("a file", None, "ckpt_dir='config.yaml' is not a folder", path="config.yaml"),
    checkpoint("a long name", None, "File name too long", path=LONG, error="CheckpointError|OSError"),
    checkpoint("an empty folder", folder("hollow"), "ckpt_dir='hollow' holds neither .metadata nor", path="hollow"),
    checkpoint("a folder of text", None, "ckpt_dir='text' holds neither", path="text"),
    checkpoint("the run's folder", None, "holds neither", f"for example {NEWEST}", path="run"),
    checkpoint("the folder of all checkpoints", None, "holds neither", f"for example {NEWEST}", path="run/checkpoints"),
    checkpoint("a file of the checkpoint", None, "is not a folder", path=f"{NEWEST}/.metadata"),
    checkpoint("a link to itself", link("loop", "loop"), "ckpt_dir='loop' is not a folder", path="loop"),
    checkpoint("files linked to themselves", every(on(f"{NEWEST}/params.json", removed), link(f"{NEWEST}/params.json", "params.json")), "params.json"),
    checkpoint("weights linked to themselves", every(on(f"{NEWEST}/__0_0.distcp", removed), link(f"{NEWEST}/__0_0.distcp", "__0_0.distcp")), "__0_0.distcp"),
    checkpoint("a manifest that is a list", write(f"{NEWEST}/manifest.json", "[]"), "manifest.json cannot be read"),
    checkpoint("a manifest of nothing", write(f"{NEWEST}/manifest.json", '{"files": {}}'), "manifest.json"),
    checkpoint("a manifest that leaves", write(f"{NEWEST}/manifest.json", '{"files": {"../../../config.yaml": {"bytes": 1, "sha256": "a"}}}'), "manifest.json lists what is no file of it"),
    checkpoint("a manifest of an absolute path", write(f"{NEWEST}/manifest.json", '{"files": {"/etc/passwd": {"bytes": 1, "sha256": "a"}}}'), "manifest.json lists what is no file of it"),
    checkpoint("a manifest with strings", write(f"{NEWEST}/manifest.json", '{"files": {".metadata": "x"}}'), "manifest.json"),
    checkpoint("a manifest, binary", write(f"{NEWEST}/manifest.json", b"\xff\xfe\x00"), "manifest.json cannot be read"),
    checkpoint("a manifest 100,000 deep", write(f"{NEWEST}/manifest.json", "[" * 100_000), "manifest.json cannot be read"),
    checkpoint("params.json 100,000 deep", write(f"{NEWEST}/params.json", "[" * 100_000), "params.json is not the config of a training run"),
    checkpoint("weights of another step", copy(f"{OLDEST}/__0_0.distcp", f"{NEWEST}/__0_0.distcp"), "__0_0.distcp is not as it was written"),
    checkpoint("an index of another run", copy(f"{WIDE}/.metadata", f"{NEWEST}/.metadata"), ".metadata"),
    checkpoint("an index of another run, no manifest", every(copy(f"{WIDE}/.metadata", f"{NEWEST}/.metadata"), on(f"{NEWEST}/manifest.json", removed)), NEWEST),
    checkpoint("weights cut short, no manifest", every(on(f"{NEWEST}/__0_0.distcp", truncated), on(f"{NEWEST}/manifest.json", removed)), "__0_0.distcp has"),
    checkpoint("a flipped bit, no manifest", every(flipped_weight(NEWEST), on(f"{NEWEST}/manifest.json", removed)), NEWEST),
    checkpoint("index emptied, no manifest", every(on(f"{NEWEST}/.metadata", emptied), on(f"{NEWEST}/manifest.json", removed)), ".metadata cannot be read"),
    checkpoint("params of another width", params(NEWEST, lambda p: p["model"].update(dim=64)), "is of another model"),
    checkpoint("params of other layers", params(NEWEST, lambda p: p["model"].update(n_layers=2)), "is of another model"),
    checkpoint("params of a wide vocabulary", params(NEWEST, lambda p: p["model"].update(vocab_size=300)), "is of another model"),
    checkpoint("params of a small vocabulary", params(NEWEST, lambda p: p["model"].update(vocab_size=100)), "its tokenizer (bytes, None) now has 258 tokens"),
    checkpoint("params of heads that do not divide", params(NEWEST, lambda p: p["model"].update(n_heads=3)), "model.n_heads=3", error="ConfigError|CheckpointError"),
    checkpoint("params of an unknown key", params(NEWEST, lambda p: p["model"].update(moe=True)), "params.json: model is not one that this version knows"),
    checkpoint("params with a string for a number", params(NEWEST, lambda p: p["model"].update(dim="wide")), "params.json: model is not one that this version knows"),
    checkpoint("params with a list for a number", params(NEWEST, lambda p: p["model"].update(dim=[32])), "params.json"),
    checkpoint("params with a k of 0", params(NEWEST, lambda p: p["model"]["topk"].update(k=0)), "model.topk.k=0", error="ConfigError|CheckpointError"),
    checkpoint("params with a string for topk", params(NEWEST, lambda p: p["model"].update(topk="yes")), "params.json"),
    checkpoint("params with a negative window", params(NEWEST, lambda p: p["model"].update(max_seqlen=-1)), "", error="ConfigError|CheckpointError"),
    checkpoint("params without the model", params(NEWEST, lambda p: p.pop("model")), "params.json is not the config of a training run ('model' is missing)"),
    checkpoint("params without sources", params(NEWEST, lambda p: p["data"].pop("sources")), "params.json"),
    checkpoint("params with sources that are a number", params(NEWEST, lambda p: p["data"].update(sources=3)), "params.json"),
    checkpoint("params without a dtype", params(NEWEST, lambda p: p["distributed"].pop("model_dtype")), "params.json"),
    checkpoint("params with a dtype that is a list", params(NEWEST, lambda p: p["distributed"].update(model_dtype=["fp32"])), "params.json"),
    checkpoint("params with an interpolation", params(NEWEST, lambda p: p["model"].update(dim="${oc.env:HOSTILE_NOT_SET}")), "params.json"),
    checkpoint("params with a tokenizer of lists", params(NEWEST, lambda p: p["data"].update(tokenizer={"name": ["sp"]})), "", error="ConfigError|CheckpointError"),
    checkpoint("the tokenizer gone", params(NEWEST, lambda p: p["data"].update(tokenizer={"name": "sp", "path": "gone.model"})), "gone.model is not a file", error="ConfigError|CheckpointError"),
    checkpoint("another tokenizer", params(NEWEST, lambda p: p["data"].update(tokenizer={"name": "sp", "path": SP})), f"its tokenizer (sp, {SP}) now has", "tokens, the model 258"),
    checkpoint("a NaN", not_a_number(NEWEST), "norm.weight holds NaN or infinite values; use an earlier checkpoint"),
    checkpoint("an index that is code", pickled(f"{NEWEST}/.metadata"), ".metadata"),
    checkpoint("an index that is code, no manifest", every(pickled(f"{NEWEST}/.metadata"), on(f"{NEWEST}/manifest.json", removed)), ".metadata cannot be read"),
    checkpoint("an index that is code, forged manifest", every(pickled(f"{NEWEST}/.metadata"), sealed(NEWEST)), ".metadata cannot be read"),
    checkpoint("consolidated weights that are code", pickled_by_torch(f"{PLAIN}/consolidated/consolidated.pth"), "consolidated.pth", path=f"{PLAIN}/consolidated"),
    checkpoint("consolidated weights that are a bare pickle", pickled(f"{PLAIN}/consolidated/consolidated.pth"), "consolidated.pth", path=f"{PLAIN}/consolidated"),
    *(
        checkpoint(f"consolidated weights {damage.__name__}", on(f"{PLAIN}/consolidated/consolidated.pth", damage), "consolidated", path=f"{PLAIN}/consolidated")
        for damage in DAMAGES
    ),
    initial("no folder", None, "checkpoint.init_ckpt_path: nowhere is not a distributed checkpoint", path="nowhere"),
    initial("a file", None, "checkpoint.init_ckpt_path: config.yaml is not", path="config.yaml"),
    initial("the run's folder", None, "checkpoint.init_ckpt_path: run is not", path="run"),
    initial("a consolidated folder", None, "is not a distributed checkpoint", path=f"{PLAIN}/consolidated"),
    initial("another width", None, "is of another model: layers.0.attention.wk.weight is [64, 64] there and [32, 32] here", path=WIDE),
    initial("other layers", None, "is of another model", words=["model.n_layers=4"]),
    initial("a TopK model for a plain one", None, "is of a TopK model", program="host"),
    initial("a NaN", not_a_number(NEWEST), "NaN", writes=("new/",)),
    initial("an index that is code", pickled(f"{NEWEST}/.metadata"), ".metadata"),
    initial("an index that is code, no manifest", every(pickled(f"{NEWEST}/.metadata"), on(f"{NEWEST}/manifest.json", removed)), ".metadata"),
    initial("an index that is code", pickled(f"{PLAIN}/.metadata"), ".metadata", path=PLAIN, program="host"),
]  # fmt: skip


def resumed(
    name: str, harm, *says: str, words=(), error="CheckpointError", program="train", run="run"
) -> Row:
    """A run that is started again with nothing whole to go on from."""
    words = [f"dump_dir={run}", "steps=6", *words]
    writes = tuple(f"{run}{name}" for name in BEGUN) if error == "CheckpointError" else ()
    return Row(f"{program} resume: {name}", program, words, says, harm, error, writes)


BOTH = [NEWEST, OLDEST]
# The run is begun, and says so, before it looks at more than params.json. Of folders, the time.
BEGUN = ("", "/checkpoints", "/config.yaml", "/provenance.json", "/train.log")


def both(file: str, damage):
    return every(*(on(f"{path}/{file}", damage) for path in BOTH))


RESUMED = [
    *(
        resumed(f"all {file} {damage.__name__}", both(file, damage), "none is whole", "put one back, or move the folder away")
        for file, damage in [
            ("__0_0.distcp", truncated), ("__0_0.distcp", emptied), ("__0_0.distcp", flipped),
            ("__0_0.distcp", removed), (".metadata", truncated), (".metadata", flipped),
            ("train_state_00000.json", flipped), ("train_state_00000.json", emptied),
            ("manifest.json", truncated), ("manifest.json", emptied),
        ]
    ),
    *(resumed(f"all {file} removed", both(file, removed), "none is whole") for file in FILES[:1] + FILES[2:4]),
    resumed("all params.json truncated", both("params.json", truncated), "params.json"),
    resumed("all params.json flipped", both("params.json", flipped), "params.json", "put one back, or move the folder away"),
    resumed("all indices are code", every(*(pickled(f"{path}/.metadata") for path in BOTH)), "none is whole"),
    resumed("all indices are code, no manifest", every(both("manifest.json", removed), *(pickled(f"{path}/.metadata") for path in BOTH)), "none is whole"),
    resumed("objects that are code", every(*(code_in_objects(path) for path in BOTH)), "cannot be loaded"),
    resumed("all weights of another run", every(*(copy(f"{WIDE}/__0_0.distcp", f"{path}/__0_0.distcp") for path in BOTH)), "none is whole"),
    resumed("the checkpoints of another run", every(no_folder("run/checkpoints"), move("wide/checkpoints", "run/checkpoints")), "model.dim=32, but the run in dump_dir=run has 64", error="ConfigError"),
    resumed("the checkpoints of a plain run", every(no_folder("run/checkpoints"), move("plain/checkpoints", "run/checkpoints")), "is of a plain model", error="ConfigError"),
    resumed("checkpoints is a file", every(no_folder("run/checkpoints"), write("run/checkpoints", "x")), "cannot be written", error="ConfigError"),
    resumed("a plain run goes on with a damaged one", on(f"{PLAIN}/__0_0.distcp", flipped), "none is whole", program="host", run="plain"),
    Row("quickstart: the config of an earlier run is binary", "quickstart", [], ("dumps/quickstart/topk/config.yaml",), write("dumps/quickstart/topk/config.yaml", b"\xff\x00")),
    Row("quickstart: the config of an earlier run has no model", "quickstart", [], ("dumps/quickstart/topk",), write("dumps/quickstart/topk/config.yaml", "steps: 3\n")),
    Row("quickstart: the config of an earlier run is a list", "quickstart", [], ("dumps/quickstart/topk",), write("dumps/quickstart/topk/config.yaml", "- 3\n")),
    Row("quickstart: the config of an earlier run is of another kind", "quickstart", [], ("dumps/quickstart/topk",), write("dumps/quickstart/topk/config.yaml", "model: 3\n")),
]  # fmt: skip

ROWS = [
    *CONFIG_FILES, *VALUES, *COMMAND_LINES, *DATA, *EVAL_DATA, *TOKENIZERS, *DAMAGED_FILES,
    *CHECKPOINTS, *RESUMED,
]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The place from which every row takes its copy."""
    root = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("OMP_NUM_THREADS", "1")
        build(root)
    return root


@pytest.fixture
def place(whole, tmp_path, monkeypatch):
    """A copy of it, where the programs run."""
    root = tmp_path / "place"
    shutil.copytree(whole, root, symlinks=True)
    monkeypatch.chdir(root)
    return root


def check_text(row: Row, text: str) -> None:
    lines = text.splitlines()
    errors = [one for one in lines if one.startswith("error: ")]
    assert len(errors) == 1, text
    assert row.writes or len(lines) == 1, text  # a run that began warns before
    assert "Traceback" not in text
    assert all(c.isprintable() or c == "\n" for c in text), repr(text)
    assert len(errors[0]) < 4 * len(LONG)
    for words in row.says:
        assert words in errors[0]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name.encode("unicode_escape").decode())
def test_a_hostile_input_is_answered_by_one_line_and_changes_no_file(
    row, place, monkeypatch, capsys
):
    if row.harm is not None:
        row.harm(place)
    before = snapshot(place, row.writes)
    ended = answer(row, monkeypatch)
    text = capsys.readouterr().err
    assert ended.status == 2, (ended, text)
    assert type(ended.error).__name__ in row.error.split("|")
    check_text(row, text)
    after = snapshot(place, row.writes)
    assert [name for name in {*before, *after} if before.get(name) != after.get(name)] == []
    assert not (place / MARK).exists()


def test_there_are_more_than_a_hundred_different_rows():
    assert len({row.name for row in ROWS}) == len(ROWS) > 110


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(
    place, monkeypatch, capsys, name, damage
):
    if (name, damage) == ("manifest.json", removed):
        pytest.skip("a checkpoint without a manifest is one of Meta Lingua's")
    damage(place / NEWEST / name)
    row = Row("", "train", ["dump_dir=run", "steps=5", "checkpoint.dump.every=9"], ())
    ended = answer(row, monkeypatch)
    text = capsys.readouterr().err
    assert ended.status == 0, (ended, text)
    assert f"{NEWEST} is damaged and passed over" in text
    log = (place / "run/train.log").read_text(encoding="utf-8")
    assert f"resuming from {OLDEST}" in log


OUTSIDE = [
    ("train config: code as a tag", []),
    ("ckpt_dir: __0_0.distcp flipped", ["-O"]),
    ("host: 'steps=0'", []),
    ("stool: 'nodes=0'", []),
]


@pytest.mark.parametrize(("name", "options"), OUTSIDE, ids=[name for name, _ in OUTSIDE])
def test_a_process_of_its_own_answers_alike(place, name, options):
    (row,) = (row for row in ROWS if row.name == name)
    if row.harm is not None:
        row.harm(place)
    before = snapshot(place, row.writes)
    path = os.pathsep.join([str(ROOT), str(EMBEDDED_ROOT)])
    done = subprocess.run(
        [sys.executable, *options, "-m", MODULES[row.program], *row.argv()],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    check_text(row, done.stderr)
    assert snapshot(place, row.writes) == before
