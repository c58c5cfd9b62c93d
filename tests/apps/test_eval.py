"""The evaluation of a checkpoint: what it reads, what it writes, what it refuses."""

import json
import logging
import math

import pytest
import torch

from apps.topk.checkpoint import DTYPES, newest_checkpoint, open_checkpoint
from apps.topk.eval import EvalArgs, launch_eval
from apps.topk.evaluation.sources import ValidationArgs, find_sources
from apps.topk.train import train
from lingua.checkpoint import consolidate_checkpoints
from lingua_topk import topk_handle
from lingua_topk.errors import CheckpointError, ConfigError, DataError
from tests.apps.tiny import K, train_args, write_corpus


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A corpus and a TopK run of 20 steps with a checkpoint every 10, annealed over 10."""
    root = write_corpus(tmp_path_factory.mktemp("corpus"))
    folder = tmp_path_factory.mktemp("run") / "topk"
    handlers = list(logging.getLogger().handlers)
    train(train_args(root, folder, "steps=20", "model.topk.anneal_ratio=0.75"))
    logging.getLogger().handlers[:] = handlers
    return root, folder


def evaluate(folder, out, step=20, **fields):
    checkpoint = folder / "checkpoints" / f"{step:010d}"
    fields = {"validation": ValidationArgs(window=32, context=8), **fields}
    return launch_eval(EvalArgs(ckpt_dir=str(checkpoint), dump_dir=str(out), **fields))


def by_hand(folder, text_file, as_trained=False, step=20):
    """Mean negative log-likelihood of documents that fit the window, one token at a time."""
    checkpoint = open_checkpoint(folder / "checkpoints" / f"{step:010d}")
    model = checkpoint.model("cpu", torch.float64, as_trained)
    total, count = 0.0, 0
    for line in text_file.read_text(encoding="utf-8").splitlines():
        tokens = checkpoint.tokenizer().encode(json.loads(line)["text"], add_bos=True)
        for t in range(1, len(tokens)):
            logits = model(torch.tensor([tokens[:t]]))[0, -1]
            total -= logits.log_softmax(-1)[tokens[t]].item()
            count += 1
    return total / count


@pytest.fixture(scope="module")
def short_text(tmp_path_factory):
    path = tmp_path_factory.mktemp("short") / "short.jsonl"
    path.write_text('{"text": "The quick brown fox."}\n{"text": "Hé."}\n', encoding="utf-8")
    return path


@pytest.mark.parametrize(("step", "as_trained"), [(20, False), (10, False), (10, True)])
def test_it_equals_what_one_token_at_a_time_gives(trained, short_text, tmp_path, step, as_trained):
    _, folder = trained
    only = ValidationArgs(use_val_from_train_src=False, sources=[str(short_text)])
    result = evaluate(folder, tmp_path, step, validation=only, dtype="fp64", as_trained=as_trained)[
        "short.jsonl"
    ]
    expected = by_hand(folder, short_text, as_trained, step)
    assert result["nll_per_token"] == pytest.approx(expected, abs=1e-9)
    assert result["perplexity"] == pytest.approx(math.exp(expected))
    assert result["tokens"] == result["bytes"] == 20 + 4
    assert result["bits_per_byte"] == pytest.approx(expected / math.log(2))


def test_alpha_is_zero_unless_as_trained(trained):
    _, folder = trained
    inside = open_checkpoint(folder / "checkpoints" / "0000000010")
    assert inside.alpha == pytest.approx(1 - 10 / 15)
    assert topk_handle(inside.model("cpu", torch.float32)).alpha == 0
    assert topk_handle(inside.model("cpu", torch.float32, True)).alpha == inside.alpha
    after = open_checkpoint(folder / "checkpoints" / "0000000020")
    assert after.alpha == 0


def test_what_it_writes(trained, tmp_path):
    root, folder = trained
    evaluate(folder, tmp_path / "out", metric_log_dir=str(tmp_path), global_step=20)
    written = json.loads((tmp_path / "out" / "validation.json").read_text(encoding="utf-8"))
    assert written.keys() == {"text", "provenance"}
    assert written["text"]["l0"].keys() == {"0", "1"}
    assert written["text"]["l0"]["0"] == pytest.approx(K, abs=0.05)
    assert written["provenance"]["step"] == 20
    assert written["provenance"]["host"] == "embedded host"
    (line,) = (tmp_path / "metrics.validation.jsonl").read_text("utf-8").splitlines()
    assert json.loads(line)["text"] == written["text"]
    documents = (root / "text" / "text.val.jsonl").read_text("utf-8").splitlines()
    n_bytes = sum(len(json.loads(one)["text"].encode()) for one in documents)
    assert written["text"]["bytes"] == written["text"]["tokens"] == n_bytes


def test_a_consolidated_checkpoint_is_the_same_model(trained):
    _, folder = trained
    newest = newest_checkpoint(folder)
    consolidated = open_checkpoint(consolidate_checkpoints(newest))
    assert consolidated.step == 20
    one, other = (
        c.model("cpu", torch.float32).state_dict() for c in (open_checkpoint(newest), consolidated)
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16"])
def test_the_model_has_the_dtype_asked_for_and_its_rotary_table_in_float32(trained, dtype):
    _, folder = trained
    model = open_checkpoint(newest_checkpoint(folder)).model("cpu", DTYPES[dtype])
    assert {parameter.dtype for parameter in model.parameters()} == {DTYPES[dtype]}
    assert model.rope_embeddings.freqs_cis.dtype == torch.float32
    assert not model.training


def test_sources_of_the_same_name_are_told_apart(tmp_path):
    for folder in ("a", "b"):
        write_corpus(tmp_path / folder)
    data = {"root_dir": str(tmp_path / "a"), "sources": {"text": 1.0}}
    found = find_sources(ValidationArgs(sources=[f"{tmp_path}/b/text"]), data, "provenance")
    assert set(found) == {f"{tmp_path}/a/text", f"{tmp_path}/b/text"}


def test_max_documents_is_a_limit_a_source(trained, tmp_path):
    _, folder = trained
    result = evaluate(folder, tmp_path, validation=ValidationArgs(max_documents=2))
    assert result["text"]["documents"] == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window": 33}, r"validation.window=33 is not allowed: give 2 to 32"),
        ({"window": 1}, r"validation.window=1 is not allowed"),
        ({"window": 8, "context": 8}, r"validation.context=8 is not allowed: give 1 to 7"),
        ({"batch_tokens": 0}, r"validation.batch_tokens=0 is too small"),
        ({"max_documents": 0}, r"validation.max_documents=0 is too small"),
        ({"use_val_from_train_src": False}, r"validation.sources is empty"),
        ({"sources": ["nowhere"]}, r"nowhere is neither a file nor a folder"),
    ],
)
def test_wrong_settings_are_refused(trained, tmp_path, fields, message):
    _, folder = trained
    with pytest.raises((ConfigError, DataError), match=message):
        evaluate(folder, tmp_path / "out", validation=ValidationArgs(**fields))
    assert not (tmp_path / "out").exists()


def test_unknown_dtype_and_missing_dump_dir_are_refused(trained, tmp_path):
    _, folder = trained
    with pytest.raises(ConfigError, match="dtype='fp8' is not known: choose one of fp64"):
        evaluate(folder, tmp_path, dtype="fp8")
    with pytest.raises(ConfigError, match="dump_dir is not set"):
        evaluate(folder, "")


def test_what_is_no_checkpoint_is_refused(trained, tmp_path):
    _, folder = trained
    with pytest.raises(CheckpointError, match="is not a folder"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"holds neither .* for example .*0000000020"):
        open_checkpoint(folder)
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        newest_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", '{"model": {}}', "not JSON"])
def test_a_damaged_config_is_refused(tmp_path, text):
    (tmp_path / ".metadata").touch()
    (tmp_path / "params.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match="is not the config of a training run"):
        open_checkpoint(tmp_path)


def test_weights_that_are_no_numbers_are_refused(trained, tmp_path):
    _, folder = trained
    params = (newest_checkpoint(folder) / "params.json").read_text(encoding="utf-8")
    (tmp_path / "params.json").write_text(params, encoding="utf-8")
    weights = open_checkpoint(newest_checkpoint(folder)).model("cpu", torch.float32).state_dict()
    weights["norm.weight"][3] = math.nan
    torch.save({"model": weights}, tmp_path / "consolidated.pth")
    with pytest.raises(CheckpointError, match=r"norm\.weight holds NaN"):
        open_checkpoint(tmp_path).model("cpu", torch.float32)


def test_weights_of_another_model_are_refused(trained, tmp_path):
    _, folder = trained
    params = json.loads((newest_checkpoint(folder) / "params.json").read_text("utf-8"))
    params["model"]["dim"] = 64
    (tmp_path / "params.json").write_text(json.dumps(params), encoding="utf-8")
    consolidated = consolidate_checkpoints(newest_checkpoint(folder)) / "consolidated.pth"
    (tmp_path / "consolidated.pth").write_bytes(consolidated.read_bytes())
    with pytest.raises(CheckpointError, match="cannot be loaded into this model"):
        open_checkpoint(tmp_path).model("cpu", torch.float32)
