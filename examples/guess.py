"""An environment as SkyRL has them: `environment.path=examples/guess.py:Guess`"""


class Guess:
    def __init__(self, env_config, extras):
        self.wanted = extras["reward_spec"]["ground_truth"]
        self.num_guesses = 0

    def init(self, prompt):
        rules = {"role": "system", "content": "Answer with a number alone. You may guess three times."}
        return [rules, *prompt], {}

    def step(self, action):
        self.num_guesses += 1
        is_right = action.strip() == self.wanted
        done = is_right or self.num_guesses == 3
        observations = [] if done else [{"role": "user", "content": f"{action} is wrong."}]
        return {"observations": observations, "reward": float(is_right), "done": done, "metadata": {}}

    def get_metrics(self):
        return {"guesses": self.num_guesses}

    def close(self):
        pass
