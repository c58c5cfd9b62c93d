"""Our evaluation of a checkpoint against lm-eval's own HFLM on its export, text by text.

The checkpoints are trained here; those of the quickstart and the real text of ARC, OpenBookQA
and WikiText-2 are added where they are.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from apps.topk import export
from apps.topk.checkpoint import Checkpoint, newest_checkpoint, open_checkpoint
from apps.topk.evaluation.adapter import HarnessModel
from apps.topk.generation import Generator
from apps.topk.sampling import Sampling
from apps.topk.tasks import make_tasks
from lingua_topk.hf import register
from lingua_topk.hf.modeling_topk_lm import TopKLMRMSNorm
from tests.apps import lm_eval_once
from tests.apps.near_ties import least_gap
from tests.apps.real_text import train_on, write_stories

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "dumps" / "quickstart"
SHARED_DATA = Path(os.environ.get("LINGUA_TOPK_SHARED_DATA", ROOT.parent / "shared" / "data"))
KINDS = {"topk": (), "vanilla": ("model.topk=null",)}
ITEMS = 60  # a task
NEAR_TIE = 1e-5


@dataclass
class Evaluated:
    """A checkpoint, its export, and held-out text of the kind that it was trained on."""

    checkpoint: Checkpoint
    export: Path
    tasks: Path
    names: list[str]
    text: Path


@pytest.fixture(scope="module", autouse=True)
def read_once():
    with lm_eval_once.read_once():
        yield


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    return write_stories(tmp_path_factory.mktemp("stories"))


@pytest.fixture(scope="module", params=[*KINDS, *(f"quickstart-{kind}" for kind in KINDS)])
def evaluated(request, stories, tmp_path_factory):
    where, _, kind = request.param.rpartition("-")
    folder = tmp_path_factory.mktemp("run")
    if where:
        if not (QUICKSTART / kind / "checkpoints").is_dir():
            pytest.skip(f"needs {QUICKSTART}: run ./setup.sh quickstart first")
        checkpoint = newest_checkpoint(QUICKSTART / kind)
        text = ROOT / "data" / "quickstart" / "python-docs"
    else:
        checkpoint, text = train_on(stories, folder / "run", *KINDS[kind]), stories / "text"
    assert (open_checkpoint(checkpoint).model_args.topk is None) == (kind == "vanilla")
    export.main(["--ckpt", str(checkpoint), "--out", str(folder / "hf")])
    made = make_tasks(out=str(folder / "tasks"), text=str(text), name="held", max_items=ITEMS)
    register()
    (held_out,) = text.glob("*.val.jsonl")
    names = list(made["tasks"])
    return Evaluated(open_checkpoint(checkpoint), folder / "hf", folder / "tasks", names, held_out)


class Recording(HarnessModel):
    """Also keeps the token ids that lm-eval arrived at, in the order of the answers."""

    def _loglikelihood_tokens(self, requests, **kwargs):
        self.asked = [(context, end) for _, context, end in requests]
        return super()._loglikelihood_tokens(requests, **kwargs)


def ours(evaluated, dtype, batch_tokens=1024):
    checkpoint = evaluated.checkpoint
    model = checkpoint.model("cpu", dtype)
    window = checkpoint.model_args.max_seqlen
    return Recording(model, checkpoint.tokenizer(), window, batch_tokens)


def theirs(evaluated, dtype, rolling=False):
    """lm-eval's own, which predicts bos after bos in rolling texts unless it is told."""
    model = AutoModelForCausalLM.from_pretrained(evaluated.export, dtype=dtype).eval()
    if dtype == torch.float64:
        with_float64_norms(model)
    tokenizer = AutoTokenizer.from_pretrained(evaluated.export)
    window = evaluated.checkpoint.model_args.max_seqlen
    return HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=8, max_length=window,
        add_bos_token=False if rolling else None,
    )  # fmt: skip


def with_float64_norms(model):
    """Llama's norm computes in float32 whatever its input, which is not what is compared."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LlamaRMSNorm):
            norm = TopKLMRMSNorm(len(module.weight), module.variance_epsilon)
            norm.weight = module.weight
            model.set_submodule(name, norm)


def responses(model, folder, task, limit=None):
    """What a model answers in a task: nats by request, and whether each was greedy."""
    results = simple_evaluate(
        model=model, tasks=[task], limit=limit, bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
    )  # fmt: skip
    answers = [one for sample in results["samples"][task] for (one,) in sample["resps"]]
    if not isinstance(answers[0], tuple):  # a rolling task's
        return torch.tensor(answers, dtype=torch.float64), []
    nats, greedy = zip(*answers, strict=True)
    return torch.tensor(nats, dtype=torch.float64), list(greedy)


def both(evaluated, dtype, task, folder=None, limit=None):
    folder = folder or evaluated.tasks
    mine = ours(evaluated, dtype)
    here = responses(mine, folder, task, limit)
    there = responses(
        theirs(evaluated, dtype, "rolling" in task or "wiki" in task), folder, task, limit
    )
    assert len(here[0]) == len(there[0]) > 0
    return mine, here, there


def samples(evaluated, rows=200, length=64):
    """Held-out text in pieces, int64 [rows, length]; a piece is a sample."""
    lines = evaluated.text.read_text("utf-8").splitlines()
    encode = evaluated.checkpoint.tokenizer().encode
    ids = [i for line in lines for i in encode(json.loads(line)["text"], True, False)]
    starts = torch.randint(len(ids) - length, (rows,), generator=torch.Generator().manual_seed(0))
    return torch.stack([torch.tensor(ids[start : start + length]) for start in starts.tolist()])


def models(evaluated, dtype):
    return evaluated.checkpoint.model("cpu", dtype), theirs(evaluated, dtype).model


def test_logits(evaluated):
    x = samples(evaluated)
    mine, other = models(evaluated, torch.float64)
    with torch.no_grad():
        difference = (mine(x) - other(x).logits).abs().max().item()
    print(f"\nlogits: largest difference {difference} in float64")
    assert difference < 1e-8
    mine32, other32 = models(evaluated, torch.float32)
    with torch.no_grad():
        by_sample = (mine32(x) - other32(x).logits).abs().amax(dim=(1, 2))  # [rows]
    exceptions = (by_sample >= 1e-4).nonzero().flatten().tolist()
    print(f"{len(exceptions)} exceptions of {len(x)} in float32, largest {by_sample.max()}")
    if evaluated.checkpoint.model_args.topk is None:
        assert not exceptions
    assert len(exceptions) <= len(x) / 100
    for row in exceptions:
        assert least_gap(mine, x[row].tolist()) < NEAR_TIE


def test_greedy_generations(evaluated):
    """With a cache and without, ours and theirs."""
    mine, other = models(evaluated, torch.float64)
    prompts = samples(evaluated, rows=6, length=9)
    tokenizer = evaluated.checkpoint.tokenizer()
    special = [tokenizer.bos_id, tokenizer.eos_id]
    cached = Generator(mine, tokenizer).generate_tokens(
        prompts.tolist(), Sampling(max_tokens=24, ignore_eos=True)
    )
    for prompt, generation in zip(prompts, cached, strict=True):
        ids = prompt.tolist()
        for token in generation.tokens:
            with torch.no_grad():
                logits = mine(torch.tensor([ids]))[0, -1]
            logits[special] = -torch.inf
            assert token == logits.argmax()
            ids.append(token)
        for use_cache in (True, False):
            found = other.generate(
                prompt[None], max_new_tokens=24, do_sample=False, use_cache=use_cache,
                suppress_tokens=special,
            )  # fmt: skip
            assert found[0, len(prompt) :].tolist() == generation.tokens


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["continuation", "last_word", "rolling"])
def test_float64(evaluated, suffix):
    assert f"held_{suffix}" in evaluated.names
    _, (here, greedy), (there, also_greedy) = both(evaluated, torch.float64, f"held_{suffix}")
    print(
        f"\n{suffix}: {len(here)} log-likelihoods, largest difference {(here - there).abs().max()}"
    )
    assert (here - there).abs().max() < 1e-6
    assert greedy == also_greedy
    assert here.std() > 1  # they are of all sizes


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["continuation", "last_word"])
def test_float32(evaluated, suffix):
    mine, (here, _), (there, _) = both(evaluated, torch.float32, f"held_{suffix}")
    differences = (here - there).abs()
    exceptions = (differences >= 1e-3).nonzero().flatten().tolist()
    print(f"\n{suffix}: {len(exceptions)} exceptions of {len(here)}, largest {differences.max()}")
    if evaluated.checkpoint.model_args.topk is None:
        assert not exceptions
        return
    assert len(exceptions) <= len(here) / 100
    exact = evaluated.checkpoint.model("cpu", torch.float64)
    for index in exceptions:
        context, continuation = mine.asked[index]
        assert least_gap(exact, [*context, *continuation][:-1]) < NEAR_TIE


REAL = {
    "arc": ("arc", ["local_arc_easy", "local_arc_challenge"]),
    "openbookqa": ("openbookqa/openbookqa.test.jsonl", ["local_openbookqa"]),
    "wikitext": ("wikitext-2/wiki.test.raw", ["local_wikitext"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("source", REAL)
def test_real_text(evaluated, source, tmp_path):
    path, tasks = REAL[source]
    if not (SHARED_DATA / path).exists():
        pytest.skip(f"needs {SHARED_DATA / path}: set LINGUA_TOPK_SHARED_DATA")
    make_tasks(out=str(tmp_path / "tasks"), **{source: str(SHARED_DATA / path)})
    for task in tasks:
        _, (here, greedy), (there, also_greedy) = both(
            evaluated,
            torch.float64,
            task,
            tmp_path / "tasks",
            limit=3 if source == "wikitext" else 40,
        )
        difference = (here - there).abs().max()
        print(f"\n{task}: {len(here)} log-likelihoods, largest difference {difference}")
        assert difference < 1e-6
        assert greedy == also_greedy


@pytest.mark.parametrize("batch_tokens", [1, 64 * 96])
def test_batches_change_nothing(evaluated, batch_tokens):
    """One text at a time, and 64 of them, against the batches between."""
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        here, greedy = responses(
            ours(evaluated, dtype, batch_tokens), evaluated.tasks, "held_continuation"
        )
        there, also_greedy = responses(ours(evaluated, dtype), evaluated.tasks, "held_continuation")
        different = ((here - there).abs() >= tolerance).sum().item()
        flips = sum(a != b for a, b in zip(greedy, also_greedy, strict=True))
        print(f"\n{dtype}: {different} of {len(here)} differ, {flips} are no longer greedy")
        assert different == flips == 0
