"""A harness of verifiers that runs the conversation in this process: each turn is one call of the model. No tools.

verifiers' own harnesses start a process for each turn, which costs seconds. Loaded by verifiers, as a plugin. A call of
the model takes as long as it takes: OpenAI's client would give up after 5 s without a connection, which a busy host may
need, or 600 s without an answer, which a busy engine may need. The worker bounds an episode.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

from typing import Any

import verifiers.v1 as vf
from openai import AsyncOpenAI
from verifiers.v1.dialects.chat import message_to_wire
from verifiers.v1.runtimes import ProgramResult

__all__ = ["InProcess"]


class InProcessConfig(vf.HarnessConfig):
    """It has no keys of its own."""


class InProcess(vf.Harness[InProcessConfig]):
    """Says the prompt to the model."""

    APPENDS_SYSTEM_PROMPT = True
    SUPPORTS_RESUME = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(
        self, ctx: Any, trace: Any, runtime: Any, endpoint: str, secret: str, mcp_urls: Any, data: Any
    ) -> ProgramResult:
        system, prompt = self.resolve_prompt(data)
        messages: list[Any] = [{"role": "system", "content": system}] if system else []
        if isinstance(prompt, str):
            messages.append({"role": "user", "content": prompt})
        else:
            messages += [message_to_wire(message) for message in prompt or []]
        async with AsyncOpenAI(base_url=endpoint, api_key=secret, max_retries=0, timeout=None) as client:
            await client.chat.completions.create(model=ctx.model, messages=messages)
        return ProgramResult(exit_code=0, stdout="", stderr="")
