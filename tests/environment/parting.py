"""A program for the quickstart's start model whose histories part: it asks on twice at the same time, and then once
more without what the model has said. Standard library only."""

import json
from concurrent.futures import ThreadPoolExecutor
from urllib.request import Request, urlopen


def run(row, base_url, api_key):
    def chat(*messages):
        body = json.dumps({"messages": messages, "max_tokens": 40, "temperature": 0.5}).encode()
        request = Request(f"{base_url}/chat/completions", body, {"authorization": f"Bearer {api_key}"})
        with urlopen(request) as answer:
            return json.load(answer)["choices"][0]["message"]["content"]

    question = {"role": "user", "content": row["prompt"]}
    said = {"role": "assistant", "content": chat(question)}
    with ThreadPoolExecutor(2) as both:
        asked = [
            both.submit(chat, question, said, {"role": "user", "content": text}) for text in ("Q: 7*6\n", "Q: 3*4\n")
        ]
        heard = [one.result() for one in asked]
    heard.append(chat({"role": "user", "content": "Q: 2*2\n"}))
    return float(sum(map(ord, "".join(heard))) % 2), {"calls": 4}
