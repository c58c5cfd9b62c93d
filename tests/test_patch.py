"""Patching a built model: what it computes then, what stays as it was, and the way back."""

import copy
import io
import pickle
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import lingua_topk.patch
from apps.main.transformer import LMTransformer, LMTransformerArgs
from lingua.transformer import FeedForward, TransformerBlock
from lingua_topk import TopKArgs, apply_topk, topk_handle
from lingua_topk.anneal import kept_at
from lingua_topk.errors import ConfigError
from lingua_topk.nn import TopK
from lingua_topk.ops import backends

N_LAYERS, DIM, HIDDEN, N_HEADS, N_KV_HEADS = 4, 32, 96, 4, 2
MODEL = LMTransformerArgs(
    dim=DIM,
    n_layers=N_LAYERS,
    n_heads=N_HEADS,
    n_kv_heads=N_KV_HEADS,
    vocab_size=50,
    multiple_of=16,
    max_seqlen=16,
)
TOKENS = torch.randint(0, 50, (3, 10), generator=torch.Generator().manual_seed(0))
SITES = ("residual", "mlp")


def build(seed: int = 0, dtype: torch.dtype = torch.float32) -> LMTransformer:
    model = LMTransformer(MODEL)
    torch.manual_seed(seed)
    model.init_weights()
    return model.to(dtype)


def patched(seed: int = 0, **arguments) -> LMTransformer:
    model = build(seed)
    apply_topk(model, TopKArgs(**{"k": 5, **arguments}))
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    model(TOKENS, TOKENS.roll(1)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def same(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def structure(model: nn.Module) -> dict:
    """Everything that a patch could leave behind."""
    return {
        name: (type(module), list(vars(module)), list(module._modules), list(module._buffers))
        for name, module in model.named_modules()
    }


# ---- What it computes


def topk_by_definition(x: Tensor, args: TopKArgs, alpha: float) -> Tensor:
    threshold = x.sort(dim=-1, descending=True).values[..., args.k - 1, None].detach()
    f = {"relu": F.relu, "identity": lambda x: x, "gelu": F.gelu, "silu": F.silu}[args.activation]
    return f(x) * (alpha + (1 - alpha) * (x >= threshold).to(x.dtype))


def logits_by_definition(weights, table, args: TopKArgs, alpha: float, layers) -> Tensor:
    """A Llama with TopK, from its weights: no module and no operator of ours or the host's.

    table: the rotations, [S, E / 2, 2, 2].
    """
    length, head = TOKENS.shape[1], DIM // N_HEADS
    turn = torch.complex(table[:length, :, 0, 0], table[:length, :, 1, 0])[:, None]  # [S, 1, E / 2]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)

    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + MODEL.norm_eps).sqrt() * weights[name]

    def rotated(x):
        turned = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn)
        return turned.flatten(-2)

    h = weights["tok_embeddings.weight"][TOKENS]  # [B, S, D]
    for i in range(N_LAYERS):
        w = {
            name.split(".")[-2]: value.T
            for name, value in weights.items()
            if name.startswith(f"layers.{i}.") and "norm" not in name
        }
        x = norm(h, f"layers.{i}.attention_norm.weight")
        q = rotated((x @ w["wq"]).unflatten(-1, (N_HEADS, head)))  # [B, S, H, E]
        k = rotated((x @ w["wk"]).unflatten(-1, (N_KV_HEADS, head)))
        v = (x @ w["wv"]).unflatten(-1, (N_KV_HEADS, head))
        k, v = (x.repeat_interleave(N_HEADS // N_KV_HEADS, dim=2) for x in (k, v))
        scores = torch.einsum("bqhe,bkhe->bhqk", q, k) / head**0.5
        mixed = scores.masked_fill(future, -torch.inf).softmax(-1)  # [B, H, S, S]
        h = h + torch.einsum("bhqk,bkhe->bqhe", mixed, v).flatten(-2) @ w["wo"]
        x = norm(h, f"layers.{i}.ffn_norm.weight")
        gate = x @ w["w1"]
        here = args.site if i in layers else None
        gate = topk_by_definition(gate, args, alpha) if here == "mlp" else F.silu(gate)
        h = h + (gate * (x @ w["w3"])) @ w["w2"]
        h = topk_by_definition(h, args, alpha) if here == "residual" else h
    return norm(h, "norm.weight") @ weights["output.weight"].T


@pytest.mark.parametrize(
    ("arguments", "alpha", "layers"),
    [
        ({}, 0.0, (0, 1)),
        ({}, 0.3, (0, 1)),
        ({"n_last_nontopk": 0}, 0.0, (0, 1, 2, 3)),
        ({"n_last_nontopk": 3, "k": 1}, 0.0, (0,)),
        ({"layers": [3, 1]}, 0.0, (1, 3)),
        ({"activation": "identity"}, 0.0, (0, 1)),
        ({"activation": "gelu"}, 0.6, (0, 1)),
        ({"activation": "silu"}, 0.6, (0, 1)),
    ],
    ids=str,
)
@pytest.mark.parametrize("site", SITES)
def test_a_patched_model_is_the_model_by_definition(site, arguments, alpha, layers):
    # In float64: the selection jumps where two values nearly tie, so that in float32 two
    # correct implementations can differ by much.
    model = build(dtype=torch.float64)
    args = TopKArgs(**{"k": 5, "site": site, **arguments})
    handle = apply_topk(model, args)
    handle.alpha = alpha
    assert tuple(handle.modules) == layers
    weights = dict(model.named_parameters())
    expected = logits_by_definition(weights, model.rope_embeddings.freqs_cis, args, alpha, layers)
    actual = model(TOKENS)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)
    for mine, theirs in zip(
        torch.autograd.grad(actual.square().sum(), weights.values()),
        torch.autograd.grad(expected.square().sum(), weights.values()),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("site", SITES)
def test_a_block_passes_everything_on_to_its_attention(site):
    block, seen = patched(site=site).layers[0], []

    def record(module, inputs, named):
        seen.append(named)
        return inputs, {}

    block.attention.register_forward_pre_hook(record, with_kwargs=True)
    freq_cis = block.attention.wq.weight.new_ones(10, DIM // N_HEADS // 2, 2, 2)
    given = {"tok_idx": "positions", "mask": "a mask", "attn_impl": "an implementation"}
    block(torch.ones(1, 10, DIM), freq_cis, **given)
    block(torch.ones(1, 10, DIM), freq_cis)
    assert seen == [given, {"tok_idx": None, "mask": None, "attn_impl": "sdpa"}]


@pytest.mark.parametrize(("site", "activation"), [("residual", "identity"), ("mlp", "silu")])
def test_with_alpha_one_and_the_models_own_activation_nothing_changes(site, activation):
    model = build()
    expected = logits(model), copy.deepcopy(gradients(model))
    handle = apply_topk(model, TopKArgs(k=5, site=site, activation=activation))
    assert not torch.equal(logits(model), expected[0])
    handle.alpha = 1.0
    same((logits(model), gradients(model)), expected)


@pytest.mark.parametrize("site", SITES)
def test_keys_shapes_and_weights_are_those_of_the_plain_model(site):
    plain, sparse = build(seed=1), patched(seed=2, site=site)
    expected = {name: value.shape for name, value in plain.state_dict().items()}
    assert {name: value.shape for name, value in sparse.state_dict().items()} == expected
    assert [p.shape for p in sparse.parameters()] == [p.shape for p in plain.parameters()]
    assert len(list(sparse.buffers())) == len(list(plain.buffers()))
    sparse.load_state_dict(plain.state_dict(), strict=True)
    same(logits(sparse), logits(patched(seed=1, site=site)))
    plain.load_state_dict(patched(seed=2, site=site).state_dict(), strict=True)
    same(logits(plain), logits(build(seed=2)))


# ---- What it refuses


def lacking(name: str):
    """Takes away the part of that name from the second block, or the model."""

    def damage(model):
        owner, _, part = name.rpartition(".")
        delattr(model.get_submodule(owner), part)

    return damage


class Parallel(TransformerBlock):
    def forward(self, x, freq_cis, positions):
        return x


class GatedFeedForward(FeedForward):
    def forward(self, x, gate):
        return x


def other_class(name: str, own_class: type):
    def damage(model):
        model.get_submodule(name).__class__ = own_class

    return damage


def shared_block(model):
    model.layers[3] = model.layers[1]


def shared_feed_forward(model):
    model.layers[3].feed_forward = model.layers[1].feed_forward


def own_topk(model):
    model.layers[1].topk = 3
    model.layers[1].feed_forward.topk = 3


def replaced_forward(model):
    model.layers[1].forward = lambda *arguments: arguments[0]


def block_of_a_patched_model(model):
    model.layers[1] = patched().layers[1]


def list_of_blocks(model):
    blocks = list(model.layers)
    del model.layers
    model.layers = blocks


@pytest.mark.parametrize(
    ("damage", "message", "sites"),
    [
        (lacking("layers"), "LMTransformer has no `layers` of type nn.ModuleList", SITES),
        (list_of_blocks, "LMTransformer has no `layers` of type nn.ModuleList", SITES),
        (lacking("layers.1.ffn_norm"), r"layers.1 \(TransformerBlock\) lacks ffn_norm", SITES),
        (lacking("layers.1.attention"), r"layers.1 \(TransformerBlock\) lacks attention", SITES),
        (lacking("layers.1.feed_forward"), "layers.1 .* lacks feed_forward", SITES),
        (lacking("layers.1.feed_forward.w3"), r"layers.1.feed_forward .* lacks w3", SITES),
        (other_class("layers.1", Parallel), "forward takes .*positions", ("residual",)),
        (other_class("layers.1.feed_forward", GatedFeedForward), "takes .*gate", ("mlp",)),
        (shared_block, r"layers \[1\] share the module that TopK goes into", SITES),
        (shared_feed_forward, r"layers \[1\] share the module .*FeedForward", ("mlp",)),
        (own_topk, "already has an attribute `topk`", SITES),
        (replaced_forward, "layers.1 is already patched by something else", SITES),
        (block_of_a_patched_model, "layers.1 is already patched by something else", SITES),
    ],
)
def test_a_model_of_another_shape_is_refused_and_left_alone(damage, message, sites):
    for site in sites:
        model = build()
        damage(model)
        before = structure(model)
        with pytest.raises(ConfigError, match=message):
            apply_topk(model, TopKArgs(k=5, site=site))
        assert structure(model) == before and topk_handle(model) is None


@pytest.mark.parametrize(
    "arguments", [{"k": 0}, {"n_last_nontopk": 4}, {"layers": [4]}, {"activation": "tanh"}], ids=str
)
def test_refused_arguments_leave_the_model_alone(arguments):
    model = build()
    before = structure(model)
    with pytest.raises(ConfigError):
        apply_topk(model, TopKArgs(**arguments))
    assert structure(model) == before


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("name", ["TopK", "_derived"])
def test_a_failure_midway_leaves_the_model_alone(site, name, monkeypatch):
    model = build()
    before = structure(model)
    original, calls = getattr(lingua_topk.patch, name), []

    def failing(*arguments, **named):
        calls.append(arguments)
        if len(calls) == 2:
            raise MemoryError("out of memory")
        return original(*arguments, **named)

    monkeypatch.setattr(lingua_topk.patch, name, failing)
    with pytest.raises(MemoryError, match="out of memory"):
        apply_topk(model, TopKArgs(k=5, site=site))
    assert structure(model) == before and topk_handle(model) is None


def test_a_wrapped_model_is_refused():
    for wrapper in (checkpoint_wrapper(build()), nn.ModuleList([build()])):
        with pytest.raises(ConfigError, match="before they are wrapped"):
            apply_topk(wrapper, TopKArgs(k=5))


# ---- The handle, and the way back


def test_applied_again():
    model = build()
    args = TopKArgs(k=5, layers=[2, 0])
    handle = apply_topk(model, args)
    handle.alpha = 0.25
    before, modules = structure(model), handle.modules
    again = apply_topk(model, TopKArgs(k=5, layers=[0, 2]))
    assert structure(model) == before and again.modules == modules and again.alpha == 0.25
    again.alpha = 0.5
    assert handle.alpha == topk_handle(model).alpha == 0.5
    with pytest.raises(ConfigError, match=r"already has TopK with .*k=5.* asked for .*k=6"):
        apply_topk(model, TopKArgs(k=6, layers=[0, 2]))
    assert structure(model) == before and handle.args == TopKArgs(k=5, layers=[0, 2])


def test_later_changes_of_the_arguments_have_no_effect():
    model = build()
    args = TopKArgs(k=5, layers=[0, 2])
    handle = apply_topk(model, args)
    args.layers.append(3)
    handle.args.layers.append(3)
    assert topk_handle(model).args.layers == [0, 2]
    assert list(handle.modules) == [0, 2]


def test_alpha():
    model = patched()
    handle = topk_handle(model)
    assert handle.alpha == 0.0
    hard = logits(model)
    handle.alpha = torch.tensor(1.0)
    assert [module.alpha for module in handle.modules.values()] == [1.0, 1.0]
    assert type(handle.alpha) is float and not torch.equal(logits(model), hard)
    for value in (-0.01, 1.01, float("nan")):
        with pytest.raises(ConfigError, match=r"alpha=.* is out of range: .* in \[0, 1\]"):
            handle.alpha = value
    assert handle.alpha == 1.0


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_where_k_is_annealed_alpha_keeps_more_and_scales_nothing(site, alpha):
    model = build(dtype=torch.float64)
    args = TopKArgs(k=5, site=site, annealed="k")
    handle = apply_topk(model, args)
    handle.alpha = alpha
    width = DIM if site == "residual" else model.layers[0].feed_forward.w1.out_features
    hard = replace(args, k=kept_at(alpha, 5, width))
    assert (hard.k == 5, hard.k == width) == (alpha == 0, alpha == 1)
    weights = dict(model.named_parameters())
    expected = logits_by_definition(weights, model.rope_embeddings.freqs_cis, hard, 0.0, (0, 1))
    torch.testing.assert_close(model(TOKENS), expected, rtol=1e-9, atol=1e-10)


def test_training_mode_is_that_of_the_block():
    model = build().eval()
    apply_topk(model, TopKArgs(k=5))
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("site", SITES)
def test_restore(site):
    model = build()
    before, expected = structure(model), logits(model)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    handle = apply_topk(model, TopKArgs(k=5, site=site))
    assert not torch.equal(logits(model), expected)
    handle.restore()
    assert structure(model) == before and topk_handle(model) is None
    same(dict(model.state_dict()), weights)
    same(logits(model), expected)
    apply_topk(model, TopKArgs(k=6, site="residual"))


def test_a_handle_is_of_no_use_after_restore():
    model = build()
    handle, other = apply_topk(model, TopKArgs(k=5)), topk_handle(model)
    other.restore()
    apply_topk(model, TopKArgs(k=5))
    for use in (handle.restore, handle.start_stats, lambda: handle.alpha):
        with pytest.raises(ConfigError, match="has been taken out of the model"):
            use()
    with pytest.raises(ConfigError, match="has been taken out of the model"):
        handle.alpha = 0.5


def test_a_plain_model_has_no_handle():
    assert topk_handle(build()) is None


@pytest.mark.parametrize(
    "wrap", [checkpoint_wrapper, lambda m: torch.compile(m, backend="eager"), nn.DataParallel]
)
def test_the_handle_of_a_wrapped_model(wrap):
    model = patched()
    handle = topk_handle(wrap(model))
    assert handle.model is model and apply_topk(wrap(model), TopKArgs(k=5)).model is model
    handle.restore()
    assert topk_handle(model) is None and type(model.layers[0]) is TransformerBlock


def test_of_two_models_each_has_a_handle_of_its_own():
    pair = nn.ModuleList([patched(), patched(seed=1)])
    with pytest.raises(ConfigError, match="holds 2 models with TopK"):
        topk_handle(pair)


def test_blocks_that_are_cut_off_or_wrapped_keep_their_alpha():
    model = patched(n_last_nontopk=1)
    handle = topk_handle(model)
    model.layers[0] = checkpoint_wrapper(model.layers[0])
    del model.layers[3]
    handle.alpha = 0.5
    assert {i: module.alpha for i, module in handle.modules.items()} == {0: 0.5, 1: 0.5, 2: 0.5}
    with pytest.raises(ConfigError, match=r"layers\.0 is now a CheckpointWrapper"):
        handle.restore()
    assert list(handle.modules) == [0, 1, 2]


# ---- What the model is used for


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved_and_loaded],
    ids=["deepcopy", "pickle", "torch.save"],
)
@pytest.mark.parametrize("site", SITES)
def test_a_copy_has_its_own_weights_and_its_own_alpha(site, copied):
    model = patched(site=site)
    topk_handle(model).alpha = 0.5
    expected = logits(model)
    twin = copied(model)
    assert structure(twin) == structure(model)
    same(logits(twin), expected)
    topk_handle(twin).alpha = 0.0
    with torch.no_grad():
        twin.layers[0].attention.wq.weight.zero_()
    assert topk_handle(model).alpha == 0.5 and not torch.equal(logits(twin), expected)
    same(logits(model), expected)
    topk_handle(twin).restore()
    assert structure(twin) == structure(build())


def test_isinstance_and_hooks():
    model = build()
    seen = []
    model.layers[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    handle = apply_topk(model, TopKArgs(k=5))
    model.layers[1].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    assert isinstance(model.layers[0], TransformerBlock)
    assert isinstance(model.layers[0].topk, TopK)
    logits(model)
    assert seen[0] is seen[1] and 0 < (seen[0] != 0).sum(-1).max() <= 5
    handle.restore()
    logits(model)
    assert len(seen) == 4 and (seen[2] != 0).all()


@pytest.mark.parametrize("site", SITES)
def test_a_moving_alpha_does_not_recompile_the_model(site):
    model = LMTransformer(replace(MODEL, n_layers=2)).double()
    handle = apply_topk(model, TopKArgs(k=5, site=site, n_last_nontopk=0))
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for step in range(12):
        handle.alpha = max(0.0, 1 - step / 10)
        actual, expected = gradients(compiled), gradients(model)
        torch.testing.assert_close(list(actual.values()), list(expected.values()))
    torch._dynamo.reset()
    # One for alpha = 1, one for what lies between, and one for alpha = 0.
    assert counter.frame_count <= 3


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_every_backend_trains_the_model_alike(site, dtype):
    def losses(backend: str) -> list[float]:
        model = build(dtype=dtype)
        handle = apply_topk(model, TopKArgs(k=5, n_last_nontopk=1, site=site))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        found = []
        with backends.use(backend):
            for step in range(8):
                handle.alpha = max(0.0, 1 - step / 4)
                optimizer.zero_grad()
                loss = model(TOKENS.roll(step, 0), TOKENS.roll(step, 0).roll(1))
                loss.backward()
                optimizer.step()
                found.append(loss.item())
        return found

    expected = losses("plain")
    assert len(set(expected)) == 8
    assert losses("cpu") == expected


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def shard(model, mesh) -> None:
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


@pytest.mark.parametrize("site", SITES)
def test_sharded_from_the_meta_device(site, mesh):
    expected = patched(site=site)
    topk_handle(expected).alpha = 0.5
    with torch.device("meta"):
        model = LMTransformer(MODEL)
    handle = apply_topk(model, TopKArgs(k=5, site=site))
    with pytest.raises(ConfigError, match="meta device"):
        handle.start_stats()
    shard(model, mesh)
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    model.init_weights()
    handle = topk_handle(model)
    handle.alpha = 0.5
    stats = handle.start_stats()
    assert {i: len(s.idle) for i, s in stats.items()} == dict.fromkeys(
        (0, 1), DIM if site == "residual" else HIDDEN
    )
    same(logits(model), logits(expected))
    full = {name: value.full_tensor() for name, value in gradients(model).items()}
    same(full, gradients(expected))
    assert list(model.state_dict()) == list(build().state_dict())


def test_restore_of_a_sharded_model_is_refused(mesh):
    model = patched()
    shard(model, mesh)
    before = structure(model)
    with pytest.raises(ConfigError, match="restore before sharding"):
        topk_handle(model).restore()
    assert structure(model) == before
