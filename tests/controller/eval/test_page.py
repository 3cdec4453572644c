"""The page of an evaluation: nothing in it is markup but its own, it says what it leaves out, and it shows in a browser
what the file has."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncdapo.controller.eval.lines import AnswerLine
from asyncdapo.controller.eval.page import longest_shown, render
from tests.controller.eval.answers import answered, prompt, text

TAKE = "document.title='taken'"
HOSTILE = f'</script><script>{TAKE}</script><img src=x onerror="{TAKE}"> &lt;b&gt; <!-- \u2028'
METRICS = {"eval/accuracy": 0.25, "eval/accuracy_stderr": 0.125, "eval/pass@2": 0.5, "eval/response_tokens_mean": 7.0}
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


def line(prompt_id: int, sample: int = 0, **values) -> AnswerLine:
    return AnswerLine.of(answered(prompt_id, sample, **values), prompt(prompt_id), text(prompt_id))


def page(*lines: AnswerLine, budget: int = 10_000, title: str = "made, step 3") -> str:
    return render(title, lambda: lines, METRICS, budget).decode()


def data_of(html: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)[1])


class Elements(HTMLParser):
    """The names of all elements, as a browser would make them of the file."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.names.append(tag)


# ------------------------------------------------------------------------------------------------------ untrusted text


@given(st.text(st.characters(exclude_categories=["Cs"])), st.sampled_from(["", HOSTILE, "</script", "<!--<script>"]))
def test_whatever_a_model_writes_the_page_has_the_same_elements_and_the_same_text(written: str, hostile: str) -> None:
    html = page(line(0, response=written + hostile, pred=hostile + written), title=hostile or "t")
    assert Elements(html).names == Elements(page(line(0), title="t")).names
    answer = data_of(html)["prompts"][0]["answers"][0]
    assert answer["parts"] == [[1, [written + hostile]]]
    assert answer["pred"] == hostile + written


@given(st.lists(st.tuples(st.integers(0, 1), st.text(st.characters(exclude_categories=["Cs"]))), min_size=2))
def test_the_page_of_an_episode_has_what_was_sampled_and_what_was_observed_apart(parts: list[tuple[int, str]]) -> None:
    parts = [(whose, text + HOSTILE) for whose, text in parts]
    html = page(line(0, parts=parts))
    assert Elements(html).names == Elements(page(line(0), title="t")).names
    assert data_of(html)["prompts"][0]["answers"][0]["parts"] == [[whose, [text]] for whose, text in parts]


def test_the_page_asks_no_network_for_anything_and_runs_no_program_but_its_own() -> None:
    html = page(line(0))
    assert not re.search(r"""(src|href)\s*=|url\(|import\s*\(|fetch\(|https?://""", html)
    assert "default-src 'none'" in html
    assert re.search(r"script-src 'sha256-[\w+/]{43}='", html)


# --------------------------------------------------------------------------------------------------------------- budget


@given(st.lists(st.integers(0, 100), max_size=20), st.integers(0, 500))
def test_texts_cut_to_the_limit_fit_and_a_higher_one_would_not_do(lengths: list[int], budget: int) -> None:
    longest = longest_shown(lengths, budget)
    assert sum(min(length, longest) for length in lengths) <= budget
    if any(length > longest for length in lengths):
        assert sum(min(length, longest + 1) for length in lengths) > budget


def test_a_page_with_room_shows_everything() -> None:
    [answer] = data_of(page(line(0, response="x" * 5000)))["prompts"][0]["answers"]
    assert answer["parts"] == [[1, ["x" * 5000]]]


def test_long_responses_show_both_ends_and_say_how_much_is_missing_and_where_it_is() -> None:
    short, long = line(0, response="short"), line(0, 1, response="a" * 5000 + "b" * 5000)
    answers = data_of(page(short, long, budget=2000))["prompts"][0]["answers"]
    assert answers[0]["parts"] == [[1, ["short"]]]
    [[_, (begin, end, num_missing)]] = answers[1]["parts"]
    assert set(begin) == {"a"}
    assert set(end) == {"b"}
    assert len(begin) + len(end) + num_missing == 10_000
    assert 1900 < len(begin) + len(end) <= 2000
    assert answers[1]["line"] == 2


def test_a_long_observation_is_cut_and_the_responses_around_it_are_not() -> None:
    html = page(line(0, parts=[(1, "ask"), (0, "x" * 5000), (1, "tell")]), budget=2000)
    asked, (_, observed), told = data_of(html)["prompts"][0]["answers"][0]["parts"]
    assert (asked, told) == ([1, ["ask"]], [1, ["tell"]])
    assert len(observed) == 3


def test_answers_are_in_order_though_they_arrive_in_none_and_greedy_ones_are_last() -> None:
    lines = [line(1, 1), line(0, 0, greedy=True), line(1, 0), line(0, 1), line(0, 0)]
    prompts = data_of(page(*lines))["prompts"]
    assert [entry["id"] for entry in prompts] == [0, 1]
    assert [(answer["sample"], answer["greedy"], answer["line"]) for answer in prompts[0]["answers"]] == [
        (0, False, 5),
        (1, False, 4),
        (0, True, 2),
    ]


# ------------------------------------------------------------------------------------------------------------- browser


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The document as chromium has it once the page's program has run."""
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    directory = tmp_path_factory.mktemp("page")
    lines = [
        line(0, 0, acc=0.0, response=HOSTILE, pred=None, cut=True),
        line(0, 1, acc=1.0),
        line(1, 0, acc=0.0, response="x" * 9000),
        line(2, 0, acc=1.0),
    ]
    path = directory / "page.html"
    path.write_text(page(*lines, budget=6000, title=f"made {HOSTILE}"))
    options = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={directory}", "--dump-dom")
    result = subprocess.run([CHROMIUM, *options, path.as_uri()], capture_output=True, text=True, timeout=60, check=True)
    return result.stdout


def test_a_browser_shows_the_summary_and_a_row_for_each_prompt(shown: str) -> None:
    assert "3 prompts, 4 answers. 1 long responses are shortened here" in shown
    assert ">25.0 %<small> ± 12.5 %</small>" in shown
    assert [found for found in ("all 3", "all wrong 1", "mixed 1", "all right 1", "truncated 1") if found in shown] == [
        "all 3",
        "all wrong 1",
        "mixed 1",
        "all right 1",
        "truncated 1",
    ]
    assert len(re.findall(r'<button id="p\d+"', shown)) == 3
    assert "1 of 2 right" in shown


def test_a_browser_shows_prompt_expected_answer_verdict_and_response_of_the_first(shown: str) -> None:
    article = shown[shown.index('<article id="shown"') :]
    for words in ("&lt;bos&gt;What is 0?", ">wrong<", ">none<", ">7 tokens<", ">truncated<", ">3 to 4<"):
        assert words in article


def test_a_browser_shows_hostile_text_and_does_not_obey_it(shown: str) -> None:
    assert re.search(r"<title>made &lt;/script&gt;&lt;script&gt;", shown)
    assert "&lt;img src=x onerror=" in shown
    assert "<img" not in shown
