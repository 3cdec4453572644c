"""The calculator as a server of OpenEnv: `python examples/openenv_server.py 8000`

Then `environment.path=openenv:http://127.0.0.1:8000`. Needs openenv-core 0.3.
"""

import re
import sys

import uvicorn
from openenv.core.env_server import create_app
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.types import Action, Observation, State


class Said(Action):
    response: str


class Heard(Observation):
    text: str = ""


class Calculator(Environment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed=None, episode_id=None, answer="", **row):
        self.answer, self.num_steps = answer, 0
        return Heard()

    def step(self, action, timeout_s=None, **more):
        self.num_steps += 1
        asked = re.fullmatch(r"([0-9]{1,9})\*([0-9]{1,9})", action.response)
        if asked is None:
            return Heard(reward=float(action.response == f"Answer: {self.answer}"), done=True)
        return Heard(text=f"{int(asked[1]) * int(asked[2])}\n", reward=0.0, done=False)

    @property
    def state(self):
        return State(step_count=self.num_steps)


if __name__ == "__main__":
    app = create_app(Calculator, Said, Heard, env_name="calculator", max_concurrent_envs=1024)
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="error", lifespan="off")
