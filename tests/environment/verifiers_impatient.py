"""The echo, in a process where OpenAI's client gives up a call after 0.3 s unless it is told otherwise."""

import httpx
import openai._base_client
from verifiers_echo import EchoEnv, EchoTaskset

openai._base_client.DEFAULT_TIMEOUT = httpx.Timeout(0.3)

__all__ = ["EchoTaskset", "EchoEnv"]
