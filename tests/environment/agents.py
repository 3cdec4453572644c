"""Programs that call the model by themselves, and do what the row's question tells them. Standard library only."""

import asyncio
import json
import os
import threading
import time
import urllib.request
from pathlib import Path
from urllib.error import HTTPError

START = [1, 2, 3]


def call(base_url, api_key, token_ids, **sampling):
    """The sampled token ids."""
    body = json.dumps({"token_ids": token_ids, "sampling_params": sampling}).encode()
    url = base_url.removesuffix("/v1") + "/inference/v1/generate"
    request = urllib.request.Request(url, body, {"authorization": f"Bearer {api_key}"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["choices"][0]["token_ids"]


def run(row, base_url, api_key):
    """Two turns, and an order in between."""
    order, _, rest = row["prompt"].partition(" ")
    if order == "silent":
        return 1.0
    if order == "sleep":
        time.sleep(600)
    first = call(base_url, api_key, START)
    context = [*START, *first, 50]
    match order:
        case "twice":
            call(base_url, api_key, context)
        case "parallel":
            threads = [threading.Thread(target=call, args=(base_url, api_key, [*context, n])) for n in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        case "forget":
            call(base_url, api_key, [*START, 50])
        case "endless":
            while True:
                context = [*context, *call(base_url, api_key, context), 50]
        case "until_refused":
            try:
                while True:
                    context = [*context, *call(base_url, api_key, context), 50]
            except HTTPError as error:
                return 0.5, {"status": error.code}
        case "stop":
            call(base_url, api_key, context, stop="x")
        case "hang":
            time.sleep(600)
        case "raise":
            raise ValueError(rest)
        case "raise_once":
            if not Path(rest).exists():
                Path(rest).touch()
                raise ConnectionError("busy")
        case "exit":
            os._exit(3)
        case "leave_calling":
            threading.Thread(target=call, args=(base_url, api_key, context), daemon=True).start()
            time.sleep(0.2)
        case "return":
            return eval(rest)
    return 1.0, {"calls": 2}


async def run_async(row, base_url, api_key):
    return await asyncio.to_thread(run, row, base_url, api_key)
