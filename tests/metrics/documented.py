"""What docs/metrics.md says of each metric."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
PREFIXES = "time|prompts|rollout|reward|filter|replay|learner|weights|eval|controller|environment|verdict"
METRIC = re.compile(rf"(?:{PREFIXES})/(?:time/)?[a-z0-9_]*[a-z0-9](?:@K)?")

UNITS: dict[str, str] = {}
"""Units by name. A name of the table of alarms keeps the unit of the first table."""
for _name, _unit in re.findall(rf"^\| `({METRIC.pattern})` \| ([^|]*)\|", PAGE, re.MULTILINE):
    UNITS.setdefault(_name, _unit.strip())

EVERY = {name.replace("@K", "@8"): unit for name, unit in UNITS.items()} | {
    f"learner/staleness_{bucket}/{name}": UNITS[f"learner/{name}"]
    for bucket in ("0", "1", "2", "3_4", "5_8", "9_up")
    for name in "tokens entropy ratio_mean ratio_p50 ess k3 clip_low_ratio clip_high_ratio kl".split()
}
"""Units by the name that a line has."""
