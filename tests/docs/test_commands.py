"""Every bash block of every page runs: by default launches stop where processes would start, in the soak they run.

What is not run at all, and why, is a table (`stand_ins.NOT_RUN`); what runs on GPUs takes the quickstart's model
instead (`stand_ins.ON_A_CPU`). The blocks of a page run in their order and in one directory. Those of README.md run in
the soak as they are printed, from end to end.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from asyncdapo.metrics.jsonl import read_metrics
from tests.docs import scratch
from tests.docs.blocks import PAGES, blocks_of
from tests.docs.stand_ins import NOT_RUN, PREFLIGHT, SHORT, WHOLE

README = "README.md"
WITH_COMMANDS = [page for page in PAGES if blocks_of(page)]
PAGES_PROPER = [page for page in WITH_COMMANDS if not page.endswith(".yaml")]
"""Without the comments of configs, of which tests/test_configs.py makes the plans."""


def check(page: str, folder: Path, runs: Callable[[str], str], *, timeout_s: float) -> list[str]:
    """What the blocks printed, in their order. `runs` says for the text of a block how far its launches go."""
    start, printed = scratch.make(folder, page), []
    with scratch.judge() as url:
        for block in blocks_of(page):
            done = scratch.run(block, start, runs=runs(block.text), timeout_s=timeout_s, JUDGE_URL=url)
            print(f"{page}:{block.line}\n{block.text}{done.stdout}")
            where = f"{page}:{block.line}: exit code {done.returncode}, expected {block.exit_code}"
            assert done.returncode == block.exit_code, f"{where}\n{block.text}\n{done.stdout}"
            printed.append(done.stdout)
    return printed


@pytest.mark.parametrize("page", [page for page in PAGES_PROPER if page != README])
def test_the_commands_of_a_page_work(page: str, tmp_path: Path) -> None:
    check(page, tmp_path, lambda text: PREFLIGHT, timeout_s=60)


def test_the_readme_works_as_printed_and_its_launch_is_of_the_keys_that_data_prepare_prints(tmp_path: Path) -> None:
    printed = check(README, tmp_path, lambda text: PREFLIGHT, timeout_s=60)
    [keys] = [line.split() for text in printed for line in text.splitlines() if "prompts.path=data/mine/" in line]
    [launch] = [block.text for block in blocks_of(README) if "prompts.path=data/mine/" in block.text]
    assert set(keys) <= set(launch.split())


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", WITH_COMMANDS)
def test_the_runs_of_a_page_come_to_their_end(page: str, tmp_path: Path) -> None:
    check(page, tmp_path, lambda text: WHOLE if page == README else SHORT, timeout_s=400)
    if page == README:
        trained = read_metrics(tmp_path / "asyncdapo" / "runs" / "prepared")
        assert [line["step"] for line in trained] == [0, 1, 2, 3]


def test_the_pages_hold_commands() -> None:
    assert {"README.md", "docs/reward.md", "launchers/README.md", "configs/qwen2.5_32b_dapo.yaml"} <= set(WITH_COMMANDS)


def test_a_wrong_command_a_wrong_key_and_an_unknown_program_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    start = scratch.make(tmp_path, "docs/reward.md")
    for text in ("asyncdapo lunch quickstart", "asyncdapo launch quickstart run.step=3", "ray up cluster.yaml"):
        page.write_text(f"```bash\n{text}\n```\n")
        [block] = blocks_of(str(page))
        assert scratch.run(block, start, runs=PREFLIGHT, timeout_s=60).returncode != 0, text


def test_a_block_is_read_wherever_it_stands(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```\nno\n```\n1. so:\n\n   ```bash\n   one \\\n     two\n   ```\n<!-- exit code: 2 -->\n```bash\nbad\n```\n"
    )
    assert [(block.line, block.text, block.exit_code) for block in blocks_of(str(page))] == [
        (7, "one \\\n  two\n", 0),
        (12, "bad\n", 2),
    ]


def test_every_exception_has_a_reason_and_is_used() -> None:
    texts = "\n".join(block.text for page in PAGES for block in blocks_of(page))
    for start, why in NOT_RUN.items():
        assert start in texts, f"{start} stands on no page"
        assert len(why) > 5
