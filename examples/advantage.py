"""An advantage: hard prompts count more. `loss.advantage=examples/advantage.py:hard_prompts`"""

from torch import Tensor


def hard_prompts(rewards_G: Tensor) -> Tensor:
    """The centred reward, times the share of completions that fell short of the best: near 1 for a hard prompt."""
    share_wrong = (rewards_G < rewards_G.max()).to(rewards_G.dtype).mean()
    return (rewards_G - rewards_G.mean()) * share_wrong
