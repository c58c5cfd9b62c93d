"""The page's part on steering in a real browser."""

import re

import pytest

from apps.topk.neurons.page_data import read_page_data
from apps.topk.steering.page_data import read_steering
from lingua_topk.report.page import page as written
from tests.report import made_up, made_up_steering
from tests.report.browser import opened, visit

X = "\u00d7"  # as the page writes it
FIRST = f"#neuron/{made_up_steering.RIVER}"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    made_up.write(folder / "neurons")
    made_up_steering.write(folder / "steering")
    found = read_page_data(
        folder / "neurons", made_up.PIECES, made_up.SPECIAL, n_texts=2, strongest=5, n_contexts=3
    )
    found.steering = read_steering(folder / "steering", made_up.described(), found.layers)
    return found


@pytest.fixture(scope="module")
def file(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(written(data), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory):
    """The same report where nothing was steered."""
    steering, data.steering = data.steering, None
    path = tmp_path_factory.mktemp("page") / "plain.html"
    path.write_text(written(data), encoding="utf-8")
    data.steering = steering
    return path


def cells(tab, part):
    rows = tab.locator(f"{part} tbody tr")
    return [rows.nth(i).locator("th, td").all_inner_texts() for i in range(rows.count())]


def texts(tab, part="#steering-example"):
    """The passages of an example with their marks and their counts."""
    tab.wait_for_selector(f"{part} .pair")
    cards = [tab.locator(f"{part} .pair .card").nth(i) for i in (0, 1)]
    return [
        (card.locator(".passage").inner_text(), card.locator("mark.concept").all_inner_texts(),
         card.locator(".hint").inner_text())
        for card in cards
    ]  # fmt: skip


def choices(tab, name):
    return tab.locator(f"[data-choice={name}] option").all_inner_texts()


def test_the_part_is_there_with_its_numbers(browser, file):
    with opened(browser, file) as tab:
        tab.get_by_role("link", name="Steering", exact=True).click()
        tab.wait_for_selector("#view-steering:not([hidden])")
        assert tab.get_attribute("nav a[href='#steering']", "aria-current") == "page"
        assert "Steering lifts by 6." in tab.inner_text("#steering-sentences")
        assert tab.locator("#view-steering figure svg").count() == 1
        assert cells(tab, "#steering-methods") == [
            ["neuron", "2", "6.12 (4 to 9.5)", "1.5", "0.9", "0.6 (0.5 to \u2013)"],
            ["direction U+202Egnihtyna", "1", "\u2013", "12346", "\u2013", "\u2013"],
        ]
        first, second = cells(tab, "#steering-concepts")
        assert first == [
            made_up_steering.RIVER, "river, bank", f"2 {X} (7)", "1%", "7%", "7.00", "1.50", "0.50",
            "example",
        ]  # fmt: skip
        assert second[:1] + second[2:] == [
            made_up_steering.HOSTILE, f"4 {X} (14)", "1%", "5%", "5.00", "1.50", "\u2013",
            "example",
        ]  # fmt: skip


def test_a_report_without_steering_has_no_such_part(browser, plain):
    with opened(browser, plain, "#steering") as tab:
        assert tab.is_visible("#facts")  # the overview, as for any address that is none
        assert "teer" not in tab.inner_text("body")
        assert tab.locator("[id*=steering]").count() == 0
        visit(tab, FIRST)
        tab.wait_for_selector(".contexts")
        assert tab.locator(".steered-part").count() == 0


def test_the_words_of_the_concept_are_marked_whole_and_in_any_case(browser, file):
    with opened(browser, file, "#steering") as tab:
        unsteered, steered = texts(tab)
        assert unsteered == ("Once upon a time there was a house", [],
                             "0 of 7 words are the neuron's")  # fmt: skip
        text, marks, count = steered
        assert text == "Once the River,⏎\na RIVER of rivers; Don\u2019t bank on stone"
        assert marks == ["River", "RIVER", "Don\u2019t", "bank", "stone"]
        assert count == "5 of 10 words are the neuron's"


def test_a_word_that_the_prompt_begins_is_whole(browser, file):
    with opened(browser, file, "#steering") as tab:
        tab.select_option("[data-choice=index]", label="The ri")
        unsteered, steered = texts(tab)
        assert unsteered == ("The river.", ["ver"], "1 of 1 words are the neuron's")
        assert steered == ("The rich riverbed", [], "0 of 2 words are the neuron's")


def test_an_example_is_chosen_by_neuron_method_delta_and_prompt(browser, file):
    with opened(browser, file, "#steering") as tab:
        # It begins with the neuron itself at its chosen delta.
        assert "7.00" in tab.inner_text("#steering-example .scores")
        assert choices(tab, "method") == ["neuron", "direction"]
        assert choices(tab, "delta") == [f"1 {X} (3.5)", f"2 {X} (7) chosen"]
        assert choices(tab, "index") == ["Once", "The ri"]
        tab.select_option("[data-choice=delta]", label=f"1 {X} (3.5)")
        assert texts(tab)[1][1] == ["river"]
        assert "3.00" in tab.inner_text("#steering-example .scores")
        assert choices(tab, "index") == ["Once"]
        tab.select_option("[data-choice=method]", label="direction")
        assert texts(tab)[1][0] == "Once a direction flows by"
        assert tab.locator("#steering-example .scores").count() == 0  # it was not reported
        tab.select_option("[data-choice=concept]", index=1)
        assert tab.inner_text("#steering-example .about a") == made_up_steering.HOSTILE
        address = tab.evaluate("location.hash")
        shown = tab.inner_text("#steering-example")
    with opened(browser, file, address) as tab:  # which leads to the same
        tab.wait_for_selector("#steering-example .pair")
        assert tab.inner_text("#steering-example") == shown


def test_what_was_not_changed_stays_where_it_can(browser, file):
    def chosen(tab):
        selected = "all => all.map(one => one.selectedOptions[0].textContent)"
        return tab.locator("#steering-choice select").evaluate_all(selected)[1:]

    with opened(browser, file, "#steering") as tab:
        tab.select_option("[data-choice=index]", label="The ri")
        tab.select_option("[data-choice=method]", label="direction")
        assert chosen(tab) == ["direction", f"0.5 {X} (1.75) chosen", "Once"]  # its only example
        tab.select_option("[data-choice=method]", label="neuron")
        assert chosen(tab) == ["neuron", f"2 {X} (7) chosen", "Once"]
        tab.select_option("[data-choice=delta]", label=f"1 {X} (3.5)")
        assert chosen(tab) == ["neuron", f"1 {X} (3.5)", "Once"]


def test_a_steered_neuron_says_so_on_its_own_page(browser, file):
    with opened(browser, file, "#steering") as tab:
        tab.locator("#steering-concepts").get_by_role("link", name=made_up_steering.RIVER).click()
        tab.wait_for_selector("#view-neuron:not([hidden]) .steered-part")
        assert "1% → 7%" in tab.inner_text(".steered-part .scores")
        assert texts(tab, ".steered-part")[1][1][:2] == ["River", "RIVER"]
        tab.locator(".steered-part").get_by_role("link").last.click()
        tab.wait_for_selector("#view-steering:not([hidden])")
        assert tab.evaluate("document.activeElement.id") == "steering-texts"
        assert texts(tab)[1][1][:2] == ["River", "RIVER"]
        visit(tab, "#neuron/0:3")
        tab.wait_for_selector(".contexts")
        assert tab.locator(".steered-part").count() == 0


def test_an_example_that_is_not_there_is_said_to_be_none(browser, file):
    for name in ("99", "length"):
        with opened(browser, file, f"#steering/{name}") as tab:
            assert tab.inner_text("#steering-example") == f"There is no example {name}"


@pytest.mark.parametrize("where", ["#steering/4", f"#neuron/{made_up_steering.HOSTILE}"])
def test_hostile_text_is_shown_as_text(browser, file, where):
    """`opened` also sees to it that no dialog came up and nothing was loaded."""
    with opened(browser, file, where) as tab:
        part = "#view-steering" if "steering" in where else ".steered-part"
        tab.wait_for_selector(f"{part} .pair")
        shown = tab.locator(part).evaluate("one => one.textContent")
        for text in ("</script><script>alert(1)</script>", "<img src=x onerror=alert(2)>",
                     "U+202Eturned", "U+001B[31m", "␀", "U+D800", "{{script}}"):  # fmt: skip
            assert text in shown, text
        options = "".join(tab.locator("option").evaluate_all("all => all.map(o => o.textContent)"))
        assert not re.search("[\u202e\0\x1b\ufeff\ud800]", shown + options)
        assert tab.locator("main img, main script, [onclick], [onload]").count() == 0


@pytest.mark.parametrize("width", [360, 400])
def test_on_a_phone_the_texts_stand_below_each_other(browser, file, width):
    tops = "all => all.map(one => one.getBoundingClientRect().top)"
    with opened(browser, file, "#steering", viewport={"width": width, "height": 780}) as tab:
        tab.wait_for_selector("#steering-example .pair")
        high, low = tab.locator("#steering-example .pair .card").evaluate_all(tops)
        assert high < low
        for where in ("#steering", "#steering/4", FIRST):
            visit(tab, where)
            assert tab.evaluate("document.documentElement.scrollWidth") <= width, where
    with opened(browser, file, "#steering") as tab:
        tab.wait_for_selector("#steering-example .pair")
        left, right = tab.locator("#steering-example .pair .card").evaluate_all(tops)
        assert left == right
