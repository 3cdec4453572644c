"""The page in headless Chromium, through the life of a run: live, killed, finished, beside another one.

Needs playwright, plotly, and Chromium of the system's packages.
"""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from asyncdapo.controller.watch.charts import CHARTS
from asyncdapo.controller.watch.site import Site
from asyncdapo.controller.watch.web import Server
from tests.controller.runs import command, launch, started, wait_for_step
from tests.controller.watch.run_files import run_files
from tests.controller.watch.test_web import Html
from tests.replay.small_run import finished_run

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium"),
    pytest.mark.timeout(900),
]
SIZES = {"wide": (1280, 900), "narrow": (390, 844)}
TITLES = [*(chart.title for chart in CHARTS), "What processes did in the latest steps"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    pytest.importorskip("plotly")
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def watched(*run_dirs: Path) -> Iterator[str]:
    """The address of the page of these runs."""
    process = subprocess.Popen(
        command("watch", *map(str, run_dirs), "--web"), stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.wait()


@contextmanager
def opened(browser: Any, address: str, width: int, height: int) -> Iterator[Any]:
    """The page, on which nothing may go wrong."""
    page, wrong = browser.new_page(viewport={"width": width, "height": height}), []
    page.on("console", lambda said: wrong.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("requestfailed", lambda request: wrong.append(request.url))
    page.goto(address)
    page.wait_for_selector("figure .main-svg", timeout=60_000)
    yield page
    page.close()
    assert wrong == []


def show_everything(page: Any) -> None:
    """Every chart that has numbers is drawn with titles on its axes, and nothing is wider than the window."""
    assert page.locator("figcaption").all_inner_texts() == TITLES
    for figure in page.locator("figure").all():
        figure.scroll_into_view_if_needed()
        figure.locator(".main-svg, .none").first.wait_for(timeout=60_000)
        if figure.locator(".none").count() == 0:
            assert all(figure.locator(f".g-{axis}title").text_content() for axis in "xy")
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]
    page.evaluate("scrollTo(0, 0)")


def to_a_sample(page: Any) -> str:
    """Two clicks from a curve to the text of a completion."""
    page.locator("figure .nsewdrag").first.click(position={"x": 120, "y": 60})
    page.locator("#groups tbody tr").first.click(timeout=60_000)
    page.wait_for_selector("#group pre span", timeout=60_000)
    return page.locator("#group pre").last.inner_text()


def check(browser: Any, name: str, state: str, out: Path, *run_dirs: Path) -> None:
    with watched(*run_dirs) as address:
        for size, (width, height) in SIZES.items():
            with opened(browser, address, width, height) as page:
                assert state in page.locator("#tabs").inner_text()
                show_everything(page)
                page.screenshot(path=out / f"{name}_{size}.png")
                assert "=" in to_a_sample(page)
                page.screenshot(path=out / f"{name}_{size}_sample.png")


def test_a_run_is_shown_while_it_lives_when_it_is_killed_when_it_is_done_and_beside_another(
    browser: Any, tmp_path: Path
) -> None:
    run_dir = tmp_path / "first"
    keys = ("run.steps=14", "learner.checkpoint_every=4", "replay.keep_payloads=true")
    with started(run_dir, *keys) as process:
        wait_for_step(run_dir, 6, process)
        check(browser, "live", "first, running", tmp_path, run_dir)
    check(browser, "killed", "first, ended early", tmp_path, run_dir)
    killed = shutil.copytree(run_dir, tmp_path / "killed")
    assert launch(run_dir, *keys).exit_code == 0
    check(browser, "finished", "first, finished", tmp_path, run_dir)
    check(browser, "two", "killed, ended early", tmp_path, run_dir, killed)


def test_html_of_a_model_is_text(browser: Any, tmp_path: Path) -> None:
    run_dir = run_files(finished_run(tmp_path), [{"step": 1, "reward/mean": 0.5}, {"step": 2, "reward/mean": 0.6}])
    with Server(Site([run_dir], lambda run_dir: Html()), 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with opened(browser, server.address, *SIZES["wide"]) as page:
            page.fill("#step", "1")
            page.press("#step", "Enter")
            page.locator("#groups tbody tr").first.click()
            page.wait_for_selector("#group pre span")
            assert "<script>alert(1)</script>" in page.locator("#group pre").last.inner_text()
            assert page.locator("#group script").count() == 0
        server.shutdown()
