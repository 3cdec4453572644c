"""TRL's own trainer with an environment, three steps: `trl_own_loop.py JSON`, run by an interpreter that has TRL.

In: `model`, a folder; `path` and `name` of the environment's class; `row`; `responses`, which the model says in their
order in place of its own. Out: the last line is JSON: the number of steps; of each episode the token ids, which of them
the model sampled, and the reward. All but the sampling is the package's.
"""

import importlib.util
import json
import sys
import tempfile

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

NUM_STEPS = 3


class ScriptedTrainer(GRPOTrainer):
    def __init__(self, responses, **given):
        super().__init__(**given)
        self.responses, self.episodes, self.rewards = responses, [], []

    def _generate_single_turn(self, prompt_ids, *more, **named):
        tokenizer = self.processing_class
        turns = [tokenizer.decode(ids).count("<|im_start|>assistant") - 1 for ids in prompt_ids]
        said = [self.responses[turn] + tokenizer.eos_token for turn in turns]
        return [tokenizer.encode(text, add_special_tokens=False) for text in said], None

    def _generate(self, prompts):
        made = prompt_ids, completion_ids, tool_mask, *_ = super()._generate(prompts)
        for read, written, sampled in zip(prompt_ids, completion_ids, tool_mask, strict=True):
            self.episodes.append({"token_ids": read + written, "sampled": [0] * len(read) + sampled})
        return made

    def _calculate_rewards(self, *given, **named):
        rewards = super()._calculate_rewards(*given, **named)
        self.rewards += rewards.sum(dim=1).tolist()
        return rewards


def main(model, path, name, row, responses):
    spec = importlib.util.spec_from_file_location("environment", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    asked = row | {"prompt": [{"role": "user", "content": row["prompt"]}]}
    with tempfile.TemporaryDirectory() as folder:
        trainer = ScriptedTrainer(
            responses,
            model=model,
            args=GRPOConfig(
                output_dir=folder,
                max_steps=NUM_STEPS,
                per_device_train_batch_size=2,
                num_generations=2,
                max_completion_length=400,
                use_cpu=True,
                bf16=False,
                report_to=[],
                save_strategy="no",
            ),
            train_dataset=Dataset.from_list([asked] * 2 * NUM_STEPS),
            environment_factory=getattr(module, name),
        )
        trainer.train()
    episodes = [one | {"reward": reward} for one, reward in zip(trainer.episodes, trainer.rewards, strict=True)]
    print(json.dumps({"steps": trainer.state.global_step, "episodes": episodes}))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
