"""apps.topk.generation against a plain loop over the model's own forward, in float64."""

import copy
from itertools import accumulate

import pytest
import torch

from apps.topk.generation import Generation, Generator
from apps.topk.sampling import Sampling
from lingua.tokenizer import ByteTokenizer, MockTokenizer
from lingua_topk import topk_handle
from lingua_topk.errors import CheckpointError, ConfigError
from tests.apps.small_models import SHAPES, TOKENIZERS, make_tokenizer, small_model

PROMPTS = ["The", "", "the harbour was quiet", "a", "Every good boy", "naïve 漢", "xy" * 15]
GREEDY = Sampling(max_tokens=25)
DRAWN = Sampling(max_tokens=25, temperature=0.9, top_p=0.95, top_k=40, seed=3)


def plain_greedy(model, tokenizer, prompt, max_tokens, banned=()):
    """Ids, eos included: the whole text is read again for every token."""
    ids = tokenizer.encode(prompt, True, False)
    n_prompt, forbidden = len(ids), [tokenizer.bos_id, *banned]
    while len(ids) < min(n_prompt + max_tokens, model.max_seqlen):
        logits = model(torch.tensor([ids]))[0, -1, : tokenizer.n_words]
        logits[forbidden] = -torch.inf
        ids.append(int(logits.argmax()))
        if ids[-1] == tokenizer.eos_id:
            break
    return ids[n_prompt:]


def without_eos(ids):
    return [token for token in ids if token != ByteTokenizer.eos_id]


@pytest.fixture(scope="module")
def residual():
    return small_model(**SHAPES["residual"])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch_tokens", [1, 100, 2**14])
def test_cached_is_uncached(shape, batch_tokens):
    model, tokenizer = small_model(**SHAPES[shape]), ByteTokenizer()
    found = Generator(model, tokenizer, batch_tokens).generate(PROMPTS, GREEDY)
    assert len({tuple(one.tokens) for one in found}) == len(PROMPTS)
    for prompt, one in zip(PROMPTS, found, strict=True):
        assert one.prompt == prompt
        assert one.tokens == without_eos(plain_greedy(model, tokenizer, prompt, 25))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_a_text_does_not_depend_on_the_others(shape, sampling):
    model = small_model(**SHAPES[shape])
    together = Generator(model, ByteTokenizer()).generate(PROMPTS, sampling)
    for size in (1, 200, 350):  # rows that fit: 1, a few
        apart = Generator(model, ByteTokenizer(), size).generate(PROMPTS, sampling)
        assert apart == together
    if sampling is GREEDY:
        for prompt, one in zip(PROMPTS, together, strict=True):
            assert Generator(model, ByteTokenizer()).generate([prompt], sampling) == [one]


def test_the_seed_and_the_index_decide_the_draws(residual):
    generator = Generator(residual, ByteTokenizer())
    found = generator.generate(["The"] * 5, DRAWN)
    assert len({one.text for one in found}) == 5
    assert generator.generate(["The"] * 5, DRAWN) == found
    assert generator.generate(["The"] * 9, DRAWN)[:5] == found
    other = Sampling(max_tokens=25, temperature=0.9, top_p=0.95, top_k=40, seed=4)
    assert not {one.text for one in generator.generate(["The"] * 5, other)} & {
        one.text for one in found
    }


def test_a_drawn_row_is_the_same_in_a_batch_and_alone(residual):
    generator = Generator(residual, ByteTokenizer())
    together = generator.generate(PROMPTS, DRAWN)
    assert generator.generate(PROMPTS[:1], DRAWN) == together[:1]
    others = ["other", "texts of another length", *PROMPTS[2:]]
    assert generator.generate(others, DRAWN)[2:] == together[2:]


def test_rows_that_end_leave_the_batch(residual):
    sizes = []
    hook = residual.output.register_forward_pre_hook(lambda _, x: sizes.append(x[0].shape))
    generator = Generator(residual, ByteTokenizer())
    whole = generator.generate(PROMPTS, GREEDY)
    sizes.clear()
    stop = (whole[0].text[3:5], whole[4].text[9:11])
    found = generator.generate(PROMPTS, Sampling(max_tokens=25, stop=stop))
    hook.remove()
    assert found[0].reason == found[4].reason == "stop"
    for one, full in zip(found, whole, strict=True):
        cut = min([full.text.find(s) for s in stop if s in full.text], default=len(full.text))
        assert one.text == full.text[:cut]
    # Only the last hidden state of a row is projected, [B, D].
    assert sizes[0] == (7, 32) and all(len(size) == 2 for size in sizes)
    # A token that ends a text was projected for too, and eos is not among the tokens.
    steps = [len(one.tokens) + (one.reason == "eos") for one in found]
    assert [rows for rows, _ in sizes] == [sum(n > step for n in steps) for step in range(25)]
    assert sizes[-1][0] < 7


@pytest.mark.parametrize("batch_tokens", [1, 7, 50])
def test_long_prompts_are_read_in_pieces(residual, batch_tokens):
    seen = []
    hook = residual.layers[0].register_forward_pre_hook(lambda _, x: seen.append(x[0].shape))
    found = Generator(residual, ByteTokenizer(), batch_tokens).generate(["xy" * 28], GREEDY)
    hook.remove()
    assert max(rows * length for rows, length, _ in seen) <= batch_tokens
    assert found == Generator(residual, ByteTokenizer()).generate(["xy" * 28], GREEDY)


def test_memory_bounds_a_batch(residual):
    calls = []
    hook = residual.output.register_forward_pre_hook(lambda _, x: calls.append(len(x[0])))
    generator = Generator(residual, ByteTokenizer(), batch_tokens=100)
    generator.generate(["a" * n for n in (4, 30, 10, 9, 4)], Sampling(max_tokens=14))
    hook.remove()
    # With bos and the new tokens 45 slots, twice; then 24, four times, of which 3 are left.
    assert calls[::14] == [2, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    model = small_model(**SHAPES["grouped"])
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    found = Generator(model, ByteTokenizer()).generate(PROMPTS, DRAWN)
    assert {one.reason for one in found} <= {"length", "eos"}
    assert len({one.text for one in found}) == 7


# How a text ends.


def test_the_end_token(residual):
    tokenizer = ByteTokenizer()
    whole = plain_greedy(residual, tokenizer, "The", 25)
    tokenizer.eos_id = next(token for i, token in enumerate(whole) if i >= 5)
    expected = whole[: whole.index(tokenizer.eos_id)]
    found = Generator(residual, tokenizer).generate(["The"], GREEDY)[0]
    assert (found.tokens, found.reason) == (expected, "eos")
    longer = Sampling(max_tokens=25, ignore_eos=True)
    found = Generator(residual, tokenizer).generate(["The"], longer)[0]
    banned = [tokenizer.eos_id]
    assert found.tokens == plain_greedy(residual, tokenizer, "The", 25, banned)
    assert (len(found.tokens), found.reason) == (25, "length")


def test_the_window(residual):
    tokenizer, long = ByteTokenizer(), Sampling(max_tokens=1000)
    found = Generator(residual, tokenizer).generate(["The", "a" * 62], long)
    assert [one.reason for one in found] == ["window"] * 2
    assert [len(one.tokens) for one in found] == [64 - 4, 1]
    assert found[0].tokens == plain_greedy(residual, tokenizer, "The", 1000)
    exactly = Generator(residual, tokenizer).generate(["The"], Sampling(max_tokens=60))[0]
    assert (exactly.tokens, exactly.reason) == (found[0].tokens, "length")


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["a", "a" * 63], r"prompts\[1\] has 64 tokens, and the model reads 63 at most"),
        ([[]], r"prompts\[0\] is empty"),
        ([[5, 300]], r"prompts\[0\] holds the token 300"),
        ([[5, -1]], r"prompts\[0\] holds the token -1"),
    ],
)
def test_prompts_that_cannot_be_read(residual, prompts, message):
    generator = Generator(residual, ByteTokenizer())
    call = generator.generate if isinstance(prompts[0], str) else generator.generate_tokens
    with pytest.raises(ConfigError, match=message) as error:
        call(prompts, GREEDY)
    assert "\n" not in str(error.value)


def test_without_bos():
    model = small_model(vocab_size=256)
    assert Generator(model, MockTokenizer()).generate(["a"], GREEDY)[0].reason == "length"
    with pytest.raises(ConfigError, match="no bos to begin with"):
        Generator(model, MockTokenizer()).generate([""], GREEDY)
    model = small_model()
    with pytest.raises(ConfigError, match="no bos to begin with"):
        Generator(model, ByteTokenizer(), add_bos=False).generate([""], GREEDY)
    one = Generator(model, ByteTokenizer(), add_bos=False).generate(["ab"], GREEDY)
    same = Generator(model, ByteTokenizer()).generate_tokens([[97, 98]], GREEDY)
    assert one == same != Generator(model, ByteTokenizer()).generate(["ab"], GREEDY)


def test_nothing_to_do(residual):
    assert Generator(residual, ByteTokenizer()).generate([], GREEDY) == []
    with pytest.raises(ConfigError, match="batch_tokens=0"):
        Generator(residual, ByteTokenizer(), 0)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_only_tokens_that_mean_something_are_generated(name, tmp_path):
    tokenizer = make_tokenizer(name, tmp_path)
    model = small_model(vocab_size=tokenizer.n_words + 50, **SHAPES["residual"])
    unwanted = [tokenizer.bos_id, *range(tokenizer.n_words, tokenizer.n_words + 50)]
    pad = getattr(tokenizer, "pad_id", -1)
    unwanted += [pad] * (pad >= 0)
    model.output.weight.data[unwanted] *= 10  # they would be generated, were they not left out
    for sampling in (GREEDY, Sampling(max_tokens=25, temperature=2.0)):
        for one in Generator(model, tokenizer).generate(["th"] * 20, sampling):
            assert not set(one.tokens) & {*unwanted, tokenizer.eos_id}
    expected = plain_greedy(model, tokenizer, "th", 25, [pad] * (pad >= 0))
    found = Generator(model, tokenizer).generate(["th"], GREEDY)[0]
    assert found.tokens + [tokenizer.eos_id] * (found.reason == "eos") == expected


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_text_is_what_the_tokens_add(name, tmp_path):
    tokenizer = make_tokenizer(name, tmp_path)
    model = small_model(vocab_size=tokenizer.n_words, **SHAPES["residual"])
    prompts, pieces = [*PROMPTS, "the ", "day the"], {}
    found = Generator(model, tokenizer).generate(
        prompts, DRAWN, on_text=lambda index, piece: pieces.setdefault(index, []).append(piece)
    )
    for index, (prompt, one) in enumerate(zip(prompts, found, strict=True)):
        ids = tokenizer.encode(prompt, True, False)
        assert tokenizer.decode(ids + one.tokens) == tokenizer.decode(ids) + one.text
        assert "".join(pieces[index]) == one.text
        assert all(pieces[index])


def test_a_first_space_is_a_part_of_the_text(tmp_path):
    """Decoded by itself, it would be dropped."""
    tokenizer = make_tokenizer("sp-prefix", tmp_path)
    tokens = tokenizer.encode("day the", False, False)
    prompt, rest = tokens[: -len(tokenizer.encode("the", False, False))], tokens[-1:]
    assert tokenizer.decode(prompt) == "day" and tokenizer.decode(rest) == "the"
    model = small_model(vocab_size=tokenizer.n_words)
    model.output.register_forward_hook(lambda _, __, y: y.index_fill(-1, torch.tensor(rest), 1e9))
    found = Generator(model, tokenizer).generate_tokens([prompt], Sampling(max_tokens=2))
    assert found == [Generation("day", " the the", rest * 2, "length")]


def test_results_are_told_as_they_come(residual):
    done = {}
    generator = Generator(residual, ByteTokenizer(), 100)
    found = generator.generate(PROMPTS, GREEDY, on_done=done.__setitem__)
    assert list(done) != sorted(done)  # the long ones first
    assert [done[index] for index in range(7)] == found


# Draws.


def test_draws_have_the_probabilities_of_the_model(residual):
    """Chi-square of the first token of 4,000 texts."""
    generator, n = Generator(residual, ByteTokenizer()), 4000
    logits = residual(torch.tensor([[256, *b"The"]]))[0, -1]
    logits[256] = -torch.inf
    expected = (logits / 0.8).softmax(-1) * n
    found = generator.generate(["The"] * n, Sampling(max_tokens=1, temperature=0.8, seed=1))
    ids = torch.tensor([one.tokens[0] if one.tokens else 257 for one in found])
    counts = ids.bincount(minlength=258).double()
    common = expected >= 5
    common_counts = torch.cat((counts[common], counts[~common].sum()[None]))
    common_expected = torch.cat((expected[common], expected[~common].sum()[None]))
    chi_square = ((common_counts - common_expected) ** 2 / common_expected).sum()
    degrees = len(common_expected) - 1
    assert degrees > 15
    # The mean of the distribution and four of its standard deviations.
    assert chi_square < degrees + 4 * (2 * degrees) ** 0.5


# The model's modules run as they are.


@pytest.mark.parametrize("shape", ["residual", "mlp"])
def test_hooks_on_the_topk_modules_act_on_every_token(shape):
    model, tokenizer = small_model(**SHAPES[shape]), ByteTokenizer()
    before = Generator(model, tokenizer).generate(PROMPTS, GREEDY)
    seen = []

    def steer(_module, _inputs, y):
        seen.append(y.shape[:2])
        return y + 3.0 * (torch.arange(y.shape[-1]) == 5)

    hook = topk_handle(model).modules[0].register_forward_hook(steer)
    steered = Generator(model, tokenizer).generate(PROMPTS, GREEDY)
    assert seen[0] == (7, 31) and seen[1:] == [(7, 1)] * 24
    for prompt, one, other in zip(PROMPTS, steered, before, strict=True):
        assert one.tokens == without_eos(plain_greedy(model, tokenizer, prompt, 25))
        assert one.text != other.text
    hook.remove()
    assert Generator(model, tokenizer).generate(PROMPTS, GREEDY) == before


def test_the_model_is_as_it_was_after_an_exception(residual):
    def fail(index, piece):
        raise KeyboardInterrupt

    before = copy.deepcopy(residual.state_dict())
    with pytest.raises(KeyboardInterrupt):
        Generator(residual, ByteTokenizer()).generate(PROMPTS, GREEDY, on_text=fail)
    hook = residual.layers[2].feed_forward.register_forward_hook(fail_in_hook)
    with pytest.raises(RuntimeError, match="in the hook"):
        Generator(residual, ByteTokenizer()).generate(PROMPTS, GREEDY)
    hook.remove()
    assert not any("forward" in vars(module) for module in residual.modules())
    assert all(torch.equal(value, before[name]) for name, value in residual.state_dict().items())
    assert not torch.is_inference_mode_enabled()


def fail_in_hook(*_):
    raise RuntimeError("in the hook")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_a_model_without_numbers(value, sampling):
    model = small_model(**SHAPES["vanilla"])
    model.output.weight.data[7] = value
    with pytest.raises(CheckpointError, match=r"no finite logits after \d+ tokens") as error:
        Generator(model, ByteTokenizer()).generate(PROMPTS, sampling)
    assert "\n" not in str(error.value)


def test_stop_strings_are_found_wherever_they_begin(residual):
    whole = Generator(residual, ByteTokenizer()).generate(["The"], GREEDY)[0].text
    for start, end in [(0, 1), (0, 4), (3, 9), (20, len(whole)), (len(whole) - 1, len(whole))]:
        stop = whole[start:end]
        found = Generator(residual, ByteTokenizer()).generate(
            ["The"], Sampling(max_tokens=25, stop=(stop, "never"))
        )[0]
        assert found.text == whole[: whole.find(stop)]
        assert found.reason == "stop"
    prefixes = tuple(accumulate(whole[5:9]))
    found = Generator(residual, ByteTokenizer()).generate(
        ["The"], Sampling(max_tokens=25, stop=prefixes[1:])
    )[0]
    assert found.text == whole[: whole.find(prefixes[1])]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", SHAPES)
def test_a_gpu_gives_the_texts_of_the_cpu(shape):
    """Greedy and drawn, in float64; in bfloat16 it runs."""
    model = small_model(**SHAPES[shape])
    expected = [Generator(model, ByteTokenizer()).generate(PROMPTS, s) for s in (GREEDY, DRAWN)]
    model = model.cuda()
    assert expected == [
        Generator(model, ByteTokenizer()).generate(PROMPTS, s) for s in (GREEDY, DRAWN)
    ]
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    found = Generator(model, ByteTokenizer()).generate(PROMPTS, DRAWN)
    assert len({one.text for one in found}) == 7
