"""The step of one token a row: sparse and dense, called and (as if) recorded, in float64."""

import gc
import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from apps.topk import decoding, generation
from apps.topk.decoding import DecodingStep, Watch
from apps.topk.generation import Generator
from apps.topk.inference import KVCache, hidden_states, visible
from apps.topk.sampling import Sampling
from lingua.tokenizer import ByteTokenizer
from lingua_topk import topk_handle
from lingua_topk.sparse import SparseDecoding, feed_forward, projections
from lingua_topk.sparse.copies import FeatureMajor
from lingua_topk.steering import Add, steer
from tests.apps.small_models import SHAPES, small_model

PROMPTS = ["The", "", "the harbour was quiet", "a", "Every good boy"]
GREEDY = Sampling(max_tokens=25)
DRAWN = Sampling(max_tokens=25, temperature=0.9, top_p=0.95, top_k=40, seed=3)
GATHERING = ("residual", "mlp", "grouped", "tied", "sliding")
TOLERANCE = {"rtol": 0, "atol": 1e-9}


@pytest.fixture
def gathers(monkeypatch):
    """Every model gathers, from the first token on; the shapes of what is gathered for."""
    seen = []

    def noting(own):
        return lambda x, *weights: seen.append(tuple(x.shape)) or own(x, *weights)

    monkeypatch.setattr(projections, "gathered", noting(projections.gathered))
    monkeypatch.setattr(feed_forward, "gathered_gate", noting(feed_forward.gathered_gate))
    for part in (projections, feed_forward):
        monkeypatch.setattr(part, "pays_off", lambda *_: True)
    monkeypatch.setattr(generation, "SPARSE_FROM", 1)
    return seen


@pytest.fixture
def recordings(monkeypatch):
    """Steps are recorded, as far as that goes without a GPU: their body runs, into one buffer."""
    made = []

    def recorded(body, device):
        result = body().clone()
        made.append(0)

        def replay():
            made[-1] += 1
            return result.copy_(body())

        return replay

    monkeypatch.setattr(decoding, "records", lambda device: True)
    monkeypatch.setattr(decoding, "recorded", recorded)
    monkeypatch.setattr(decoding, "SLOTS_AT_ONCE", 8)
    return made


def generate(model, sampling=GREEDY, **how):
    return Generator(model, ByteTokenizer(), **how).generate(PROMPTS, sampling)


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("shape", SHAPES)
def test_texts_are_the_dense_ones(shape, sampling, gathers):
    model = small_model(**SHAPES[shape])
    dense = generate(model, sampling, sparse=False)
    assert not gathers
    assert generate(model, sampling) == dense
    assert bool(gathers) is (shape in GATHERING)
    # A token of each row that is left, never a prompt.
    assert all(length == 1 and rows <= len(PROMPTS) for rows, length, _ in gathers)


def test_short_texts_are_generated_densely(gathers, monkeypatch):
    model = small_model(**SHAPES["residual"])
    monkeypatch.setattr(generation, "SPARSE_FROM", 26)
    dense = generate(model, sparse=False)
    assert generate(model) == dense and not gathers
    assert generate(model, batch_tokens=120) == dense and gathers  # several batches


def test_steered_texts_are_the_dense_ones(gathers):
    model = small_model(**SHAPES["residual"])
    plain = generate(model)
    for where in ("all", "prompt", "generated"):
        with steer(model, [Add(0, (1, 5, 9), 6.0, where=where)]):
            dense = generate(model, sparse=False)
            assert generate(model) == dense != plain


def steps_of(model, sparse_decoding):
    """The hidden states of 12 steps behind prompts of 9, 5 and 7 tokens, [12, B, D]."""
    tokens = torch.randint(0, 258, (3, 40), generator=torch.Generator().manual_seed(1))
    cache, positions = KVCache(3, 30), torch.arange(9).expand(3, 9)
    hidden_states(model, tokens[:, :9], positions, visible(positions, positions), cache)
    lengths = torch.tensor([9, 5, 7])
    step = DecodingStep(model, cache, lengths, torch.arange(3), sparse_decoding)
    return torch.stack(
        [step.run(tokens[:, 9 + i].tolist(), (lengths + i).tolist()).clone() for i in range(12)]
    )


@pytest.mark.parametrize("shape", GATHERING)
def test_hidden_states_are_the_dense_ones(shape, gathers, recordings, monkeypatch):
    model = small_model(**SHAPES[shape])
    with torch.no_grad():
        recorded = steps_of(model, SparseDecoding(model))
        assert recordings == [4, 5]  # from the fourth step on: up to 16 slots, then up to 24
        monkeypatch.setattr(decoding, "records", lambda device: False)
        called = steps_of(model, SparseDecoding(model))
        gathers.clear()
        dense = steps_of(model, None)
    assert not gathers
    torch.testing.assert_close(called, dense, **TOLERANCE)
    torch.testing.assert_close(recorded, dense, **TOLERANCE)


@pytest.mark.parametrize("shape", SHAPES)
def test_recorded_texts_are_the_same(shape, recordings, monkeypatch):
    model = small_model(**SHAPES[shape])
    recorded = generate(model)
    whole = recorded[2].text
    stopping = Sampling(max_tokens=25, stop=(whole[6:9],))
    stopped = generate(model, stopping)  # a row leaves the others
    assert len(recordings) > 4 and sum(recordings) > 20
    monkeypatch.setattr(decoding, "records", lambda device: False)
    assert generate(model) == recorded and generate(model, stopping) == stopped


def test_what_watches_the_model_is_not_recorded(recordings):
    model = small_model(**SHAPES["residual"])
    seen = []
    hook = model.layers[1].register_forward_hook(lambda *_: seen.append(1))
    watched = generate(model)
    hook.remove()
    assert not recordings and len(seen) == 25
    with steer(model, [Add(0, (1,), 6.0)]):
        generate(model)
    counts = topk_handle(model).start_stats()
    generate(model)
    assert not recordings and counts[0].counts[1] > 24
    topk_handle(model).stop_stats()
    assert generate(model) == watched and recordings


def test_watch():
    model = small_model(**SHAPES["residual"])
    watch = Watch(model)
    assert not watch.is_watched()
    for module in (model, model.layers[2].attention.wo, model.layers[0].topk):
        for register in (module.register_forward_hook, module.register_forward_pre_hook):
            handle = register(lambda *_: None)
            assert watch.is_watched()
            handle.remove()
    everywhere = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert watch.is_watched()
    everywhere.remove()
    topk_handle(model).start_stats()
    assert watch.is_watched()
    topk_handle(model).stop_stats()
    assert not watch.is_watched()


def test_what_cannot_be_recorded_is_called(caplog):
    if torch.cuda.is_available():
        pytest.skip("it can")
    caplog.set_level("INFO")

    assert decoding.recorded(lambda: torch.ones(2), torch.device("cuda")) is None
    assert "decoding runs without a CUDA graph: " in caplog.text


def test_where_no_step_can_be_recorded_texts_are_the_same(recordings, monkeypatch):
    model = small_model(**SHAPES["residual"])
    expected, asked = generate(model), []
    monkeypatch.setattr(decoding, "recorded", lambda *_: asked.append(1))
    assert generate(model) == expected
    assert len(asked) < 20  # once a batch and range of slots, not at every step


def test_a_step_is_recorded_and_run_on_its_own_device(monkeypatch):
    """With stand-ins for what needs a GPU."""
    now, seen, other = {"device": "the first", "stream": "its own"}, [], torch.device("cuda", 1)

    @contextmanager
    def setting(what, value):
        before, now[what] = now[what], value
        yield
        now[what] = before

    @contextmanager
    def graph(_, stream):
        with setting("stream", f"recording on {stream.name}"):
            yield

    def note():
        seen.append((now["device"], now["stream"]))
        return torch.ones(2)

    stands_in = {
        "Stream": lambda device: SimpleNamespace(name="aside", wait_stream=lambda _: None),
        "CUDAGraph": lambda: SimpleNamespace(replay=note),
        "device": lambda device: setting("device", device),
        "stream": lambda stream: setting("stream", stream.name),
        "current_stream": lambda *_: SimpleNamespace(name="its", wait_stream=lambda _: None),
        "graph": graph,
    }
    for name, stand_in in stands_in.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    replay = decoding.recorded(note, other)
    assert seen == [(other, "aside"), (other, "recording on aside")]
    assert now == {"device": "the first", "stream": "its own"}
    assert replay().tolist() == [1, 1] and seen[2:] == [(other, "its own")]


def test_memory_that_is_lacking_is_told(monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch.cuda, "Stream", fail)
    with pytest.raises(torch.OutOfMemoryError):
        decoding.recorded(lambda: torch.ones(2), torch.device("cuda"))


@pytest.mark.parametrize("can_be_recorded", [True, False])
def test_a_step_that_is_over_holds_no_memory(can_be_recorded, monkeypatch):
    monkeypatch.setattr(decoding, "records", lambda device: True)
    replay = (lambda: torch.zeros(1, 32)) if can_be_recorded else None
    monkeypatch.setattr(decoding, "recorded", lambda body, device: replay)
    model, cache = small_model(**SHAPES["residual"]), KVCache(3, 30)
    step = DecodingStep(model, cache, torch.tensor([1]), torch.arange(1))
    held = weakref.ref(cache)
    with no_collection(), torch.no_grad():
        for position in range(6):
            step.run([5], [position])
        del step, cache
        assert held() is None


# Nothing outlives a call.


@contextmanager
def no_collection():
    """What is let go within is gone at once, or part of a cycle."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def test_copies_of_weights_are_given_back(gathers, monkeypatch):
    made, own = [], SparseDecoding
    monkeypatch.setattr(
        generation, "SparseDecoding", lambda model: made.append(weakref.ref(it := own(model))) or it
    )
    generator = Generator(small_model(**SHAPES["residual"]), ByteTokenizer())
    with no_collection():
        for n_calls in (1, 2):
            generator.generate(PROMPTS, GREEDY)
            assert len(made) == n_calls and gathers
            assert made[-1]() is None


@pytest.mark.parametrize("shape", ["residual", "mlp"])
def test_weights_may_change_between_calls(shape, gathers):
    """In ways that leave no trace."""
    model = small_model(**SHAPES[shape]).requires_grad_(True)
    generator = Generator(model, ByteTokenizer())
    before = generator.generate(PROMPTS, GREEDY)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, fused=True)
    model(torch.arange(20)[None]).square().mean().backward()
    optimizer.step()
    dense = generate(model, sparse=False)
    assert generator.generate(PROMPTS, GREEDY) == dense != before
    for block in model.layers:
        block.feed_forward.w2.weight.data.mul_(-1.0)
    dense = generate(model, sparse=False)
    assert generator.generate(PROMPTS, GREEDY) == dense


@pytest.mark.parametrize("inference", [True, False])
def test_weights_are_laid_out_once_a_call(inference, gathers, monkeypatch):
    laid_out, own = [], FeatureMajor.get

    def noting(copy):
        laid_out.extend([copy] * (copy.nbytes == 0))
        return own(copy)

    with torch.inference_mode(inference):
        model = small_model(**SHAPES["residual"])
    generator = Generator(model, ByteTokenizer())
    monkeypatch.setattr(FeatureMajor, "get", noting)
    generator.generate(PROMPTS, GREEDY)
    assert len(laid_out) == len(set(laid_out)) == 2  # blocks


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", SHAPES)
def test_a_gpu_generates_the_same(shape, gathers):
    model = small_model(**SHAPES[shape])
    expected = generate(model, sparse=False)
    recorded, own = [], decoding.recorded
    decoding.recorded = lambda *inputs: recorded.append(own(*inputs)) or recorded[-1]
    try:
        assert generate(model.cuda()) == expected
    finally:
        decoding.recorded = own
    # None fell back to calls.
    assert recorded and None not in recorded


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_gpu_that_is_not_the_current_one(gathers):
    model = small_model(**SHAPES["residual"])
    expected = generate(model, sparse=False)
    assert generate(model.to("cuda:1")) == expected
    assert torch.cuda.current_device() == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_after_a_recording_that_fails_the_stream_is_the_same():
    device = torch.device("cuda", torch.cuda.current_device())
    x, stream = torch.ones(2, device=device), torch.cuda.current_stream()
    assert decoding.recorded(lambda: x * x.sum().item(), device) is None  # which waits
    assert torch.cuda.current_stream() == stream
    assert torch.equal(decoding.recorded(lambda: 2 * x, device)(), 2 * x)
