"""A checkout of Meta Lingua that lacks a name which apps.topk needs is refused, by that name.

The names are taken from the real modules one by one, in a process of its own that runs on the
checkout; which names there are, that process finds out.
"""

import json
import os
import re

import pytest

from tests.host_contract.on_host import run_on_host

pytestmark = pytest.mark.skipif(
    not os.environ.get("LINGUA_HOME"), reason="LINGUA_HOME names no checkout of Meta Lingua"
)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("removal") / "report.json"
    run_on_host("lingua", "remove_names.py", path)
    return json.loads(path.read_text(encoding="utf-8"))


def test_names_of_the_loop_and_of_its_evaluation_are_replaced(report):
    replaced = {(entry["module"], entry["name"]) for entry in report["replaced"]}
    assert ("apps.main.train", "LMTransformer") in replaced
    assert ("apps.main.eval", "launch_eval") in replaced
    assert {module for module, _ in replaced} == {"apps.main.train", "apps.main.eval"}


def test_without_a_replaced_name_the_seam_names_it_and_no_other(report):
    names = {entry["name"] for entry in report["replaced"]}
    for entry in report["replaced"]:
        assert entry["error"] is not None, f"{entry} can be missing, and nobody notices"
        kind, text = entry["error"]
        assert kind == "HostError"
        lacking = re.findall(r"(\S+) of this host has no (\w+)", text)
        assert lacking == [(entry["module"], entry["name"])]
        assert names & set(re.findall(r"\w+", text)) == {entry["name"]}


def test_without_a_replaced_name_nothing_is_replaced(report):
    assert report["replaced"]
    assert not [entry for entry in report["replaced"] if entry["changed"]]


@pytest.mark.parametrize(
    ("end", "error"),
    [("as usual", None), ("with an exception", ["ZeroDivisionError", "in the loop"])],
)
def test_after_the_seam_every_name_is_the_original(report, end, error):
    assert report["afterwards"][end] == {"error": error, "changed": []}


def test_without_a_name_that_we_import_the_import_names_it(report):
    assert len(report["imported"]) >= 15
    for which, error in report["imported"].items():
        module, _, name = which.partition(": ")[2].rpartition(".")
        assert error is not None, f"{which} can be missing, and nobody notices"
        assert error[0] == "ImportError", which
        assert error[1].startswith(f"cannot import name '{name}' from '{module}'")
