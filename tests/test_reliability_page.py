"""docs/reliability.md names tests that exist, and says of those left out by default that they are."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "reliability.md").read_text()
NAMED = re.findall(r"`(tests/[\w/]+\.py)`( \([^)]*soak[^)]*\))?", PAGE)
WHOLE_FILE = re.compile(r"^pytestmark = .*mark\.soak", re.MULTILINE)


def test_every_test_that_the_page_names_is_there() -> None:
    for path, soak in NAMED:
        text = (ROOT / path).read_text()
        assert "def test_" in text, path
        assert not soak or "pytest.mark.soak" in text, path
        assert soak or not WHOLE_FILE.search(text), f"{path} runs in the soak alone: say so"


def test_the_page_names_tests() -> None:
    assert len(NAMED) > 30
