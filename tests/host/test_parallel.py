"""lingua.parallel, and the collectives: what two processes compute is what one computes.

Run by tests/processes.py this file is the program of the two processes; see `two_processes`.
"""

import logging
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy

from apps.main.transformer import LMTransformer, LMTransformerArgs, build_fsdp_grouping_plan
from lingua.distributed import (
    DistributedArgs,
    dist_max,
    dist_mean,
    dist_mean_dict,
    dist_sum,
    get_device_mesh,
    get_global_rank,
    init_process_group,
    parallelize_model,
    setup_torch_distributed,
)
from lingua.errors import ConfigError
from lingua.parallel import (
    check_model_value_range,
    default_fsdp_grouping_plan,
    get_default_policy,
    get_module,
    set_module,
)
from tests import processes

CPU = torch.device("cpu")

# Odd sizes: two processes cannot share them evenly.
PLAIN = LMTransformerArgs(
    dim=20, n_layers=2, n_heads=2, vocab_size=17, multiple_of=3, max_seqlen=16
)
TIED = LMTransformerArgs(**{**vars(PLAIN), "weight_tying": True})

SETTINGS = {
    "shard": (PLAIN, DistributedArgs(dp_shard=2, fsdp_type="full_shard")),
    "replicate": (PLAIN, DistributedArgs(dp_replicate=2)),
    "shard-over-replicate": (PLAIN, DistributedArgs(dp_replicate=2, fsdp_type="full_shard")),
    "tied": (TIED, DistributedArgs(dp_shard=2, fsdp_type="full_shard")),
    "recompute": (
        PLAIN,
        DistributedArgs(
            dp_shard=2, fsdp_type="full_shard", selective_activation_checkpointing=True
        ),
    ),
}


def batch() -> tuple[Tensor, Tensor]:
    ids = torch.randint(17, (4, 17), generator=torch.Generator().manual_seed(1))
    return ids[:, :-1], ids[:, 1:]


def parallel_model(model_args: LMTransformerArgs, args: DistributedArgs) -> nn.Module:
    """As a training run builds it."""
    with torch.device("meta"):
        model = LMTransformer(model_args)
        if args.model_dtype == "fp64":
            model = model.double()
    plan = build_fsdp_grouping_plan(model_args)
    model = parallelize_model(
        model, get_device_mesh(args), model_args, args, fsdp_grouping_plan=plan
    )
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.detach().fill_(math.nan)
    torch.manual_seed(3)
    model.init_weights()
    return model


def plain_model(model_args: LMTransformerArgs, dtype=torch.float64) -> LMTransformer:
    model = LMTransformer(model_args).to(dtype)
    torch.manual_seed(3)
    model.init_weights()
    return model


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_name(name: str) -> str:
    return name.replace("_checkpoint_wrapped_module.", "")


def observe(model_args: LMTransformerArgs, args: DistributedArgs) -> dict:
    """Weights, gradients, loss and layout of the model, each process with its part of a batch."""
    args.model_dtype = "fp64"
    mesh = get_device_mesh(args)
    model = parallel_model(model_args, args)
    weights = {own_name(name): whole(p.detach()).clone() for name, p in model.named_parameters()}
    ids, target = (x.chunk(dist.get_world_size())[dist.get_rank()] for x in batch())
    loss = model(ids, target)
    loss.backward()
    return {
        "weights": weights,
        "gradients": {own_name(name): whole(p.grad) for name, p in model.named_parameters()},
        "loss": dist_mean(loss.item()).item(),
        "mesh": (mesh.mesh_dim_names, tuple(mesh.shape)),
        "wq": model.layers[0].attention.wq.weight.to_local().shape[0],
        "state": {name: tuple(x.shape) for name, x in model.state_dict().items()},
    }


def collectives() -> dict:
    """Rank 0 brings 1 and [0, 4], rank 1 brings 2 and [10, 0]."""
    rank = get_global_rank()
    one, two = rank + 1, [10 * rank, 4 - 4 * rank]
    mesh = get_device_mesh(DistributedArgs(dp_replicate=2))
    return {
        "mean": (dist_mean(one).item(), dist_mean(two).tolist()),
        "max": (dist_max(one).item(), dist_max(two).tolist()),
        "sum": (dist_sum(one).item(), dist_sum(two).tolist()),
        "mean_dict": dist_mean_dict({"a": one, "b": two}),
        "over replicas": dist_sum(one, mesh["dp_replicate"]).item(),
        "over shards": dist_sum(one, mesh["dp_shard"]).item(),
    }


def program(folder: Path) -> None:
    """What each of the two processes does."""
    setup_torch_distributed(DistributedArgs())
    results = {name: observe(*settings) for name, settings in SETTINGS.items()}
    results["collectives"] = collectives()
    try:
        get_device_mesh(DistributedArgs(dp_replicate=1))
    except ConfigError as error:
        results["error"] = str(error)
    torch.save(results, folder / f"{get_global_rank()}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> list[dict]:
    """The results of both, by rank."""
    return processes.results(
        2, "tests.host.test_parallel", tmp_path_factory.mktemp("two_processes")
    )


@pytest.fixture(scope="module")
def alone() -> Iterator[None]:
    """A process group of this process."""
    init_process_group(CPU)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", SETTINGS)
def test_initial_weights_do_not_depend_on_the_number_of_processes(two_processes, name):
    expected = dict(plain_model(SETTINGS[name][0]).named_parameters())
    for results in two_processes:
        weights = results[name]["weights"]
        assert weights.keys() == expected.keys()
        for path, weight in weights.items():
            assert torch.equal(weight, expected[path]), path


@pytest.mark.parametrize("name", SETTINGS)
def test_two_processes_compute_the_gradients_of_the_whole_batch(two_processes, name):
    model = plain_model(SETTINGS[name][0])
    loss = model(*batch())
    loss.backward()
    for results in two_processes:
        assert results[name]["loss"] == pytest.approx(loss.item(), rel=1e-12)
        for path, parameter in model.named_parameters():
            gradient = results[name]["gradients"][path]
            torch.testing.assert_close(gradient, parameter.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "mesh", "rows"),
    [
        ("shard", (("dp_replicate", "dp_shard"), (1, 2)), 10),
        ("replicate", (("dp_replicate", "dp_shard"), (2, 1)), 20),
        ("shard-over-replicate", (("dp_replicate",), (2,)), 10),
    ],
)
def test_mesh_and_share_of_the_weights(two_processes, name, mesh, rows):
    for results in two_processes:
        assert results[name]["mesh"] == mesh
        assert results[name]["wq"] == rows


@pytest.mark.parametrize("name", SETTINGS)
def test_the_state_dict_has_the_names_of_a_plain_model(two_processes, name):
    plain = LMTransformer(SETTINGS[name][0]).state_dict()
    expected = {path: tuple(x.shape) for path, x in plain.items()}
    assert two_processes[0][name]["state"] == expected


def test_collectives_over_two_processes(two_processes):
    for rank, results in enumerate(two_processes):
        assert results["collectives"] == {
            "mean": (1.5, [5.0, 2.0]),
            "max": (2, [10, 4]),
            "sum": (3, [10, 4]),
            "mean_dict": {"a": 1.5, "b": [5.0, 2.0]},
            "over replicas": 3,
            "over shards": rank + 1,
        }


def test_a_mesh_that_is_not_the_number_of_processes_is_an_error(two_processes):
    assert "is not 2, the number of processes" in two_processes[1]["error"]


def one_step(model: nn.Module) -> dict[str, Tensor]:
    model(*batch()).backward()
    return {own_name(name): whole(p.grad) for name, p in model.named_parameters()}


def test_one_process_computes_in_the_model_dtype_and_keeps_float32(alone):
    model = parallel_model(PLAIN, DistributedArgs(model_dtype="bf16"))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    plain = plain_model(PLAIN, torch.float32)
    for parameter in plain.parameters():  # and not the rotary table, as when generating
        parameter.data = parameter.data.to(torch.bfloat16)
    logits = model(batch()[0])
    assert logits.dtype == torch.bfloat16
    assert torch.equal(logits, plain(batch()[0]))
    assert {gradient.dtype for gradient in one_step(model).values()} == {torch.float32}


def test_recomputing_activations_changes_no_gradient(alone):
    args = DistributedArgs(model_dtype="fp32")
    expected = one_step(parallel_model(PLAIN, args))
    args.selective_activation_checkpointing = True
    model = parallel_model(PLAIN, args)
    calls = []
    for layer in model.layers:
        layer.ffn_norm.register_forward_hook(lambda *_: calls.append(1))
    gradients = one_step(model)
    assert len(calls) == 4  # two layers, forward and again in backward
    for name, gradient in gradients.items():
        assert torch.equal(gradient, expected[name]), name


def test_matrix_products_are_kept_and_the_rest_is_recomputed():
    aten = torch.ops.aten
    policy = get_default_policy()
    assert policy(None, aten.mm.default) == CheckpointPolicy.MUST_SAVE
    assert policy(None, aten.silu.default) == CheckpointPolicy.PREFER_RECOMPUTE
    policy = get_default_policy({aten.silu.default})
    assert policy(None, aten.mm.default) == CheckpointPolicy.PREFER_RECOMPUTE
    assert policy(None, aten.silu.default) == CheckpointPolicy.MUST_SAVE


@pytest.mark.parametrize("recompute", [False, True])
def test_a_compiled_model_computes_the_same(alone, monkeypatch, recompute):
    args = DistributedArgs(model_dtype="fp32", selective_activation_checkpointing=recompute)
    expected = one_step(parallel_model(PLAIN, args))
    compiled, compile_module = [], nn.Module.compile

    def without_inductor(module):  # which takes half a minute here
        compiled.append(module)
        compile_module(module, backend="aot_eager")

    monkeypatch.setattr(nn.Module, "compile", without_inductor)
    args.compile = True
    args.compile_cache_size_limit = 6
    with torch._dynamo.config.patch(recompile_limit=8):
        model = parallel_model(PLAIN, args)
        assert compiled == [model]
        assert torch._dynamo.config.recompile_limit == 6
        gradients = one_step(model)
    assert list(model.state_dict()) == list(LMTransformer(PLAIN).state_dict())
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name])


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"tp_size": 2}, "tp_size=2 is not offered"),
        ({"float8_recipe": "rowwise"}, "float8_recipe=rowwise is not offered"),
        ({"fsdp_type": "zero"}, "fsdp_type='zero' is not known"),
        ({"model_dtype": "fp8"}, "model_dtype='fp8' is not known"),
        ({"dp_shard": 2}, "dp_shard=2 with distributed.fsdp_type=no_shard"),
    ],
)
def test_what_is_not_offered_is_refused_rather_than_ignored(values, text):
    args = DistributedArgs(**values)
    with pytest.raises(ConfigError, match=text):
        get_device_mesh(args)
    with pytest.raises(ConfigError, match=text):
        parallelize_model(LMTransformer(PLAIN), None, PLAIN, args)


def test_the_default_plan_frees_all_layers_but_the_last():
    assert default_fsdp_grouping_plan(2) == [("layers.0", True), ("layers.1", False)]


def test_a_module_is_found_and_replaced_by_its_path():
    model, other = LMTransformer(PLAIN), nn.Identity()
    assert get_module(model, "layers.1.attention.wq") is model.layers[1].attention.wq
    set_module(model, "layers.1.attention.wq", other)
    assert model.layers[1].attention.wq is other
    set_module(model, "norm", other)
    assert model.norm is other


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        (torch.tensor([1.0, math.nan]), "NaN or infinite"),
        (torch.tensor([1.0, -math.inf]), "NaN or infinite"),
        (torch.zeros(3), "zero throughout"),
        (torch.empty(0), "empty"),
        (torch.tensor([-3.0, 3.0]), "spans 6, more than 5"),
        (torch.tensor([-2.0, 2.0]), "standard deviation of 2.83, more than 2"),
    ],
)
def test_suspicious_weights_are_warned_of_by_name(value, complaint, caplog):
    module = nn.Module()
    module.good = nn.Parameter(torch.tensor([0.1, 0.2]))
    module.bad = nn.Parameter(value)
    with caplog.at_level(logging.WARNING):
        check_model_value_range(module, range=5.0, std=2.0)
    (record,) = caplog.records
    assert record.getMessage().startswith("bad ") and complaint in record.getMessage()


def test_initial_weights_are_not_suspicious(caplog):
    check_model_value_range(plain_model(PLAIN), range=10.0, std=1.0)
    assert caplog.records == []


if __name__ == "__main__":
    program(Path(sys.argv[1]))
