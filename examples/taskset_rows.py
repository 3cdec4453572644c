"""The rows of a taskset of verifiers, for `prompts.path`: at most 10,000.

python examples/taskset_rows.py TASKSET [KEY=VALUE ...] > tasks.jsonl

The answer is the task. Tasks with the same words, as games have them, are numbered: a text is held out or trained on.
"""

import itertools
import json
import sys

import verifiers.v1 as vf
from verifiers.v1.utils.loaders import taskset_config_type

name, *keys = sys.argv[1:]
config = taskset_config_type(name).model_validate({"id": name} | dict(key.split("=", 1) for key in keys))
texts = set()
for number, task in enumerate(itertools.islice(vf.load_taskset(config), 10_000)):
    data = task.data.model_dump_json(exclude_defaults=True)
    text = task.data.prompt_text or ""
    if not text or text in texts:
        text = f"{text} (task {number})".strip()
    texts.add(text)
    print(json.dumps({"prompt": text, "answer": data}))
