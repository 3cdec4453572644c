"""The rows of a taskset of verifiers, for `prompts.path`: at most 10,000.

python examples/taskset_rows.py TASKSET [KEY=VALUE ...] > tasks.jsonl
"""

import itertools
import json
import sys

import verifiers.v1 as vf
from verifiers.v1.utils.loaders import taskset_config_type

name, *keys = sys.argv[1:]
config = taskset_config_type(name).model_validate({"id": name} | dict(key.split("=", 1) for key in keys))
for number, task in enumerate(itertools.islice(vf.load_taskset(config), 10_000)):
    data = task.data.model_dump_json(exclude_defaults=True)
    print(json.dumps({"prompt": task.data.prompt_text or f"task {number}", "answer": data}))
