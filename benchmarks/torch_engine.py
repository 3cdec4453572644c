"""Tokens per second of the torch engine, its bare runner and Hugging Face `generate`, alternating, on one CPU thread.

    python benchmarks/torch_engine.py [--rounds 3] [--groups 96] [--slots 64] [--evaluations 0] [--no-hf]

The model has the quickstart's shape with random weights; stop ids are chosen so that responses have about 35 tokens on
average, at most 128. Groups of 16 are requested as slots become free, as a rollout worker does. Engine and runner are
measured while groups keep coming: from the end of the first `slots` samples until the last group is handed over. The
bare runner gets the same groups in a plain loop: the difference is what the engine's thread and event loop cost. Of
every `--evaluations` groups, one is greedy. Shows wall time and CPU time of the process; other work on the machine
affects the first more. What it hardly affects: the slots in use, of engine and runner, and the event loop's share.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from asyncdapo.eval_messages import Sampling
from asyncdapo.rollout.config import RolloutConfig
from asyncdapo.rollout.engine import Limits, Request
from asyncdapo.rollout.episodes import AHEAD
from asyncdapo.rollout.torch_engine.checkpoint import read_checkpoint
from asyncdapo.rollout.torch_engine.compiled.compiled_model import fastest_model
from asyncdapo.rollout.torch_engine.runner import Runner
from asyncdapo.rollout.torch_engine.scheduler import Job
from asyncdapo.rollout.torch_engine.torch_engine import TorchEngine

GROUP_SIZE, MAX_PROMPT_LENGTH, MAX_TOKENS, STOP_TOKEN_IDS, PAD = 16, 40, 128, [1, 2, 3], 0


def random_model(max_position_embeddings: int = 256) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=384,
            vocab_size=103,
            tie_word_embeddings=True,
            max_position_embeddings=max_position_embeddings,
            eos_token_id=STOP_TOKEN_IDS,
            pad_token_id=PAD,
        )
    )


def random_prompts(count: int, seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(4, 103) for _ in range(draw.randint(8, 20))] for _ in range(count)]


def group_request(
    prompt_ids: list[int], seed: int, group: int, greedy_every: int, on_sample_done: Callable[[], None] | None = None
) -> Request:
    greedy = greedy_every and group % greedy_every == 0
    return Request(
        prompt_ids=prompt_ids,
        seeds=[seed << 32 | group << 8 | sample for sample in range(GROUP_SIZE)],
        sampling=Sampling(max_tokens=MAX_TOKENS, temperature=0.0 if greedy else 1.0),
        on_sample_done=on_sample_done,
    )


@dataclass
class Reading:
    """What has been done at some moment, or between two."""

    tokens: float
    steps: float
    slot_steps: float
    wall_s: float
    cpu_s: float
    thread_s: float
    """CPU time of the thread that reads: in the engine's rounds that of the event loop."""

    @classmethod
    def now(cls, counters: Mapping[str, float]) -> Reading:
        clocks = time.perf_counter(), time.process_time(), time.thread_time()
        return cls(counters["tokens"], counters["steps"], counters["slot_steps"], *clocks)

    def __sub__(self, before: Reading) -> Reading:
        return Reading(*(now - then for now, then in zip(astuple(self), astuple(before), strict=True)))


async def engine_round(engine: TorchEngine, num_groups: int, seed: int, greedy_every: int = 0) -> Reading:
    """`num_groups` groups, handed over as a rollout worker asks for them."""
    waiting, tasks, room, num_done = random_prompts(num_groups, seed), [], asyncio.Event(), 0
    began = Reading.now(engine.gauges())

    def note_done() -> None:
        nonlocal began, num_done
        num_done += 1
        if num_done == engine.num_slots:
            began = Reading.now(engine.gauges())
        room.set()

    while waiting:
        room.clear()
        while waiting and engine.num_outstanding < engine.num_slots + engine.num_slots // AHEAD:
            request = group_request(waiting.pop(), seed, len(waiting), greedy_every, note_done)
            tasks.append(asyncio.create_task(engine.generate(request)))
            await asyncio.sleep(0)  # the task begins, and its samples are outstanding
        await room.wait()
    measured = Reading.now(engine.gauges()) - began
    await asyncio.gather(*tasks)
    return measured


def bare_runner(directory: str, config: RolloutConfig) -> Runner:
    checkpoint, cpu = read_checkpoint(directory), torch.device("cpu")
    limits = Limits(
        max_prompt_length=MAX_PROMPT_LENGTH,
        max_response_length=MAX_TOKENS,
        max_context=MAX_PROMPT_LENGTH + MAX_TOKENS,
        vocab_size=checkpoint.shape.vocab_size,
    )
    model = fastest_model(checkpoint, config.slots, limits.max_context, torch.float32, cpu, config.threads)
    weights = model.new_weights()
    weights.fill(checkpoint.tensors())
    return Runner(model, config, limits, checkpoint.stop_token_ids, weights)


def runner_round(runner: Runner, num_groups: int, slots: int, seed: int, greedy_every: int) -> Reading:
    """The same groups as in `engine_round`, without a thread or an event loop."""
    waiting, num_outstanding, num_done = random_prompts(num_groups, seed), 0, 0
    began = ended = Reading.now(vars(runner.counters))
    with torch.inference_mode():
        while waiting or num_outstanding:
            while waiting and num_outstanding < slots + slots // AHEAD:
                runner.add(Job(group_request(waiting.pop(), seed, len(waiting), greedy_every)))
                num_outstanding += GROUP_SIZE
                ended = Reading.now(vars(runner.counters))
            num_ended = len(runner.step().ended)
            if num_done < slots <= num_done + num_ended:
                began = Reading.now(vars(runner.counters))
            num_done, num_outstanding = num_done + num_ended, num_outstanding - num_ended
    return ended - began


def hugging_face_round(model: LlamaForCausalLM, num_groups: int, slots: int, seed: int) -> int:
    """The same number of samples in batches as wide as the engine's slots."""
    num_tokens = 0
    prompts = [prompt for prompt in random_prompts(num_groups, seed) for _ in range(GROUP_SIZE)]
    for start in range(0, len(prompts), slots):
        batch = prompts[start : start + slots]
        longest = max(map(len, batch))
        ids = torch.tensor([[PAD] * (longest - len(prompt)) + prompt for prompt in batch])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in batch])
        out = model.generate(ids, attention_mask=mask, do_sample=True, max_new_tokens=MAX_TOKENS, top_k=0)
        stopped = torch.isin(out[:, longest:], torch.tensor(STOP_TOKEN_IDS)).cumsum(1) > 0
        num_tokens += int((~stopped).sum()) + int(stopped.any(1).sum())
    return num_tokens


def report(name: str, rounds: list[tuple[float, float, float]]) -> None:
    wall = statistics.median(tokens / wall_s for tokens, wall_s, _ in rounds)
    cpu = statistics.median(tokens / cpu_s for tokens, _, cpu_s in rounds)
    print(f"{name:24s} {wall:8.0f} tok/s wall {cpu:8.0f} tok/s CPU   (median of {len(rounds)})")


async def main(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    model = random_model()
    config = RolloutConfig(slots=options.slots, group_size=GROUP_SIZE, max_response_length=MAX_TOKENS, device="cpu")
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        engine = TorchEngine(directory, config, max_prompt_length=MAX_PROMPT_LENGTH)
        await engine.start()
        runner = bare_runner(directory, config)
    await engine_round(engine, 8, seed=0)
    rounds: dict[str, list[tuple[float, float, float]]] = {"torch engine": [], "bare runner": []}
    for seed in range(1, options.rounds + 1):
        of_engine = await engine_round(engine, options.groups, seed, options.evaluations)
        of_runner = runner_round(runner, options.groups, options.slots, seed, options.evaluations)
        fills = (each.slot_steps / each.steps / options.slots for each in (of_engine, of_runner))
        used, of_loop = ", ".join(f"{fill:.3f}" for fill in fills), of_engine.thread_s / of_engine.cpu_s
        print(f"round {seed}: {of_engine.tokens} tokens, slots in use {used}, event loop {of_loop:.1%} of its CPU")
        for name, one in (("torch engine", of_engine), ("bare runner", of_runner)):
            rounds[name].append((one.tokens, one.wall_s, one.cpu_s))
        if options.hf:
            wall, cpu = time.perf_counter(), time.process_time()
            num_tokens = hugging_face_round(model, max(4, options.groups // 4), options.slots, seed)
            one = num_tokens, time.perf_counter() - wall, time.process_time() - cpu
            rounds.setdefault("Hugging Face generate", []).append(one)
    await engine.stop()
    for name in rounds:
        report(name, rounds[name])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--groups", type=int, default=96, help="groups of 16 in a round")
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--hf", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--evaluations", type=int, default=0, help="one of so many groups is greedy; 0: none")
    asyncio.run(main(parser.parse_args()))
