"""The folder of tasks, as lm-evaluation-harness itself reads it, and what is refused."""

import gzip
import json
import lzma
import math
import os
import re
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import datasets
import lm_eval
import pyarrow
import pytest
import yaml
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from apps.topk import cli, tasks
from apps.topk.task_files import held_out
from apps.topk.task_files.articles import articles
from apps.topk.tasks import TAKEN_NAMES, make_tasks
from lingua_topk.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
OWN_TASKS = Path(lm_eval.__file__).parent / "tasks"
# What a template language, a literal or a line reader would take for its own.
WILD = (
    "{{ 7*7 }} {% raw %} {# no #} [1, 2] \"q\" 's' \\n é 漢 \u2028 \x85 \ttab $HOME !function a.b"
)


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    """No network, and the harness's cache in the test's own folder."""

    def refuse(*_):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr(socket.socket, "connect", refuse)


def write_lines(path: Path, *records) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (one if isinstance(one, str) else json.dumps(one) for one in records)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(path)


def load(folder, *names) -> list[ConfigurableTask]:
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    loaded = manager.load(list(names) or manager.all_tasks)["tasks"]
    return [loaded[name] for name in names] or list(loaded.values())


def requests(task, shots=0) -> list[tuple]:
    """The arguments of every request to the model."""
    task.set_config("num_fewshot", shots)
    task.set_fewshot_seed(1)
    task.build_all_requests()
    return [one.args for one in task.instances]


def items(folder, name) -> list[dict]:
    return [
        json.loads(line) for line in (Path(folder) / f"{name}.jsonl").read_bytes().split(b"\n")[:-1]
    ]


# ARC and OpenBookQA


def arc_line(stem, texts, labels, key):
    options = [{"text": t, "label": label} for t, label in zip(texts, labels, strict=True)]
    return {"id": "x", "question": {"stem": stem, "choices": options}, "answerKey": key}


QUESTIONS = [
    arc_line("Which is wet?", ["water", "sand", "a stone", "12"], "ABCD", "A"),
    arc_line("Which three?", ["one", "two {{ 7*7 }}", "three"], "123", "3"),
    arc_line(WILD, ["[a]", "'b\"", "c\n", "{{d}}", "é"], "ABCDE", "E"),
    arc_line("42", ["1", "2", "3", "4", "5"], "12345", "2"),
    arc_line("Which is B?", ["a", "b", "c"], "ABC", "B"),
]


def in_hub_form(line):
    options = line["question"]["choices"]
    return {
        "id": line["id"],
        "question": line["question"]["stem"],
        "question_stem": line["question"]["stem"],
        "choices": {
            "text": [one["text"] for one in options],
            "label": [one["label"] for one in options],
        },
        "answerKey": line["answerKey"],
    }


def own_task(config_file, tmp_path, lines) -> ConfigurableTask:
    """lm-eval's own task with these lines, in the hub's form, for its test split."""
    hub = write_lines(tmp_path / "hub.jsonl", *map(in_hub_form, lines))
    config = load_yaml(OWN_TASKS / config_file)
    for key in ("tag", "dataset_name", "training_split", "validation_split"):
        config.pop(key, None)
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": hub}}}
    return ConfigurableTask(config={**config, **data, "fewshot_split": "test"})


def assert_same_task(ours, theirs):
    assert requests(ours) == requests(theirs)
    assert requests(ours, shots=2) == requests(theirs, shots=2)
    assert set(ours.aggregation()) == {"acc", "acc_norm"}
    assert ours.aggregation() == theirs.aggregation()
    assert ours.higher_is_better() == theirs.higher_is_better()
    for our_doc, their_doc in zip(ours.test_docs(), theirs.test_docs(), strict=True):
        count = len(ours.doc_to_choice(our_doc))
        for right in range(count):
            results = [(-1.0 if i == right else -50.0 - i, False) for i in range(count)]
            assert ours.process_results(our_doc, results) == theirs.process_results(
                their_doc, results
            )


@pytest.mark.parametrize(
    ("file", "name", "own"),
    [
        ("arc_easy.test.jsonl", "local_arc_easy", "arc/arc_easy.yaml"),
        ("ARC-V1/ARC-Challenge-Test.jsonl", "local_arc_challenge", "arc/arc_challenge.yaml"),
    ],
)
def test_arc_asks_what_the_harness_asks(tmp_path, file, name, own):
    write_lines(tmp_path / "arc" / file, *QUESTIONS)
    write_lines(tmp_path / "arc" / file.replace("est", "rain"), "not read")
    made = make_tasks(out=str(tmp_path / "out"), arc=str(tmp_path / "arc"))
    assert made["tasks"] == {name: 5}
    (task,) = load(tmp_path / "out")
    assert task.task_name == name
    assert_same_task(task, own_task(own, tmp_path, QUESTIONS))


def test_the_requests_of_arc_by_hand(tmp_path):
    write_lines(tmp_path / "arc_easy.test.jsonl", *QUESTIONS)
    write_lines(tmp_path / "arc_challenge.test.jsonl", QUESTIONS[1])
    made = make_tasks(out=str(tmp_path / "out"), arc=str(tmp_path))
    assert made["tasks"] == {"local_arc_easy": 5, "local_arc_challenge": 1}
    easy, challenge = load(tmp_path / "out", "local_arc_easy", "local_arc_challenge")
    context = "Question: Which three?\nAnswer:"
    expected = [(context, " one"), (context, " two {{ 7*7 }}"), (context, " three")]
    assert requests(challenge) == expected
    assert requests(easy)[4:7] == expected
    assert [easy.doc_to_target(doc) for doc in easy.test_docs()] == [0, 2, 4, 1, 1]
    right = challenge.process_results(
        challenge.test_docs()[0], [(-9.0, False), (-9.0, False), (-1.0, True)]
    )
    assert right == {"acc": 1.0, "acc_norm": 1.0}


@pytest.mark.parametrize("form", ["as published", "flat"])
def test_openbookqa_asks_what_the_harness_asks(tmp_path, form):
    lines = [line for line in QUESTIONS if len(line["question"]["choices"]) != 3]
    flat = [
        {
            "query": line["question"]["stem"],
            "choices": [one["text"] for one in line["question"]["choices"]],
            "gold": [one["label"] for one in line["question"]["choices"]].index(line["answerKey"]),
        }
        for line in lines
    ]
    file = write_lines(tmp_path / "o.jsonl", *(flat if form == "flat" else lines))
    make_tasks(out=str(tmp_path / "out"), openbookqa=file)
    (task,) = load(tmp_path / "out", "local_openbookqa")
    assert_same_task(task, own_task("openbookqa/openbookqa.yaml", tmp_path, lines))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "it is no JSON"),
        ("[" * 100_000, "it is no JSON"),
        ("[1]", "it is no JSON object"),
        ({"question": "Why?", "answerKey": "A"}, "it has no question with choices"),
        (arc_line("q", "ab", "AB", "A"), "it has 2 choices"),
        (arc_line("q", "abcdef", "ABCDEF", "A"), "it has 6 choices"),
        (arc_line("q", "abc", "AB3", "A"), "its labels are ['A', 'B', '3']"),
        (arc_line("q", "abc", "ABF", "A"), "its labels are"),
        (arc_line("q", "abc", "ABB", "A"), "its labels are"),
        (arc_line("q", "abc", [1, 2, 3], "1"), "its labels are [1, 2, 3]"),
        (arc_line("q", "abc", "ABC", "D"), "its answerKey 'D' is none of"),
        (arc_line("q", "abc", "ABC", None), "its answerKey None is none of"),
        (arc_line("q", ["a", " ", "c"], "ABC", "A"), "its choice B is no text"),
        (arc_line("q", ["a", 2, "c"], "ABC", "A"), "its choice B is no text"),
        (arc_line("", "abc", "ABC", "A"), "its question.stem is no text"),
        (arc_line("\ud800", "abc", "ABC", "A"), "its question.stem holds half of a surrogate"),
    ],
)
def test_a_line_that_is_no_question_is_named(tmp_path, line, reason):
    write_lines(tmp_path / "arc_easy.test.jsonl", QUESTIONS[0], "", line)
    with pytest.raises(DataError) as error:
        make_tasks(out=str(tmp_path / "out"), arc=str(tmp_path))
    place = f"arc='{tmp_path}': {tmp_path}/arc_easy.test.jsonl:3 is no question, {reason}"
    assert str(error.value).startswith(place)
    assert "correct or remove it" in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"query": "q", "choices": ["a"], "gold": 0}, "it has no list of at least two choices"),
        ({"query": "q", "choices": "ab", "gold": 0}, "it has no list of at least two choices"),
        ({"query": "q", "choices": ["a", "b"], "gold": 2}, "its gold is 2"),
        ({"query": "q", "choices": ["a", "b"], "gold": True}, "its gold is True"),
        ({"query": "q", "choices": ["a", ""], "gold": 0}, "its choice 1 is no text"),
        ({"choices": ["a", "b"], "gold": 0}, "its query is no text"),
    ],
)
def test_a_line_that_is_no_openbookqa_question_is_named(tmp_path, line, reason):
    file = write_lines(tmp_path / "o.jsonl", line)
    with pytest.raises(DataError, match=re.escape(f"{file}:1 is no question, {reason}")):
        make_tasks(out=str(tmp_path / "out"), openbookqa=file)


# WikiText

ARTICLES = [
    " = Tide = \n \n It rises {{ 7*7 }} . \n \n = = Causes = = \n \n The moon @-@ mostly . \n \n",
    " = 1933 = \n \n A year with w \n = 1 and k = \n 2 . Here it ends . \n \n = = = x = = = \n",
]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_wikitext_is_one_document_an_article(tmp_path, newline):
    file = tmp_path / "wiki.test.raw"
    file.write_bytes((" \n" + "".join(ARTICLES)).replace("\n", newline).encode())
    made = make_tasks(out=str(tmp_path / "out"), wikitext=str(file))
    assert made["tasks"] == {"local_wikitext": 2}
    (task,) = load(tmp_path / "out")
    assert task.OUTPUT_TYPE == "loglikelihood_rolling"
    assert requests(task) == [(text,) for text in ARTICLES]


def test_articles():
    assert list(articles(" = A = \n a \n = = b = = \n = C = \n c")) == [
        " = A = \n a \n = = b = = \n",
        " = C = \n c",
    ]
    assert list(articles("before \n = A = \n a \n")) == ["before \n", " = A = \n a \n"]
    assert list(articles("no title \n = = b = = \n")) == []
    assert list(articles("")) == []


def test_the_measures_of_rolling(tmp_path):
    file = tmp_path / "wiki.raw"
    file.write_text(" = é = \n x y", encoding="utf-8")
    make_tasks(out=str(tmp_path / "out"), wikitext=str(file))
    (task,) = load(tmp_path / "out")
    results = task.process_results(task.test_docs()[0], (-6.0,))
    # Words as the harness counts them, with what stands before the first space.
    assert results == {
        "word_perplexity": (-6.0, 6),
        "byte_perplexity": (-6.0, 13),
        "bits_per_byte": (-6.0, 13),
    }
    aggregated = {name: how([results[name]]) for name, how in task.aggregation().items()}
    assert aggregated == {
        "word_perplexity": pytest.approx(math.e),
        "byte_perplexity": pytest.approx(math.exp(6 / 13)),
        "bits_per_byte": pytest.approx(6 / 13 / math.log(2)),
    }


# Any text


def sentence(number: int, words: int = 12, last: str = "harbour") -> str:
    """Twelve words that no sentence of another number has, but for the last."""
    return " ".join(["The", *(f"w{chr(97 + i)}{number:04d}" for i in range(words - 2)), f"{last}."])


def story(number: int, sentences: int = 8) -> str:
    return " ".join(sentence(100 * number + i, 11 + i % 3) for i in range(sentences))


@pytest.fixture
def text(tmp_path) -> str:
    return write_lines(tmp_path / "Held Out.jsonl", *({"text": story(n)} for n in range(30)))


def test_three_tasks_of_a_text(tmp_path, text):
    made = make_tasks(out=str(tmp_path / "out"), text=text, max_items=20)
    names = ["held_out_rolling", "held_out_last_word", "held_out_continuation"]
    assert made["tasks"] == dict.fromkeys(names, 20)
    rolling, last_word, continuation = load(tmp_path / "out", *names)
    stories = [story(n) for n in range(30)]

    documents = [args for (args,) in requests(rolling)]
    assert len(set(documents)) == 20
    assert set(documents) <= set(stories)

    for context, word in requests(last_word):
        assert word == " harbour"
        assert "harbour." in context
        assert any(f"{context}{word}." in one for one in stories)
    assert set(last_word.aggregation()) == {"perplexity", "acc"}

    asked = requests(continuation)
    for item, first in zip(continuation.test_docs(), range(0, len(asked), 4), strict=True):
        contexts, options = zip(*asked[first : first + 4], strict=True)
        assert set(contexts) == {item["query"]}
        assert [option[1:] for option in options] == item["choices"]
        real = [any(contexts[0] + option in one for one in stories) for option in options]
        assert real.index(True) == item["gold"]
        assert sum(real) == 1
        lengths = [len(option) - 1 for option in options]
        right = lengths[item["gold"]]
        assert all(right / 1.21 <= length <= right * 1.21 for length in lengths)


def test_few_shot_examples_are_other_items_and_well_formed(tmp_path, text):
    make_tasks(out=str(tmp_path / "out"), text=text, name="x", max_items=2)
    last_word, continuation = load(tmp_path / "out", "x_last_word", "x_continuation")
    one, other = last_word.test_docs()
    (context, word), _ = requests(last_word, shots=1)
    assert context == f"{other['context']}{other['word']}\n\n{one['context']}"
    assert word == one["word"]
    one, other = continuation.test_docs()
    expected = f"{other['query']} {other['choices'][other['gold']]}\n\n{one['query']}"
    assert requests(continuation, shots=1)[0] == (expected, " " + one["choices"][0])


def test_documents_come_through_as_they_are(tmp_path):
    documents = [WILD, "[1, 2]", "42", "{{ 7*7 }}", "a\n\n\nb  ", '{"text": "x"}', "\x00", "None"]
    file = write_lines(tmp_path / "wild.jsonl", *({"text": one} for one in documents))
    made = make_tasks(out=str(tmp_path / "out"), text=file)
    assert made["tasks"] == {"wild_rolling": 8}
    assert made["left_out"] == ["wild_last_word", "wild_continuation"]
    (task,) = load(tmp_path / "out")
    assert sorted(args[0] for args in requests(task)) == sorted(documents)


def test_passages_come_through_as_they_are(tmp_path):
    wild = re.sub(r"\s+", " ", WILD)
    lines = [{"text": f"{wild} {story(n, 4)}"} for n in range(20)]
    make_tasks(out=str(tmp_path / "out"), text=write_lines(tmp_path / "w.jsonl", *lines))
    last_word, continuation = load(tmp_path / "out", "w_last_word", "w_continuation")
    for task in (last_word, continuation):
        assert all(args[0].startswith(wild) for args in requests(task))


def test_a_model_that_knows_scores_in_the_harness(tmp_path, text):
    """The whole way: simple_evaluate on every kind of task, with a model that cheats."""
    write_lines(tmp_path / "arc" / "arc_easy.test.jsonl", *QUESTIONS)
    out = tmp_path / "out"
    made = make_tasks(out=str(out), arc=str(tmp_path / "arc"), text=text, max_items=5)
    known = "".join(item["text"] for item in items(out, "held_out_rolling"))
    known += " ".join(story(n) for n in range(30))
    answers = {
        item["query"]: item["choices"][item["gold"]] for item in items(out, "local_arc_easy")
    }

    class Knowing(LM):
        def loglikelihood(self, requests):
            right = [
                context + word in known or answers.get(context) == word[1:]
                for context, word in (one.args for one in requests)
            ]
            return [(-1.0 if one else -100.0, one) for one in right]

        def loglikelihood_rolling(self, requests):
            return [-float(len(one.args[0].encode())) for one in requests]

        def generate_until(self, requests):
            raise NotImplementedError

    manager = TaskManager(include_path=str(out), include_defaults=False)
    results = lm_eval.simple_evaluate(
        Knowing(), tasks=list(made["tasks"]), task_manager=manager, bootstrap_iters=0
    )["results"]
    assert results["local_arc_easy"]["acc,none"] == 1
    assert results["held_out_continuation"]["acc_norm,none"] == 1
    assert results["held_out_last_word"]["acc,none"] == 1
    assert results["held_out_last_word"]["perplexity,none"] == pytest.approx(math.e)
    assert results["held_out_rolling"]["byte_perplexity,none"] == pytest.approx(math.e)
    assert results["held_out_rolling"]["bits_per_byte,none"] == pytest.approx(1 / math.log(2))


def test_what_is_drawn_depends_on_words_and_seed_only(tmp_path, text):
    lines = Path(text).read_text(encoding="utf-8").splitlines()
    other = write_lines(tmp_path / "folder" / "a.val.jsonl", *reversed(lines[:9]))
    write_lines(tmp_path / "folder" / "b.val.jsonl", *lines[9:], lines[0])
    write_lines(tmp_path / "folder" / "c.chunk.00.jsonl", "not read")
    for out, source, seed in (
        ("one", text, 42), ("two", str(Path(other).parent), 42), ("three", text, 43),
    ):  # fmt: skip
        make_tasks(out=str(tmp_path / out), text=source, name="x", max_items=10, seed=seed)
    for name in ("x_rolling", "x_last_word", "x_continuation"):
        one, two, three = (items(tmp_path / out, name) for out in ("one", "two", "three"))
        assert one == two
        assert one != three


def test_the_right_answer_stands_everywhere_and_is_of_any_length(tmp_path):
    texts = (story(n, 12) for n in range(400))
    _, _, task = held_out.held_out_tasks("x", texts, 400, 1)
    assert len(task.items) == 400
    places = Counter(item["gold"] for item in task.items)
    ranks = Counter(
        sum(len(one) < len(item["choices"][item["gold"]]) for one in item["choices"])
        for item in task.items
    )
    assert all(70 <= places[i] <= 130 for i in range(4)), places
    # Ties are frequent here: no more than that the right one is not always in the middle.
    assert ranks[0] > 60 and ranks[3] > 20, ranks


def test_a_cache_of_the_harness_does_not_outlive_the_folder(tmp_path, text):
    out = tmp_path / "out"
    seen = []
    for seed in (1, 2):
        make_tasks(out=str(out), text=text, name="x", max_items=5, seed=seed)
        (task,) = load(out, "x_rolling")
        seen.append(requests(task))
        assert seen[-1] == [(item["text"],) for item in items(out, "x_rolling")]
        for path in out.iterdir():
            path.unlink()
    assert seen[0] != seen[1]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl.xz", "a.jsonl.zst", "a.parquet"])
def test_every_kind_of_text_file(tmp_path, name):
    path, content = tmp_path / name, story(1)
    line = (json.dumps({"content": content}) + "\n").encode()
    if name == "a.parquet":
        datasets.Dataset.from_list([{"content": content}]).to_parquet(path)
    elif name == "a.jsonl.zst":
        with pyarrow.CompressedOutputStream(str(path), "zstd") as stream:
            stream.write(line)
    else:
        compress = {".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)
        path.write_bytes(compress(line if ".jsonl" in name else content.encode()))
    made = make_tasks(out=str(tmp_path / "out"), text=str(path))
    assert made["tasks"]["a_rolling"] == 1
    assert items(tmp_path / "out", "a_rolling") == [{"text": content}]


# Sentences and passages


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("We ate. They went! Why?", ["We ate.", "They went!", "Why?"]),
        ("  We ate.\nThey went. ", ["We ate.", "They went."]),
        ("Head\n\nOne. and two.", ["Head", "One. and two."]),
        ('He said "No." She went. (Yes.) So.', ['He said "No."', "She went.", "(Yes.)", "So."]),
        (
            "Mr. J. R. Smith and Mrs. Day came. We ate.",
            ["Mr. J. R. Smith and Mrs. Day came.", "We ate."],
        ),
        ('He came . " Why ? " he said .', ["He came .", '" Why ?', '" he said .']),
        ("It cost 3.5 pounds. 4 men paid.", ["It cost 3.5 pounds.", "4 men paid."]),
        ("wrapped\nline. Next", ["wrapped\nline.", "Next"]),
        ("", []),
        (" \n ", []),
    ],
)
def test_sentences(text, expected):
    assert [text[start:end] for start, end in held_out.sentences(text)] == expected


FILL = " ".join(["filler"] * 14)


@pytest.mark.parametrize(
    ("last", "word"),
    [
        ("we came to the harbour.", " harbour"),
        ("we came to the “harbour!”", None),  # the word would not follow on a space
        ("“we came to the harbour!”", " harbour"),
        ("we came to the harbour .", " harbour"),
        ('we came to the harbour . "', " harbour"),
        ("we came to the\nharbour.", None),
        ("we came to the  harbour.", None),
        ("we came to the Harbour.", None),  # not met before
        ("we came to the harbours.", None),
        ("we came by sea.", None),  # too short
        ("we came in 1999.", None),
    ],
)
def test_last_words(last, word):
    before = f"The harbour and the sea, {FILL}, you. A {FILL} in 1999. The {FILL}, too. Then "
    found = list(held_out.last_words(before + last))
    assert [one for _, one in found] == ([word] if word else [])
    for context, one in found:
        assert context == f"{before}{last}".partition(f"to the{one}")[0] + "to the"


def test_common_words_are_no_last_words():
    counts = Counter({"said": 50, "tide": 3, **{f"w{i}": 1 for i in range(100)}})
    passages = [("a", " Said"), ("b", " tide")]
    assert held_out.without_common_words(passages, counts) == [{"context": "b", "word": " tide"}]
    assert len(held_out.without_common_words(passages, Counter({"said": 5}))) == 2


def test_continuations_follow_in_the_same_line():
    one, two, three = sentence(1, 20), sentence(2, 20), sentence(3)
    assert list(held_out.continuations(f"{one} {two} {three}")) == [(f"{one} {two}", three)]
    assert list(held_out.continuations(f"{one} {two}\n{three}")) == []
    assert list(held_out.continuations(f"{one} {two} {sentence(3, 5)}")) == []
    assert list(held_out.continuations(f"{one} {two}")) == []


def test_passages_do_not_overlap():
    text = story(1, 40)
    for passages in (held_out.last_words(text), held_out.continuations(text)):
        end, count = 0, 0
        for context, rest in passages:
            start = text.index(context)
            assert start >= end
            end, count = start + len(context + rest), count + 1
        assert count > 3


# The folder


def test_what_the_folder_holds(tmp_path, text):
    out = tmp_path / "deep" / "out"
    made = make_tasks(out=str(out), text=text, max_items=5)
    names = sorted(path.name for path in out.iterdir())
    tasks_there = ["held_out_continuation", "held_out_last_word", "held_out_rolling"]
    assert names == sorted(
        [f"{n}{s}" for n in tasks_there for s in (".jsonl", ".yaml")] + ["provenance.json"]
    )
    assert json.loads((out / "provenance.json").read_text(encoding="utf-8")) == made
    assert made["lingua_topk"] and made["created_at"]
    assert made["inputs"]["seed"] == 42
    for name in tasks_there:
        content = (out / f"{name}.yaml").read_text(encoding="utf-8")
        assert "!" not in content and "{" not in content
        config = yaml.safe_load(content)
        assert config["dataset_kwargs"]["data_files"]["test"] == str(out / f"{name}.jsonl")
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_second_run_uses_what_is_there(tmp_path, text, capsys):
    out = str(tmp_path / "out")
    made = make_tasks(out=out, text=text, max_items=5)
    before = {path: path.stat().st_mtime_ns for path in Path(out).iterdir()}
    (Path(out) / "notes.md").write_text("mine", encoding="utf-8")
    capsys.readouterr()
    assert make_tasks(out=out, text=text, max_items=5) == made
    assert capsys.readouterr().out == f"already there, from the same flags and sources: {out}\n"
    assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"seed": 1}, "seed=1 (there: 42)"),
        ({"max_items": 6}, "max_items=6 (there: 5)"),
        ({"name": "y"}, "name='y' (there: 'held_out')"),
    ],
)
def test_other_flags_are_refused(tmp_path, text, changed, says):
    out = str(tmp_path / "out")
    make_tasks(out=out, text=text, max_items=5)
    with pytest.raises(ConfigError, match=re.escape(f"was made with other inputs: {says}; choose")):
        make_tasks(**{"out": out, "text": text, "max_items": 5, **changed})


def test_other_sources_are_refused(tmp_path, text):
    out = str(tmp_path / "out")
    make_tasks(out=out, text=text, max_items=5)
    with open(text, "a", encoding="utf-8") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(ConfigError, match=r"the files of .*, which changed since"):
        make_tasks(out=out, text=text, max_items=5)
    write_lines(tmp_path / "arc_easy.test.jsonl", *QUESTIONS)
    with pytest.raises(ConfigError, match="was made with other inputs"):
        make_tasks(out=out, arc=str(tmp_path))


def test_a_moved_folder_is_not_taken_for_whole(tmp_path, text):
    make_tasks(out=str(tmp_path / "out"), text=text)
    (tmp_path / "out").rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match=r"other inputs: out='.*moved' \(there: '.*out'\)"):
        make_tasks(out=str(tmp_path / "moved"), text=text)


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_text("{}")])
def test_a_damaged_folder_is_refused(tmp_path, text, harm):
    out = tmp_path / "out"
    make_tasks(out=str(out), text=text)
    harm(out / "held_out_rolling.jsonl")
    with pytest.raises(DataError, match=r"held_out_rolling.jsonl is missing or changed .*: remove"):
        make_tasks(out=str(out), text=text)


@pytest.mark.parametrize("content", [None, "{}", "[]", "{", '{"program": "apps.topk.prepare"}'])
def test_a_folder_of_something_else_is_refused(tmp_path, text, content):
    out = tmp_path / "out"
    out.mkdir()
    (out / ("provenance.json" if content else "x")).write_text(content or "x", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"is there already and apps.topk.tasks did not make it"):
        make_tasks(out=str(out), text=text)
    assert len(list(out.iterdir())) == 1


def test_nothing_is_left_of_a_run_that_fails(tmp_path, text, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tasks.task_folder, "write_json", fail)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=r"cannot be written: .*No space left"):
        make_tasks(out=str(tmp_path / "out"), text=text)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", [".hidden", "sp ace#", "q'uo\"te", "é{a,b}", "pct%20", "-x: y"])
def test_any_name_of_a_folder_can_be_read(tmp_path, text, name):
    make_tasks(out=str(tmp_path / name / "o"), text=text, name="x", max_items=2)
    (task,) = load(tmp_path / name / "o", "x_rolling")
    assert len(requests(task)) == 2


# Mistakes


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({}, "no source is given: give --arc, --openbookqa, --wikitext or --text"),
        ({"text": "no.jsonl"}, "text='no.jsonl' is neither a file nor a folder with *.val.jsonl"),
        ({"text": "empty"}, "text='empty' is neither a file nor a folder with *.val.jsonl files"),
        ({"text": "a.md"}, "text='a.md' is no .txt/.jsonl/.parquet file"),
        ({"text": "none.txt"}, "text='none.txt': none.txt holds no document"),
        ({"text": "blank.jsonl"}, "text='blank.jsonl': blank.jsonl holds no document"),
        ({"text": "bad.jsonl"}, "text='bad.jsonl': bad.jsonl:2: "),
        ({"text": "all_bad.jsonl"}, "text='all_bad.jsonl': all_bad.jsonl:1: "),
        ({"text": "keys.jsonl"}, "text='keys.jsonl': keys.jsonl:2: its keys are 'txt'; each line"),
        ({"text": "cut.txt.gz"}, "text='cut.txt.gz': cut.txt.gz is damaged or truncated"),
        ({"text": "dates.jsonl"}, "dates_rolling: every text is a date"),
        ({"text": "good.txt", "name": "A b"}, "name='A b' is not allowed: give up to 60 of a-z"),
        ({"text": "good.txt", "name": "_a"}, "name='_a' is not allowed"),
        ({"text": "good.txt", "name": "mmlu"}, "name='mmlu' would give a task the name of one"),
        ({"text": "mmlu.txt"}, "name='mmlu' would give a task the name of one of lm-eval's own"),
        ({"text": "good.txt", "max_items": 0}, "max_items=0 is not allowed: give 1 to 10,000"),
        ({"arc": "arc", "name": "x"}, "name='x' is for the tasks of --text, which is not given"),
        ({"arc": "no"}, "arc='no' is not a folder: give the one with ARC's .jsonl files"),
        ({"arc": "good.txt"}, "arc='good.txt' is not a folder"),
        ({"arc": "empty"}, "arc='empty' holds neither ARC-Easy-Test.jsonl nor"),
        ({"arc": "twice"}, "arc='twice' holds both twice/ARC-Easy-Test.jsonl and twice/arc_easy"),
        ({"arc": "noq"}, "arc='noq': noq/arc_easy.test.jsonl holds no question"),
        ({"openbookqa": "no"}, "openbookqa='no' is not a file"),
        ({"openbookqa": "latin"}, "openbookqa='latin': latin:2 is not UTF-8: convert the file"),
        ({"wikitext": "no"}, "wikitext='no' is not a file"),
        ({"wikitext": "good.txt"}, "wikitext='good.txt' holds no article, which starts at a line"),
        ({"text": "good.txt", "out": ""}, "out='' cannot be a folder to write"),
        ({"text": "good.txt", "out": "good.txt"}, "out='good.txt' cannot be a folder to write"),
        ({"text": "good.txt", "out": "a[b]"}, "out='a[b]' is "),
        ({"text": "good.txt", "out": "good.txt/x"}, "out="),
    ],
)
def test_mistakes_are_one_line_and_status_2(tmp_path, monkeypatch, capsys, flags, says):
    monkeypatch.chdir(tmp_path)
    for name, content in {
        "good.txt": "A text.", "mmlu.txt": "A text.", "a.md": "A text.", "none.txt": "",
        "blank.jsonl": '{"text": " "}\n', "bad.jsonl": '{"text": "a"}\n{"text": \n',
        "all_bad.jsonl": "x\n", "keys.jsonl": '{"text": "a"}\n{"txt": "b"}\n',
        "dates.jsonl": '{"text": "2020-01-01"}\n{"text": "1999-12-31 10:00"}\n',
    }.items():  # fmt: skip
        Path(name).write_text(content, encoding="utf-8")
    Path("latin").write_bytes("\né\n".encode("latin-1"))
    Path("cut.txt.gz").write_bytes(gzip.compress(os.urandom(9999))[:5000])
    Path("empty").mkdir()
    write_lines(Path("arc/arc_easy.test.jsonl"), *QUESTIONS)
    write_lines(Path("twice/arc_easy.test.jsonl"), *QUESTIONS)
    write_lines(Path("twice/ARC-Easy-Test.jsonl"), *QUESTIONS)
    write_lines(Path("noq/arc_easy.test.jsonl"), "")
    before = sorted(tmp_path.rglob("*"))
    argv = [f"--{name}={value}" for name, value in {"out": "out", **flags}.items()]
    monkeypatch.setattr(sys, "argv", ["tasks", *argv])
    with pytest.raises(SystemExit) as ended:
        cli.run(tasks.main)
    assert ended.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(f"error: {says}")
    assert output.err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def run_program(*argv) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "apps.topk.tasks", *map(str, argv)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_program(tmp_path, text):
    out = tmp_path / "my tasks"
    made = run_program("--text", text, "--out", out, "--max_items", "7", "--name", "mine")
    assert made.returncode == 0, made.stderr
    assert made.stdout.splitlines() == [
        f"tasks in {out}:",
        "  mine_rolling             7 items",
        "  mine_last_word           7 items",
        "  mine_continuation        7 items",
        "to evaluate on them:",
        f"  python -m apps.topk.eval config=... 'harness.include_path={out}'"
        " 'harness.tasks=[mine_rolling,mine_last_word,mine_continuation]'",
    ]
    wrong = run_program("--text", text, "--out", out, "--sed", "1")
    assert wrong.returncode == 2
    assert wrong.stderr == "error: --sed is no known flag: did you mean seed?\n"


def test_help_says_every_flag(capsys):
    tasks.main(["--help"])
    shown = capsys.readouterr().out
    for flag in ("out", "arc", "openbookqa", "wikitext", "text", "name", "max_items", "seed"):
        assert f"  --{flag} (" in shown


def test_importing_it_loads_no_harness():
    program = (
        "import sys, apps.topk.tasks; print(*{name.partition('.')[0] for name in sys.modules})"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"lm_eval", "datasets", "transformers"}.intersection(loaded)


def test_the_names_taken_by_the_harness_are_known():
    """Of all its tasks, groups and tags, those that a task made here could be called."""
    names = set()
    for path in OWN_TASKS.rglob("*.yaml"):
        content = path.read_text(encoding="utf-8")
        names.update(
            re.findall(r"^\s*-?\s*(?:task|group|tag): *[\"']?([\w.-]+)", content, re.MULTILINE)
        )
    assert {"arc_easy", "wikitext", "mmlu_continuation"} <= names
    ours = re.compile(r"(local_.*)|(.*)_(rolling|last_word|continuation)")
    assert {match[2] for name in names if (match := ours.fullmatch(name))} == set(TAKEN_NAMES)


# Real files

needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no data to try it on in {DATA}")


@needs_data
def test_real_questions(tmp_path):
    file = str(DATA / "openbookqa" / "openbookqa.test.jsonl")
    made = make_tasks(out=str(tmp_path / "out"), arc=str(DATA / "arc"), openbookqa=file)
    counts = {
        f"local_arc_{kind}": len(
            (DATA / "arc" / f"arc_{kind}.test.jsonl").read_bytes().splitlines()
        )
        for kind in ("easy", "challenge")
    }
    assert made["tasks"] == {**counts, "local_openbookqa": 500}
    lines = [json.loads(line) for line in (DATA / "arc" / "arc_easy.test.jsonl").open("rb")]
    (ours,) = load(tmp_path / "out", "local_arc_easy")
    assert requests(ours) == requests(own_task("arc/arc_easy.yaml", tmp_path, lines))
    (books,) = load(tmp_path / "out", "local_openbookqa")
    assert len(requests(books)) == 2000


@needs_data
def test_real_articles(tmp_path):
    for name, count in (("valid.txt", 60), ("test.txt", 60)):
        text = (DATA / "wikitext-2" / name).read_text(encoding="utf-8")
        found = list(articles(text))
        assert len(found) == count
        assert "".join(found) == text.removeprefix(" \n")
    file = str(DATA / "wikitext-2" / "wiki.test.raw")
    made = make_tasks(out=str(tmp_path / "out"), wikitext=file)
    # A copy without blank lines, where two lines of a formula look like titles.
    assert made["tasks"] == {"local_wikitext": 62}
    (task,) = load(tmp_path / "out")
    assert requests(task)[0][0].startswith(" = Robert Boulter = \n Robert Boulter is an English")


@needs_data
@pytest.mark.parametrize("name", ["enwiki", "books"])
def test_real_text(tmp_path, name):
    made = make_tasks(out=str(tmp_path / "out"), text=str(DATA / f"{name}.val.jsonl.xz"))
    stem = f"{name}_val"
    assert made["tasks"] == {
        f"{stem}_{task}": 200 for task in ("rolling", "last_word", "continuation")
    }
    for item in items(tmp_path / "out", f"{stem}_last_word"):
        assert item["word"].strip() in item["context"]
    longest = [
        max(item["choices"], key=len) == item["choices"][item["gold"]]
        for item in items(tmp_path / "out", f"{stem}_continuation")
    ]
    assert 0.15 < sum(longest) / 200 < 0.35
