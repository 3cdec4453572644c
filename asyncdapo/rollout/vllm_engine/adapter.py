"""Adapter: the only place that calls vLLM's AsyncLLM. Works with vLLM 0.25 to 0.32.

In: engine arguments, token ids, sampling parameters, versions. Out: a running AsyncLLM; token ids with log-probs, never
text. Features that a release lacks are detected on its classes. A dead process raises EngineError here.
"""

# vLLM is an extra, and may not be installed where types are checked.
# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Iterable
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from vllm import SamplingParams
from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.output_processor import RequestState

from asyncdapo.errors import EngineError, RunError, UserError, WeightsError
from asyncdapo.eval_messages import Sampling
from asyncdapo.rollout.vllm_engine.stats import SchedulerStats

if TYPE_CHECKING:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.outputs import RequestOutput

NATIVE_VERSIONS = hasattr(AsyncLLM, "update_weight_version") and hasattr(RequestState, "_weight_version_spans")
"""Whether vLLM labels every token with the version that sampled it (from 0.27 on)."""
FLAT_LOGPROBS: dict[str, Any] = {"flat_logprobs": True} if hasattr(SamplingParams, "flat_logprobs") else {}
"""One list for a sequence instead of a dict and an object for each of its tokens."""


def launch(arguments: AsyncEngineArgs) -> AsyncLLM:
    """Start the engine's processes and block until they can generate. Raises UserError for arguments that vLLM
    refuses, EngineError when its processes fail; the cause is in their output."""
    try:
        config = arguments.create_engine_config()
    except ValueError as error:
        raise UserError(f"vLLM refuses this model or rollout.engine_args: {_in_a_line(error)}") from error
    try:
        return AsyncLLM.from_vllm_config(config, stat_loggers=[SchedulerStats], disable_log_stats=True)
    except RuntimeError as error:
        raise EngineError(f"vLLM could not start; its output in the log of this process says why: {error}") from error


class Adapter:
    """A running AsyncLLM."""

    def __init__(self, llm: AsyncLLM, stop_token_ids: list[int]) -> None:
        self._llm, self._stop_token_ids = llm, stop_token_ids
        self.vocab_size: int = llm.model_config.get_vocab_size()
        loggers = llm.logger_manager.stat_loggers if llm.logger_manager else []
        self._stats = next((logger for logger in loggers if isinstance(logger, SchedulerStats)), None)

    def gauges(self) -> dict[str, float]:
        """Of the scheduler, where this release records them."""
        return self._stats.gauges() if self._stats else {}

    async def begin(self, version: int) -> None:
        """Label tokens with `version` from now on. Also makes vLLM's slow first call, so that no request waits for
        it."""
        await self._vital("starting", self._llm.get_supported_tasks())
        await self._vital("starting", self._label(version))

    def params(self, sampling: Sampling, seed: int | None = None) -> SamplingParams:
        """vLLM's own end-of-sequence handling is off: the stop tokens are exactly `stop_token_ids`."""
        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_tokens,
            seed=seed,
            stop_token_ids=self._stop_token_ids,
            ignore_eos=True,
            detokenize=False,
            logprobs=0,
            output_kind=RequestOutputKind.DELTA,
            **FLAT_LOGPROBS,
        )

    async def generate(
        self, prompt_ids: list[int], params: SamplingParams, request_id: str, *, salt: int, priority: int
    ) -> AsyncIterator[RequestOutput]:
        """The new tokens of one sequence, output by output, until one has a finish reason. Each has the versions of all
        tokens so far, or more, if vLLM knows them. Only prompts of the same `salt` share a prefix cache. Raises
        EngineError."""
        prompt: Any = {"type": "token", "prompt_token_ids": prompt_ids, "cache_salt": str(salt)}
        try:
            async for output in self._llm.generate(prompt, params, request_id, priority=priority):
                if NATIVE_VERSIONS and not output.finished:
                    output.outputs[0].weight_versions = self._spans(request_id)
                yield output
        except EngineDeadError as error:
            raise EngineError("the vLLM engine died") from error

    def _spans(self, request_id: str) -> Any:
        """Version spans of a sequence that runs; None if it has just ended, and its last output has them. vLLM passes
        them on with the last one only, but has them from the first token on."""
        processor = self._llm.output_processor
        running = [processor.request_states[own_id] for own_id in processor.external_req_ids.get(request_id, ())]
        return running[0]._weight_version_spans() if running else None

    async def abort(self, request_ids: Iterable[str]) -> None:
        """End these requests: their outputs finish with the reason `abort`. Unknown ids are ignored."""
        await self._vital("aborting", self._llm.abort(list(request_ids)))

    async def pause(self, *, recompute: bool) -> None:
        """Stop sampling. On return all sampled tokens have been delivered. `recompute`: every running request computes
        its keys and values again when it resumes."""
        await self._vital("pausing", self._llm.pause_generation(mode="keep", clear_cache=recompute))

    async def resume(self) -> None:
        await self._vital("resuming", self._llm.resume_generation())

    async def load(self, version: int) -> None:
        """Load the weights that the workers received as `version`; call it while paused. Raises WeightsError; after
        that only another complete load makes the engine usable."""
        request = WeightTransferUpdateRequest(update_info={"version": version})
        try:
            await self._llm.start_weight_update()
            await self._llm.update_weights(request)
            await self._llm.finish_weight_update()
            await self._label(version)
        except EngineDeadError as error:
            raise EngineError("the vLLM engine died while it loaded weights") from error
        except Exception as error:
            raise WeightsError(f"version {version} can't be loaded: {error}") from error

    async def rpc(self, method: str, *args: Any) -> list[Any]:
        """The results of `method` of the workers, in rank order. Raises RunError if it raised."""
        try:
            return await self._llm.collective_rpc(method, args=args)
        except EngineDeadError as error:
            raise EngineError("the vLLM engine died") from error
        except Exception as error:  # vLLM passes on every failure of its processes as a plain Exception
            raise RunError(f"{method} failed in the vLLM engine: {error}") from error

    def shut_down(self) -> None:
        """Block until the processes have been told to end, and most of them have ended."""
        self._llm.shutdown()

    async def _label(self, version: int) -> None:
        if NATIVE_VERSIONS:
            await self._llm.update_weight_version(str(version))

    async def _vital(self, what: str, call: Awaitable[Any]) -> None:
        """Await a call that the engine can't work without. Raises EngineError if it fails in any way."""
        try:
            await call
        except EngineDeadError as error:
            raise EngineError("the vLLM engine died") from error
        except Exception as error:
            raise EngineError(f"{what} failed in the vLLM engine: {error}") from error


def _in_a_line(error: ValueError) -> str:
    """vLLM's message; of a long pydantic error only the fields and what is wrong with them."""
    if isinstance(error, ValidationError):
        found = [(".".join(map(str, problem["loc"])), problem["msg"]) for problem in error.errors()]
        return "; ".join(f"{where}: {what}" if where else what for where, what in found)
    return " ".join(str(error).split())
