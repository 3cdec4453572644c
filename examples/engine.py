"""An engine that answers late: a slow worker, at home. `rollout.engine=examples/engine.py:LateEngine`"""

import asyncio

from asyncdapo.rollout.engine import Request, Sample
from asyncdapo.rollout.torch_engine.torch_engine import TorchEngine

DELAY_S = 0.05


class LateEngine(TorchEngine):
    """The torch engine, whose groups each arrive later; `late_groups` counts them."""

    late_groups = 0

    async def generate(self, request: Request) -> list[Sample]:
        samples = await super().generate(request)
        await asyncio.sleep(DELAY_S)
        self.late_groups += 1
        return samples

    def gauges(self) -> dict[str, float]:
        return super().gauges() | {"late_groups": self.late_groups}
