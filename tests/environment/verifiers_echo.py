"""A taskset of verifiers with two turns, and an environment that says back what it hears."""

import verifiers.v1 as vf


class Data(vf.TaskData):
    wanted: int


class EchoTask(vf.Task[Data, vf.State, vf.TaskConfig]):
    @vf.reward
    async def even(self, trace: vf.Trace) -> float:
        return float(len(trace.last_reply or "") % 2)

    @vf.metric
    async def wanted(self, trace: vf.Trace) -> float:
        return float(self.data.wanted)


class EchoConfig(vf.TasksetConfig):
    num: int = 8
    same: bool = False


class EchoEnvConfig(vf.EnvConfig):
    agent: vf.AgentConfig = vf.AgentConfig()


class EchoEnv(vf.Env[EchoEnvConfig]):
    async def run(self, task, agents):
        async with agents.agent.interaction(task) as talk:
            said = await talk.turn()
            if not said.terminated:
                await talk.turn(f"you said {len(said.last_reply or '')} letters")


class EchoTaskset(vf.Taskset[EchoTask, EchoConfig]):
    def load(self):
        for number in range(self.config.num):
            prompt = "Say it." if self.config.same else f"Say {number}."
            yield EchoTask(Data(prompt=prompt, wanted=number), self.config.task)


__all__ = ["EchoTaskset", "EchoEnv"]
