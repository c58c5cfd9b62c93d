"""apps.topk.export on trained checkpoints: parity, the folder, and what is refused."""

import json
import logging
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from apps.topk import export as exporting
from apps.topk import hf_folder
from apps.topk.checkpoint import newest_checkpoint, open_checkpoint
from apps.topk.corpus.tokenizer import train_tokenizer
from apps.topk.train import train
from lingua_topk.errors import CheckpointError, ConfigError
from lingua_topk.hf import register
from lingua_topk.hf.modeling_topk_lm import TopKLMRMSNorm
from tests.apps.tiny import SENTENCES, K, train_args, write_corpus

KINDS = {
    "topk": (),
    "mlp": ("model.topk.site=mlp", "model.n_kv_heads=1", "model.weight_tying=true"),
    "twin": ("model.topk=null",),
}
FP32_TOLERANCE = 1e-4
NEAR_TIE = 1e-5


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Trained runs by kind, annealed over 10 of 20 steps, and what they were exported as."""
    root = write_corpus(tmp_path_factory.mktemp("corpus"))
    folder = tmp_path_factory.mktemp("runs")
    handlers = list(logging.getLogger().handlers)
    found = {}
    for kind, overrides in KINDS.items():
        anneal = () if kind == "twin" else ("model.topk.anneal_ratio=0.75",)
        train(train_args(root, folder / kind, "steps=20", *overrides, *anneal))
        checkpoint = newest_checkpoint(folder / kind)
        # One of a TopK model and one of a vanilla one bring it; it is tried on many texts.
        tokenizer = "false" if kind == "mlp" else "true"
        run_export("--ckpt", checkpoint, "--out", folder / f"{kind}-hf", "--tokenizer", tokenizer)
        found[kind] = checkpoint, folder / f"{kind}-hf"
    logging.getLogger().handlers[:] = handlers
    register()
    return found


def run_export(*arguments):
    exporting.main([str(argument) for argument in arguments])


def models(run, dtype):
    """Our model and the exported one, as people load it."""
    checkpoint, folder = run
    ours = open_checkpoint(checkpoint).model("cpu", dtype)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    return ours, theirs


def samples(rows=400, length=32):
    """Text as in training, cut at random places, and some noise: [rows, length]."""
    generator = torch.Generator().manual_seed(0)
    text = torch.tensor(list("".join(SENTENCES * 9).encode()))
    starts = torch.randint(0, len(text) - length, (rows,), generator=generator)
    found = torch.stack([text[start : start + length] for start in starts])
    noise = torch.randint(0, 256, found.shape, generator=generator)
    return torch.where(torch.rand(found.shape, generator=generator) < 0.2, noise, found)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_in_float64(runs, kind):
    ours, theirs = models(runs[kind], torch.float64)
    if kind == "twin":
        # Llama's norm computes in float32 whatever its input (1e-6 here): not what is asked.
        for name, module in list(theirs.named_modules()):
            if isinstance(module, LlamaRMSNorm):
                norm = TopKLMRMSNorm(len(module.weight), module.variance_epsilon)
                norm.weight = module.weight
                theirs.set_submodule(name, norm)
    x = samples()
    with torch.no_grad():
        assert (ours(x) - theirs(x).logits).abs().max() < 1e-8


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_generations_in_float64(runs, kind):
    ours, theirs = models(runs[kind], torch.float64)
    x = samples(4, 8)
    settings = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = x
    with torch.no_grad():
        for _ in range(20):
            expected = torch.cat((expected, ours(expected)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(theirs.generate(x, **settings), expected)
    assert torch.equal(theirs.generate(x, use_cache=False, **settings), expected)


def test_the_twin_in_float32(runs):
    ours, theirs = models(runs["twin"], torch.float32)
    x = samples()
    with torch.no_grad():
        assert (ours(x) - theirs(x).logits).abs().max() < FP32_TOLERANCE


def selections(ours, theirs, x):
    """Of each TopK, in order: what it was given in our model, what survives there and here."""
    given, here, there = [], [], []

    def note_ours(_module, inputs, y):
        given.append(sum(inputs))  # the residual site gets the sum in two parts
        here.append(y != 0)

    def note_theirs(_module, _inputs, y):
        there.append(y != 0)

    notes = {"TopK": (ours, note_ours), "TopKLMTopK": (theirs, note_theirs)}
    hooks = [
        module.register_forward_hook(note)
        for name, (model, note) in notes.items()
        for module in model.modules()
        if type(module).__name__ == name
    ]
    with torch.no_grad():
        differences = (ours(x) - theirs(x).logits).abs().amax(dim=(1, 2))  # [rows]
    for hook in hooks:
        hook.remove()
    return differences, given, here, there


def assert_traced(row, given, here, there):
    """The first selection that differs in a sample is at a near-tie.

    First in depth, and in a depth first in the sequence: what comes later follows from it.
    """
    for x, ours, theirs in zip(given, here, there, strict=True):
        differing = (ours[row] != theirs[row]).any(-1).nonzero()
        if len(differing):
            largest = x[row, differing[0, 0]].topk(K + 1).values
            gap = (largest[K - 1] - largest[K]).abs() / largest[K - 1].abs()
            assert gap < NEAR_TIE, f"sample {row}: {gap}"
            return
    raise AssertionError(f"sample {row} differs though all selections are the same")


@pytest.mark.parametrize("kind", ["topk", "mlp"])
def test_topk_in_float32(runs, kind):
    ours, theirs = models(runs[kind], torch.float32)
    differences, given, here, there = selections(ours, theirs, samples())
    exceptions = (differences >= FP32_TOLERANCE).nonzero().flatten().tolist()
    assert len(exceptions) <= len(differences) / 100
    for row in exceptions:
        assert_traced(row, given, here, there)


def test_a_near_tie_is_an_exception_that_is_traced(runs):
    """Two neurons of block 0 are made to be the same but for a few units in the last place."""
    ours, theirs = models(runs["topk"], torch.float32)
    x = samples()
    _, _, here, _ = selections(ours, theirs, x)
    often = here[0].float().mean((0, 1)).argsort(descending=True)
    one, other = often[3].item(), often[4].item()
    blocks = ours.layers[0], theirs.model.layers[0]
    embeddings = ours.tok_embeddings.weight, theirs.model.embed_tokens.weight
    last = (
        (blocks[0].attention.wo.weight, blocks[0].feed_forward.w2.weight),
        (blocks[1].self_attn.o_proj.weight, blocks[1].mlp.down_proj.weight),
    )
    with torch.no_grad():
        for embedding, writes in zip(embeddings, last, strict=True):
            embedding[:, other] = embedding[:, one]
            for weight in writes:
                weight[other] = weight[one]
        # The smallest difference there is, on one side only.
        embeddings[1][:, other] *= 1 + 2e-7
    differences, given, here, there = selections(ours, theirs, x)
    exceptions = (differences >= FP32_TOLERANCE).nonzero().flatten().tolist()
    assert exceptions
    for row in exceptions:
        assert_traced(row, given, here, there)


WITHOUT_US = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, remote = sys.argv[1], sys.argv[2] == "true"
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=remote)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=remote)
inputs = tokenizer(["The quick", "Every good boy"], return_tensors="pt", padding=True)
model.save_pretrained(folder + "-again")
again = AutoModelForCausalLM.from_pretrained(folder + "-again", trust_remote_code=remote)
x = inputs["input_ids"]
assert torch.equal(model(x).logits, again(x).logits)
ids = model.generate(**inputs, max_new_tokens=5, do_sample=False)
names = {name.partition(".")[0] for name in sys.modules}
print(json.dumps([type(model).__name__, model(x).logits.tolist(), x.tolist(), ids.shape[1],
    sorted(names & {"lingua_topk", "lingua", "apps"})]))
"""


@pytest.mark.parametrize(("kind", "name"), [("topk", "TopKLMForCausalLM"), ("twin", "Llama")])
def test_it_loads_where_this_project_is_not(runs, kind, name, tmp_path):
    checkpoint, folder = runs[kind]
    hidden = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | hidden
    remote = "true" if kind == "topk" else "false"
    program = [sys.executable, "-P" if sys.version_info >= (3, 11) else "-s", "-c", WITHOUT_US]
    done = subprocess.run(
        [*program, str(folder), remote],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    kind_there, logits, ids, length, ours_there = json.loads(done.stdout.splitlines()[-1])
    assert kind_there.startswith(name) and not ours_there
    assert length == len(ids[0]) + 5
    with torch.no_grad():
        expected = open_checkpoint(checkpoint).model("cpu", torch.float32)(torch.tensor(ids))
    torch.testing.assert_close(torch.tensor(logits), expected, rtol=0, atol=FP32_TOLERANCE)


def test_what_the_folder_holds(runs):
    checkpoint, folder = runs["topk"]
    assert {path.name for path in folder.iterdir()} == set(
        "config.json generation_config.json model.safetensors modeling_topk_lm.py provenance.json"
        " tokenizer.json tokenizer_config.json".split()
    )
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert (config["model_type"], config["topk_k"], config["topk_layers"]) == ("topk_lm", K, [0, 1])
    assert (config["bos_token_id"], config["eos_token_id"]) == (256, 257)
    made = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
    assert made["step"] == 20 and made["ckpt"] == str(checkpoint)
    assert made["params"] == json.loads((checkpoint / "params.json").read_text(encoding="utf-8"))
    twin = runs["twin"][1]
    assert not list(twin.glob("*.py"))
    assert type(AutoModelForCausalLM.from_pretrained(twin)) is LlamaForCausalLM


@pytest.mark.parametrize("kind", KINDS)
def test_it_comes_back_as_a_checkpoint(runs, kind, tmp_path):
    checkpoint, folder = runs[kind]
    run_export("--from_hf", folder, "--out", tmp_path / "back")
    before = open_checkpoint(checkpoint).model("cpu", torch.float64).state_dict()
    after = open_checkpoint(tmp_path / "back").model("cpu", torch.float64).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_folder_that_became_another_model_does_not_come_back(runs, tmp_path):
    folder = tmp_path / "hf"
    run_export("--ckpt", runs["topk"][0], "--out", folder, "--tokenizer", "false")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"topk_k": 5}), encoding="utf-8")
    with pytest.raises(CheckpointError, match="topk_k=5"):
        run_export("--from_hf", folder, "--out", tmp_path / "back")
    (folder / "provenance.json").unlink()
    with pytest.raises(CheckpointError, match=r"provenance\.json cannot be read"):
        run_export("--from_hf", folder, "--out", tmp_path / "back")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_inside_the_annealing_phase(runs, tmp_path):
    inside = runs["topk"][0].parent / "0000000010"
    with pytest.raises(CheckpointError, match="annealing phase"):
        run_export("--ckpt", inside, "--out", tmp_path / "hf")
    assert not list(tmp_path.iterdir())
    more = ("--as_trained", "true", "--tokenizer", "false")
    run_export("--ckpt", inside, "--out", tmp_path / "hf", *more)
    checkpoint = open_checkpoint(inside)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float64)
    assert theirs.config.topk_alpha == checkpoint.alpha > 0
    ours, x = checkpoint.model("cpu", torch.float64, as_trained=True), samples(20)
    with torch.no_grad():
        assert (ours(x) - theirs(x).logits).abs().max() < 1e-8


def test_a_sentencepiece_run_brings_its_tokenizer(tmp_path):
    root = write_corpus(tmp_path / "corpus")
    path = tmp_path / "tokenizer.model"
    path.write_bytes(train_tokenizer([*SENTENCES] * 20, 300))
    tokenizer = ("data.tokenizer.name=sp", f"data.tokenizer.path={path}")
    train(train_args(root, tmp_path / "run", "steps=2", *tokenizer, "model.topk=null"))
    checkpoint = newest_checkpoint(tmp_path / "run")
    run_export("--ckpt", checkpoint, "--out", tmp_path / "hf")
    ours = open_checkpoint(checkpoint).tokenizer()
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in (*SENTENCES, "  naïve\n\t🙂 <s>"):
        assert theirs.encode(text) == ours.encode(text, True, False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give one of them"),
        (("--ckpt", "nowhere", "--from_hf", "x"), "give one of them"),
        (("--ckpt", "nowhere"), "is not a folder"),
        (("--from_hf", "nowhere"), "cannot be read"),
        (("--ckpt", "nowhere", "--dtype", "int8"), "dtype='int8'"),
        (("--ckpt", "nowhere", "--as_trained", "perhaps"), "as_trained"),
    ],
)
def test_mistakes_are_named(arguments, message, tmp_path):
    with pytest.raises((ConfigError, CheckpointError), match=message):
        run_export("--out", tmp_path / "hf", *arguments)
    assert not list(tmp_path.iterdir())


def test_a_folder_in_use_is_refused(runs, tmp_path):
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match="not empty"):
        run_export("--ckpt", runs["topk"][0], "--out", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_nothing_is_left_of_an_export_that_fails(runs, tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf_folder, "save_file", full)
    with pytest.raises(ConfigError, match="No space left"):
        run_export("--ckpt", runs["topk"][0], "--out", tmp_path / "hf", "--tokenizer", "false")
    assert not list(tmp_path.iterdir())
