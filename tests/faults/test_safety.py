"""Nothing that comes from a file is run: not by loading it, not by showing it, not by its name."""

import errno
import json
import os
import pickle
import shutil
from pathlib import Path, PosixPath
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex
from torch.serialization import _get_layout

from apps.topk import analyze, cli, export, generate, lingua_host, report, steer, trace
from apps.topk.checkpoint import open_checkpoint
from lingua.checkpoint import consolidate_checkpoints, read_model
from lingua.errors import CheckpointError, UserError
from lingua_topk import errors
from lingua_topk._host.lingua._index import find_code
from lingua_topk._host.lingua._manifest import find_damage
from lingua_topk.analysis.vectors import from_sentence_transformer
from lingua_topk.errors import DataError
from tests.apps.hostile import MARK, Payload, code_in_objects, pickled, seal, undisturbed
from tests.apps.tiny import train_args, write_corpus
from tests.faults.loads import unsafe_loads

ROOT = Path(__file__).resolve().parents[2]
# What reads pickles, and why it may: each limits them, or reads what its own process wrote.
ALLOWED = {
    ("lingua_topk/_host/lingua/_index.py", "pickle._Unpickler"),  # an index's names and steps
    ("lingua_topk/_host/lingua/_background.py", "pickle.loads"),  # of its own child's pipe
}


def test_no_source_file_loads_more_than_data():
    found = {
        (str(path.relative_to(ROOT)), name)
        for folder in ("apps", "lingua_topk")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for _, name in unsafe_loads(path.read_text(encoding="utf-8"))
    }
    assert found == ALLOWED


@pytest.mark.parametrize("source", [
    "import torch\ntorch.load(p)", "import torch\ntorch.load(p, weights_only=False)",
    "import torch as t\nt.load(p, weights_only=some)", "from torch import load as l\nl(p)",
    "import pickle\npickle.load(f)", "from pickle import loads as read\nread(b)",
    "import pickle as p\nclass U(p.Unpickler): pass", "import numpy as np\nnp.load(p)",
    "import numpy\nnumpy.load(p, allow_pickle=True)", "import yaml\nyaml.load(f, yaml.Loader)",
    "import torch.distributed.checkpoint as d\nd.load(s, checkpoint_id=p)",
    "from torch.distributed import checkpoint\ncheckpoint.load(s)", "eval(text)", "exec(text)",
    "import torch.distributed.checkpoint as d\nd.load(s, storage_reader=FileSystemReader(p))",
    "from torch.distributed.checkpoint import FileSystemReader\nFileSystemReader(p)",
    "import subprocess\nsubprocess.run(c, shell=True)", "load(p, trust_remote_code=True)",
    "import joblib\njoblib.load(p)", "import os\nos.system(c)", "__import__(name)",
])  # fmt: skip
def test_what_could_run_a_file_is_found_in_source(source):
    assert list(unsafe_loads(source))


@pytest.mark.parametrize("source", [
    "import torch\ntorch.load(p, weights_only=True)", "model.eval()", "json.load(f)",
    "import numpy as np\nnp.load(p, allow_pickle=False)", "import yaml\nyaml.safe_load(f)",
    "import re\nre.compile(p)", "load(p, trust_remote_code=False)",
    "import torch.distributed.checkpoint as dcp\ndcp.load(s, storage_reader=Reader(p))",
])  # fmt: skip
def test_what_loads_data_alone_is_none(source):
    assert not list(unsafe_loads(source))


# A checkpoint that somebody made to do harm, its manifest in agreement.


def lying_index(path: Path, change) -> None:
    index = dcp.FileSystemReader(path).read_metadata()
    change(index)
    (path / ".metadata").write_bytes(pickle.dumps(index))


def index_that_is_code(path: Path) -> None:
    pickled(".metadata")(path)


def tensor_that_is_code(path: Path) -> None:
    """In place of the embedding's numbers in the .distcp file."""

    def change(index) -> None:
        at = next(at for at in index.storage_data if at.fqn == "model.tok_embeddings.weight")
        place = index.storage_data[at]
        file = path / place.relative_path
        place.offset = file.stat().st_size
        with open(file, "ab") as out:
            torch.save(Payload(), out)
        place.length = file.stat().st_size - place.offset

    lying_index(path, change)


def tensor_called_an_object(path: Path) -> None:
    """An index by which the embedding is an object, which torch's planner unpickles."""
    name = "model.tok_embeddings.weight"
    tensor_that_is_code(path)

    def change(index) -> None:
        (place,) = (place for at, place in index.storage_data.items() if at.fqn == name)
        index.state_dict_metadata[name] = BytesStorageMetadata()
        index.storage_data = {
            **{at: one for at, one in index.storage_data.items() if at.fqn != name},
            MetadataIndex(name): place,
        }

    lying_index(path, change)


def index_that_leaves(path: Path) -> None:
    def change(index) -> None:
        for place in index.storage_data.values():
            place.relative_path = f"../{path.name}/{place.relative_path}"

    lying_index(path, change)


def word(text: str) -> bytes:
    return pickle.SHORT_BINUNICODE + bytes([len(text)]) + text.encode()


def named(module: str, name: str) -> bytes:
    return word(module) + word(name) + pickle.STACK_GLOBAL


def before_an_index(steps: bytes):
    """Harm by steps that are taken before those that make the index."""

    def harm(path: Path) -> None:
        index = (path / ".metadata").read_bytes()
        (path / ".metadata").write_bytes(pickle.PROTO + b"\4" + steps + index)

    return harm


def index_that_changes_a_class(path: Path) -> None:
    """By it PosixPath gets an attribute: __fspath__ would lead all that is written elsewhere."""
    attributes = b"N}" + word(MARK) + pickle.NEWTRUE + b"s" + pickle.TUPLE2
    before_an_index(named("pathlib", "PosixPath") + attributes + pickle.BUILD)(path)


def index_that_changes_a_function(path: Path) -> None:
    attributes = b"}" + word(MARK) + pickle.NEWTRUE + b"s"
    before_an_index(named("torch.serialization", "_get_layout") + attributes + pickle.BUILD)(path)


HARMS = [
    index_that_is_code, tensor_that_is_code, tensor_called_an_object, index_that_leaves,
    index_that_changes_a_class, index_that_changes_a_function,
]  # fmt: skip


def is_unharmed() -> bool:
    """Whether nothing of what the harms are to do has been done."""
    changed = [one for one in (PosixPath, _get_layout) if hasattr(one, MARK)]
    for one in changed:
        delattr(one, MARK)
    return not changed and not Path(MARK).exists()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of four steps, and its analysis."""
    root = write_corpus(tmp_path_factory.mktemp("whole"))
    with pytest.MonkeyPatch.context() as patch, undisturbed():
        patch.chdir(root)
        from apps.topk.train import train

        args = ["steps=4", "checkpoint.dump.every=2", "model.topk.anneal_ratio=0"]
        train(train_args(Path("."), Path("run"), *args))
        analyze.main(["--ckpt", "run", "--tokens", "400", "--device", "cpu", "--quiet",
                      "--min_words", "2"])  # fmt: skip
        export.main(["--ckpt", "run/checkpoints/0000000004", "--out", "hf"])
    return root


@pytest.fixture
def place(whole, tmp_path, monkeypatch):
    """A copy, where the programs run."""
    shutil.copytree(whole, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


NEWEST = Path("run/checkpoints/0000000004")
CPU = ["--device", "cpu"]
PROGRAMS = {
    "generate": (generate.main, ["--ckpt", NEWEST, "--prompt", "The", *CPU]),
    "analyze": (analyze.main, ["--ckpt", NEWEST, "--out", "new", *CPU]),
    "analyze a twin": (analyze.main, ["--ckpt", "run/checkpoints/0000000002", "--twin", NEWEST,
                                      "--out", "new", *CPU]),
    "trace": (trace.main, ["--ckpts", "run", "--out", "new", "--tokens", "400", *CPU]),
    "steer": (steer.main, ["--ckpt", NEWEST, "--neuron", "0:3", "--delta", "1", "--prompt", "The",
                           *CPU]),
    "report": (report.main, ["--run", "run", "--out", "new.html", "--text", "The", *CPU]),
    "export": (export.main, ["--ckpt", NEWEST, "--out", "new"]),
    "import": (export.main, ["--from_hf", "hf", "--out", "new"]),
}  # fmt: skip


def refused(program: str, capsys) -> str:
    """The one line by which the program ends, having run nothing and left nothing."""
    main, words = PROGRAMS[program]
    with undisturbed(), pytest.raises(SystemExit) as ended:
        cli.run(lambda: main([str(one) for one in words]))
    errors = [one for one in capsys.readouterr().err.splitlines() if one.startswith("error: ")]
    assert ended.value.code == 2 and len(errors) == 1
    assert is_unharmed()
    # What was begun is there still where the program can go on with it.
    assert program == "trace" or not list(Path().glob("new*"))
    assert "weights_only" not in errors[0]  # torch's advice is to allow it
    return errors[0]


@pytest.mark.parametrize("harm", HARMS, ids=lambda harm: harm.__name__)
@pytest.mark.parametrize("program", ["generate", "analyze a twin", "trace", "report", "export"])
def test_a_checkpoint_with_code_in_it_is_not_run(place, capsys, harm, program):
    harm(NEWEST)
    seal(NEWEST)
    assert str(NEWEST) in refused(program, capsys)


@pytest.mark.parametrize("program", ["analyze", "steer"])
def test_neither_is_it_by_those_that_read_it_first(place, capsys, program):
    index_that_is_code(NEWEST)
    seal(NEWEST)
    assert str(NEWEST) in refused(program, capsys)


@pytest.mark.parametrize("harm", [*HARMS, code_in_objects], ids=lambda harm: harm.__name__)
def test_what_another_loader_would_run_is_found(place, harm):
    """Meta Lingua loads by torch's own reader, so a checkpoint is looked through before."""
    assert find_code(NEWEST) is None
    harm(NEWEST) if harm is not code_in_objects else code_in_objects(str(NEWEST))(Path())
    if harm is tensor_that_is_code:
        assert find_code(NEWEST) is None  # torch reads tensors as data, as we do
        with pytest.raises(CheckpointError, match="more than plain data, which is not run"):
            read_model(NEWEST)
    else:
        assert find_code(NEWEST)
    assert is_unharmed()


@pytest.mark.parametrize("steps", [
    b"Pid\n", b"(ios\nmkdir\n", b"cos\nmkdir\n", pickle.EXT1 + b"\1",
    pickle.BYTEARRAY8 + b"\0\0\0\0\0\0\0\1", word("a") + pickle.POP,
])  # fmt: skip
def test_an_index_takes_only_the_steps_that_make_one(place, steps):
    before_an_index(steps)(NEWEST)
    assert "it does what is no part of making an index" in find_code(NEWEST)


def test_an_index_changes_only_what_it_has_made(place):
    steps = named("torch", "float32") + b"}" + pickle.BUILD
    before_an_index(steps)(NEWEST)
    assert "it changes a dtype, which is no part of an index" in find_code(NEWEST)
    index_that_changes_a_function(NEWEST)
    assert "it changes a function" in find_code(NEWEST) and is_unharmed()


# What is seen to on Meta Lingua, which loads by torch's own reader.


@pytest.fixture
def on_lingua(monkeypatch):
    monkeypatch.setattr(lingua_host, "is_lingua", lambda: True)


def folder_for_an_index(path: Path) -> None:
    (path / ".metadata").unlink()
    (path / ".metadata").mkdir()


def link_to_nowhere(path: Path) -> None:
    (path / ".metadata").unlink()
    (path / ".metadata").symlink_to("nowhere")


def pipe_for_an_index(path: Path) -> None:
    (path / ".metadata").unlink()
    os.mkfifo(path / ".metadata")


def index_of_a_process_alone(path: Path) -> None:
    (path / ".metadata").rename(path / "__0.metadata")


def index_without_places(path: Path) -> None:
    lying_index(path, lambda index: setattr(index, "storage_data", None))


def index_of_odd_places(path: Path) -> None:
    lying_index(path, lambda index: setattr(index, "storage_data", {"x": "y"}))


def index_of_no_tensors(path: Path) -> None:
    lying_index(path, lambda index: setattr(index, "state_dict_metadata", None))


def compressed_object(path: Path) -> None:
    def change(index) -> None:
        for place in index.storage_data.values():
            place.transform_descriptors = ["stream.zstd"]

    lying_index(path, change)


@pytest.mark.parametrize("harm", [
    folder_for_an_index, link_to_nowhere, pipe_for_an_index, index_of_a_process_alone,
    index_without_places, index_of_odd_places, index_of_no_tensors, compressed_object,
], ids=lambda harm: harm.__name__)  # fmt: skip
def test_another_loader_is_given_no_checkpoint_that_cannot_be_read(place, on_lingua, harm):
    lingua_host.check_without_code(NEWEST)
    harm(NEWEST)
    if not (NEWEST / "__0.metadata").exists():  # to which torch turns then
        (NEWEST / "__0.metadata").write_bytes(pickle.dumps(Payload()))
    assert "cannot be read" in find_code(NEWEST)
    with pytest.raises(errors.CheckpointError, match=f"{NEWEST} is not loaded: .* cannot be read"):
        lingua_host.check_without_code(NEWEST)
    assert not Path(MARK).exists()


def test_a_folder_without_an_index_is_none_of_its_checkpoints(place, on_lingua):
    lingua_host.check_without_code(Path("hf"))


def code_in_its_objects(path: Path) -> None:
    code_in_objects(str(path))(Path())


def index_of_another_torch(path: Path) -> None:
    lying_index(path, lambda index: setattr(index, "planner_data", SimpleNamespace()))


def set_aside(*damaged: str) -> list[str]:
    """What the run's checkpoints are called then."""
    args = SimpleNamespace(dump_dir="run", checkpoint=SimpleNamespace(path=None))
    for name in damaged:
        Path("run/checkpoints", name, "params.json").unlink()
    try:
        lingua_host.set_aside_damaged(args)
    finally:
        found = sorted(path.name for path in Path("run/checkpoints").iterdir())
    return found


@pytest.mark.parametrize("harm", [
    code_in_its_objects, index_of_another_torch, index_that_is_code,
], ids=lambda harm: harm.__name__)  # fmt: skip
@pytest.mark.parametrize("newest", ["whole", "damaged"])
def test_a_run_does_not_begin_anew_over_what_cannot_be_looked_through(
    place, on_lingua, harm, newest
):
    """It may be so with all of the run's checkpoints; only what is damaged is set aside."""
    last = Path("run/checkpoints/0000000006")
    if newest == "damaged":
        shutil.copytree(NEWEST, last)
        (last / "train_state_00000.json").unlink()
    for folder in (NEWEST.with_name("0000000002"), NEWEST):
        harm(folder)
    before = sorted(Path("run/checkpoints").rglob("*"))
    with pytest.raises(
        errors.CheckpointError, match=r"is not loaded: .* move it away to go on"
    ) as found:
        set_aside()
    assert str(found.value).startswith(str(NEWEST))
    assert sorted(Path("run/checkpoints").rglob("*")) == before
    assert not Path(MARK).exists()


def test_neither_does_it_over_a_disk_that_fails(place, on_lingua, monkeypatch):
    def fail(path, *args):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", fail)
        with pytest.raises(
            errors.CheckpointError, match=r"cannot be read .Input/output error.: move it"
        ):
            set_aside()
    assert set_aside() == ["0000000002", "0000000004"]


def test_what_is_damaged_is_set_aside(place, on_lingua):
    assert set_aside("0000000004") == ["0000000002", "damaged_0000000004"]
    code_in_objects("run/checkpoints/0000000002")(Path())
    shutil.copytree("run/checkpoints/damaged_0000000004", NEWEST)
    shutil.copy("run/checkpoints/0000000002/params.json", NEWEST)
    assert set_aside() == ["0000000002", "0000000004", "damaged_0000000004"]  # only older ones


def test_an_index_may_name_files_of_its_own_folder_alone(place):
    index_that_leaves(NEWEST)
    (NEWEST / "manifest.json").unlink()
    assert "no file of it" in find_damage(NEWEST)


@pytest.mark.parametrize("file", [
    "hf/model.safetensors", "run/neurons/model/layers/00.safetensors",
    "run/neurons/model/recording/tokens.safetensors", "run/neurons/analysis.json",
    "run/neurons/model/words/00.jsonl", "hf/config.json", "hf/provenance.json",
])  # fmt: skip
def test_a_pickle_by_another_name_is_not_read(place, capsys, file):
    assert Path(file).is_file()
    pickled(file)(Path())
    program = "import" if file.startswith("hf") else "report"
    assert str(Path(file).parent.parent) in refused(program, capsys)


def test_an_index_of_shards_beside_an_export_is_not_followed(place):
    """`--from_hf` reads model.safetensors of the folder and no other file of weights."""
    index = {
        "weight_map": {"model.embed_tokens.weight": "../../x", "lm_head.weight": "/etc/passwd"}
    }
    Path("hf/model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    Path("hf/pytorch_model.bin").write_bytes(b"no weights")
    with undisturbed():
        export.main(["--from_hf", "hf", "--out", "new"])
    assert read_model("new").keys() == read_model(NEWEST).keys()


def test_a_link_in_a_checkpoint_is_followed_as_long_as_the_content_is_right(place):
    """People keep checkpoints on other disks; what a link leads to is data like any other."""
    (shard,) = NEWEST.glob("*.distcp")
    shard.rename("elsewhere")
    shard.symlink_to(Path("elsewhere").resolve())
    assert find_damage(NEWEST) is None
    assert open_checkpoint(NEWEST).model("cpu", torch.float32)
    shard.unlink()
    shard.symlink_to("/etc/hostname")
    assert shard.name in find_damage(NEWEST)


@pytest.mark.parametrize("kind", [
    "joblib.numpy_pickle", "os.path", "torch.hub", "sentence_transformers.util.torch",
    "sentence_transformers.models", 3, None,
])  # fmt: skip
def test_the_folder_of_a_sentence_model_names_no_code_of_its_own(tmp_path, kind):
    modules = [{"idx": 0, "name": "0", "path": "", "type": kind}]
    (tmp_path / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    with pytest.raises(DataError, match=r"modules\.json"):
        from_sentence_transformer(tmp_path, ["word"])


def test_the_name_of_a_run_is_no_path(place):
    from apps.topk.train import train

    name = "../../x"
    before = {path for path in place.parent.rglob("*") if "new" not in path.parts}
    with undisturbed():
        train(train_args(Path("."), Path("new"), "steps=1", f"name={name}"))
    after = {path for path in place.parent.rglob("*") if "new" not in path.parts}
    assert after == before


@pytest.mark.parametrize("source", ["../place/text", "..", "text/../text", "text/.."])
def test_a_source_of_the_data_is_a_folder_of_its_root(place, source):
    from apps.topk.train import train

    args = train_args(Path("."), Path("new"), "steps=1")
    args.data.sources = {source: 1.0}
    with undisturbed(), pytest.raises(UserError, match=r"data\.sources: .* leads out of"):
        train(args)
    assert not Path("new").exists()


def test_a_consolidated_checkpoint_holds_weights_alone(place, capsys):
    folder = consolidate_checkpoints(NEWEST)
    torch.save(
        {"model": {"norm.weight": torch.ones(32)}, "x": Payload()}, folder / "consolidated.pth"
    )
    PROGRAMS["consolidated"] = (generate.main, ["--ckpt", folder, "--prompt", "The", *CPU])
    assert "consolidated.pth" in refused("consolidated", capsys)
