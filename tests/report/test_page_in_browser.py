"""The page in a real browser: what one sees, presses and types, and that nothing gets out."""

import re

import numpy as np
import pytest

from apps.topk.neurons.page_data import read_page_data
from lingua_topk.report.data import Firings, Layer, Report, Text
from lingua_topk.report.page import page as written
from tests.report import made_up
from tests.report.browser import opened, visit

MINUS, NONE = "\u2212", "\u2013"  # as the page writes them
ALPHA = re.compile(r"rgba?\(([\d.]+), ([\d.]+), ([\d.]+)(?:, ([\d.]+))?\)")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = made_up.write(tmp_path_factory.mktemp("analysis"))
    firings = {0: Firings(np.array([0, 1, 1]), np.array([3, 7, 4]), np.array([1.0, 9.0, 2.0]))}
    given = Text("Given text 1", np.array([made_up.RIVER, made_up.RIVER]), firings)
    return read_page_data(
        folder, made_up.PIECES, made_up.SPECIAL, n_texts=6, strongest=5, n_contexts=3,
        given=[given],
    )  # fmt: skip


@pytest.fixture(scope="module")
def file(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(written(data), encoding="utf-8")
    return path


def first_names(tab, n=5):
    return tab.locator("#grid-body .grid-row .neuron").all_inner_texts()[:n]


def column(tab, name):
    cells = tab.locator(f"#grid-body .cell.{name}").all_inner_texts()
    return [float(c.split()[-1].replace(MINUS, "-").rstrip("%")) for c in cells if NONE not in c]


def marks_of(tab):
    """Value, colour and strength of every marked token of the contexts."""
    found = tab.locator(".contexts mark").evaluate_all(
        "all => all.map(one => [Number(one.dataset.value), one.title,"
        " getComputedStyle(one).backgroundColor])"
    )
    parsed = [(value, title, ALPHA.fullmatch(colour).groups()) for value, title, colour in found]
    return [(v, t, tuple(c[:3]), float(c[3] or 1)) for v, t, c in parsed]


def contrast(ink, ground):
    """WCAG's contrast of two colours, (r, g, b) from 0 to 255."""

    def luminance(colour):
        parts = [c / 255 for c in colour]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(ink), luminance(ground)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def numbers(colour):
    return [float(c) for c in ALPHA.fullmatch(colour).groups()[:3]]


def test_only_neurons_that_their_words_tell_about_are_put_forward(browser, tmp_path):
    """The first has the highest MonoScore, of a word that holds little of what it does."""
    arrays = {
        "counts": np.full(3, 9), "mono_score": np.array([0.9, 0.5, 0.7]),
        "semantic_entropy": np.array([0.1, 1.0, 2.0]),
    }  # fmt: skip
    words = [[("one", 1.0)], [("two", 1.0)], [("three", 1.0)]]
    layer = Layer(0, True, "survivors", arrays, words, np.array([False, True, True]))
    path = tmp_path / "report.html"
    report = Report("told", [], [layer], [b"a"], np.zeros((1, 4), np.int32))
    path.write_text(written(report), encoding="utf-8")
    with opened(browser, path) as tab:
        tab.wait_for_selector("#starts li")
        lists = tab.locator("#starts ol").all_inner_texts()
        assert ["one" in one for one in lists] == [False, False]
        assert [one.index("two") < one.index("three") for one in lists] == [True, False]


def test_the_overview_says_what_was_analysed(browser, file, data):
    with opened(browser, file) as tab:
        assert "20, residual site, layers 0" in tab.inner_text("#facts")
        for sentence in data.sentences:
            assert sentence[:60] in tab.inner_text("#sentences")
        assert tab.locator("#starts li").count() > 5
        assert tab.locator(".figures figure svg").count() == 2
        assert "1,234 tokens; vectors of words: others <b>." in tab.inner_text(".figures")
        assert tab.locator("#tables table").count() == len(data.tables)


def test_the_table_sorts(browser, file, data):
    with opened(browser, file, "#neurons") as tab:
        assert first_names(tab, 2) == ["0:0", "0:1"]
        head = tab.locator("[data-column=token]")
        assert head.get_attribute("aria-sort") is None
        head.get_by_role("button").click()
        assert head.get_attribute("aria-sort") == "ascending"
        low = column(tab, "token")
        assert low == sorted(low)
        head.get_by_role("button").press("Enter")
        assert head.get_attribute("aria-sort") == "descending"
        high = column(tab, "token")
        assert high == sorted(high, reverse=True)
        known = np.concatenate([layer.arrays["token_entropy"] for layer in data.layers])
        assert high[0] == pytest.approx(np.nanmax(known), abs=0.006)
        assert low[0] == pytest.approx(np.nanmin(known), abs=0.006)


def test_the_table_filters_and_searches(browser, file, data):
    with opened(browser, file, "#neurons") as tab:
        n_alive = sum((layer.arrays["counts"] > 0).sum() for layer in data.layers)
        assert tab.inner_text("#count") == f"{n_alive} of 300"
        tab.select_option("#state", "dead")
        assert first_names(tab, 1) == [f"0:{made_up.DEAD}"]
        assert tab.inner_text("#count") == f"{300 - n_alive} of 300"
        assert tab.locator("#grid-body .words").first.inner_text() == "never fired"
        tab.select_option("#state", "all")
        tab.select_option("#layer", "2")
        assert tab.inner_text("#count") == "150 of 300"
        assert first_names(tab, 1) == ["2:0"]
        tab.select_option("#layer", "")
        tab.fill("#search", "2:149")
        assert first_names(tab) == ["2:149"]
        tab.fill("#search", "RIVER")
        assert f"0:{made_up.ONE_TOKEN}" in first_names(tab, 99)
        tab.fill("#search", "no such word")
        assert first_names(tab) == []


def test_only_rows_in_sight_are_in_the_document(browser, file):
    with opened(browser, file, "#neurons") as tab:
        tab.select_option("#state", "all")
        assert tab.locator("#grid-body .grid-row").count() < 60
        assert tab.get_attribute("#grid", "aria-rowcount") == "301"  # with the head
        tab.evaluate("document.getElementById('grid').scrollTop = 1e6")
        tab.wait_for_selector("#row-299")
        assert tab.get_attribute("#row-299", "aria-rowindex") == "301"
        assert tab.locator("#row-0").count() == 0


def test_a_neuron_opens_by_click_and_the_history_leads_back(browser, file):
    with opened(browser, file, "#neurons") as tab:
        tab.locator("#row-3 .cell.words").click()
        tab.wait_for_selector("#view-neuron:not([hidden]) h1")
        assert tab.inner_text("#view-neuron h1") == "Neuron 0:3"
        assert tab.evaluate("location.hash") == "#neuron/0:3"
        tab.go_back()
        tab.wait_for_selector("#view-neurons:not([hidden])")


def test_a_neuron_opens_by_keys_and_the_focus_comes_back(browser, file):
    with opened(browser, file, "#neurons") as tab:
        tab.focus("#grid")
        for key in ("ArrowDown", "End", "Home", "PageDown", "ArrowUp", "ArrowDown"):
            tab.keyboard.press(key)
        chosen = tab.get_attribute("#grid", "aria-activedescendant")
        name = tab.inner_text(f"#{chosen} .neuron")
        assert name != "0:0"
        tab.keyboard.press("Enter")
        tab.wait_for_selector("#view-neuron:not([hidden]) h1")
        assert tab.inner_text("#view-neuron h1") == f"Neuron {name}"
        assert tab.evaluate("document.activeElement.tagName") == "H1"
        tab.keyboard.press("Escape")
        tab.wait_for_selector("#view-neurons:not([hidden])")
        assert tab.evaluate("document.activeElement.id") == "grid"
        assert tab.get_attribute("#grid", "aria-activedescendant") == chosen


def test_a_neuron_opens_by_its_address_and_shows_what_is_known(browser, file, data):
    with opened(browser, file, f"#neuron/0:{made_up.ONE_TOKEN}") as tab:
        tab.wait_for_selector(".contexts")
        text = tab.inner_text("#view-neuron")
        arrays = data.layers[0].arrays
        assert f"{arrays['counts'][made_up.ONE_TOKEN]} of 560" in text
        assert tab.locator(".measures td").first.inner_text() == "0.00"  # one token: no entropy
        assert "␣river" in text and "100%" in text
        assert tab.locator(".histogram rect").count() == arrays["histogram"].shape[1]
        for title in ("Promotes", "Suppresses", "Trace", "The same index"):
            assert tab.get_by_role("heading", name=title).count() == 1
        assert tab.locator(".sparkline circle").count() == 9
        tab.get_by_role("link", name=f"2:{made_up.ONE_TOKEN}", exact=True).click()
        tab.wait_for_function(
            "document.querySelector('#view-neuron h1').textContent.includes('2:')"
        )
        tab.go_back()
        tab.wait_for_function(
            "document.querySelector('#view-neuron h1').textContent.includes('0:')"
        )


def test_addresses_of_nothing_say_so(browser, file):
    with opened(browser, file) as tab:
        for where in ("neuron/0:999", "text/99", "neuron/1:0", "text/x:y", "neuron/x", "text"):
            visit(tab, f"#{where}")
            what = where.partition("/")[2]
            title = tab.locator("main > section:not([hidden]) h1")
            title.filter(has_text=re.compile(f"There is no .* {what}$")).wait_for()
    with opened(browser, file, "#nowhere") as tab:
        assert tab.is_visible("#facts")


@pytest.mark.parametrize("index", [0, 2])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_match_the_values_and_can_be_read(browser, file, data, index, scheme):
    arrays = next(one.arrays for one in data.layers if one.index == index)
    # Values of a layer without TopK have both signs.
    seen = arrays["context_values"].reshape(made_up.WIDTH, -1)
    i = int(np.argmax((seen > 0).any(1) & ((seen < 0).any(1) | (index == 0))))
    largest = arrays["maximum"][i]
    with opened(browser, file, f"#neuron/{index}:{i}", color_scheme=scheme) as tab:
        tab.wait_for_selector(".contexts mark")
        marks = marks_of(tab)
        ink, ground = (
            numbers(tab.evaluate(f"getComputedStyle(document.querySelector('.contexts')).{name}"))
            for name in ("color", "backgroundColor")
        )
    kept = arrays["context_values"][i][arrays["context_rows"][i] >= 0]
    fired = kept[kept != 0]
    assert sorted(value for value, *_ in marks) == pytest.approx(sorted(fired), abs=largest / 127)
    hues = {value > 0: hue for value, _, hue, _ in marks}
    assert len(set(hues.values())) == len(hues)
    for value, title, hue, alpha in marks:
        assert hue == hues[value > 0]
        assert alpha == pytest.approx(max(abs(value) / largest, 0.06), abs=0.01)
        assert title.startswith(f"{value:.3g}".replace("-", MINUS))
        mixed = [alpha * float(a) + (1 - alpha) * b for a, b in zip(hue, ground, strict=True)]
        assert contrast(ink, mixed) > 4.5
    assert (len(hues) == 2) == (index == 2)


def test_dark_is_another_page_by_preference_and_by_choice(browser, file):
    def ground(tab):
        return tab.evaluate("getComputedStyle(document.body).backgroundColor")

    with opened(browser, file, color_scheme="light") as tab:
        light = ground(tab)
        tab.click("#theme")
        assert ground(tab) == light
        tab.click("#theme")
        dark = ground(tab)
        assert sum(numbers(dark)) < 200 < sum(numbers(light))
    with opened(browser, file, color_scheme="dark") as tab:
        assert ground(tab) == dark
        tab.click("#theme")
        assert ground(tab) == light


@pytest.mark.parametrize("width", [360, 390])
def test_it_fits_a_phone(browser, file, width):
    views = ("", "#neurons", "#neuron/0:9", "#texts", "#text/1:3")
    with opened(browser, file, viewport={"width": width, "height": 780}) as tab:
        for where in views:
            visit(tab, where)
            assert tab.evaluate("document.documentElement.scrollWidth") <= width, where
        visit(tab, "#neurons")
        tab.locator("#row-1 .cell.words").click()
        tab.wait_for_selector("#view-neuron:not([hidden])")


def test_texts_show_what_fires_on_each_token(browser, file, data):
    with opened(browser, file, "#texts") as tab:
        tab.locator("#text-list a").nth(1).click()
        tab.wait_for_selector(".choice")
        text = data.texts[1]
        tab.locator(".choice").nth(4).click()
        assert tab.evaluate("location.hash") == "#text/1:4"
        for layer in (0, 2):
            found = text.firings[layer]
            here = found.positions == 4
            expected = sorted(zip(-abs(found.values[here]), found.neurons[here], strict=True))
            links = tab.locator(f"#firings a[href^='#neuron/{layer}:']").all_inner_texts()
            assert links == [f"{layer}:{neuron}" for _, neuron in expected]
        tab.keyboard.press("ArrowRight")
        assert tab.evaluate("location.hash") == "#text/1:5"
        assert tab.locator(".choice:focus").get_attribute("data-position") == "5"
        tab.select_option("#text-layer", "2")
        assert tab.locator("#firings a[href^='#neuron/0:']").count() == 0
        assert tab.locator("#firings li").count() == 5
        tab.locator("#firings a").first.click()
        tab.wait_for_selector("#view-neuron:not([hidden])")


def test_a_text_is_coloured_by_a_neuron(browser, file):
    with opened(browser, file, "#text/0:1") as tab:  # the given text
        tab.wait_for_selector("#firings li")
        assert tab.locator("#firings .number").all_inner_texts() == ["9", "2"]
        shade = "all => all.map(one => one.style.getPropertyValue('--strength') || '0')"
        tab.get_by_role("button", name="Colour the text by 0:7").click()
        assert tab.locator(".choice").evaluate_all(shade) == ["0.000", "1.000"]
        tab.get_by_role("button", name="Colour the text by 0:7").click()
        assert tab.locator(".choice").evaluate_all(shade) == ["0.000", "0.000"]


def test_words_are_looked_up_in_the_texts_and_the_page_says_that_it_has_no_model(browser, file):
    with opened(browser, file, "#texts") as tab:
        assert "holds no model" in tab.inner_text("#view-texts")
        assert tab.inner_text("#text-count") == "7 of 7"
        tab.fill("#words", "River")
        links = tab.locator("#text-list a")
        assert links.count() >= 2
        assert tab.locator("#text-list b").first.inner_text() == "river"
        links.first.click()
        tab.wait_for_selector("#chosen")
        assert tab.inner_text("#chosen").startswith("␣river")
        tab.go_back()
        tab.fill("#words", "river nosuchword")
        assert "No text" in tab.inner_text("#text-list")


def test_hostile_text_is_shown_as_text(browser, file):
    """`opened` also sees to it that no dialog came up and nothing was loaded."""
    with opened(browser, file, f"#neuron/0:{made_up.ON_HOSTILE}") as tab:
        tab.wait_for_selector(".contexts")
        shown = tab.locator("#view-neuron").evaluate("one => one.textContent")
        for text in ("</script><script>alert(1)</script>", "<img src=x onerror=alert(2)>",
                     "U+202Egnihtyna", "␀", "U+001B[31m", "&lt;b&gt;", "U+FEFF", "U+D800",
                     "{{script}}", "⟨c3⟩", "⟨eda080⟩"):  # fmt: skip
            assert text in shown, text
        assert not re.search("[\u202e\0\x1b\ufeff\ud800]", shown)
        assert tab.locator("main img, main script").count() == 0
        for where in ("", "#neurons", "#texts", "#text/1"):
            visit(tab, where)
            seen = tab.inner_text("body")
            assert not re.search("[\u202e\0\x1b\ufeff]", seen)
            assert tab.locator("main img, main script, [onclick], [onload]").count() == 0


def test_a_browser_that_cannot_unpack_is_told_so(browser, file):
    context = browser.new_context()
    context.add_init_script("delete window.DecompressionStream")
    tab = context.new_page()
    tab.goto(f"file://{file}")
    tab.wait_for_selector("#problem:not([hidden])")
    assert "DecompressionStream" in tab.inner_text("#problem")
    context.close()


def test_five_thousand_neurons_open(browser, tmp_path):
    layers = [
        Layer(
            i,
            True,
            "survivors",
            {"counts": np.ones(1000, np.int64)},
            [[("word", 1.0)]] * 1000,
            np.ones(1000, bool),
        )
        for i in range(5)
    ]
    path = tmp_path / "report.html"
    report = Report("many", [], layers, [b"a"], np.zeros((1, 4), np.int32))
    path.write_text(written(report), encoding="utf-8")
    with opened(browser, path, "#neurons") as tab:
        assert tab.inner_text("#count") == "5,000 of 5,000"
        tab.focus("#grid")
        tab.keyboard.press("End")
        assert tab.locator("#grid-body .grid-row.active .neuron").inner_text() == "4:999"
        assert tab.locator("#grid-body .grid-row").count() < 60
        tab.keyboard.press("Enter")
        tab.get_by_role("heading", name="Neuron 4:999").wait_for()
