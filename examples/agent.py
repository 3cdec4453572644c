"""A program that calls the model by itself, and a calculator: `environment.path=agent:examples/agent.py:run`

`base_url` and `api_key` are what OpenAI's SDK takes, too: `OpenAI(base_url=base_url, api_key=api_key)`.
"""

import json
import re
from urllib.request import Request, urlopen


def chat(base_url, api_key, messages):
    """What the model says next."""
    body = json.dumps({"model": "policy", "messages": messages}).encode()
    request = Request(f"{base_url}/chat/completions", body, {"authorization": f"Bearer {api_key}"})
    with urlopen(request) as answer:
        return json.load(answer)["choices"][0]["message"]["content"]


def run(row, base_url, api_key):
    """An episode: its reward, and numbers about it."""
    messages, calls = [{"role": "user", "content": row["prompt"]}], 0
    while True:
        said = chat(base_url, api_key, messages)
        asked = re.fullmatch(r"([0-9]{1,9})\*([0-9]{1,9})", said)
        if asked is None:
            return float(said == f"Answer: {row['answer']}"), {"calls": calls}
        calls += 1
        product = f"{int(asked[1]) * int(asked[2])}\n"
        messages += [{"role": "assistant", "content": said}, {"role": "user", "content": product}]
