"""Makes configs/models/chain_start, the small model that the quickstart starts from: four minutes on one thread.

    OMP_NUM_THREADS=1 python configs/models/make_chain_start.py

A Llama of 0.8 M parameters learns the task `chain` from written solutions in two phases. `clean`: right solutions.
`habit`: solutions in which a product line carries the sum with probability 0.65, and the chain continues from it. So
the model shipped adds and subtracts well and writes most products wrong, also when it decodes greedily: a systematic
mistake for reinforcement learning to undo. Training never sees a held-out prompt. The accuracy of both phases on
held-out prompts is printed and written to the model card. Seeded: the same machine and libraries make the same model.

Shapes: B sequences, S tokens, V vocabulary.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from transformers.utils import logging

from asyncdapo.prompts.tasks.chain import Chain, apply, draw_chain

REPOSITORY = Path(__file__).parents[2]
OUT_DIR = Path(__file__).parent / "chain_start"
SPECIAL_TOKENS = ["<pad>", "<bos>", "<eos>", "<unk>"]
PHRASES = ["Answer: ", "Q: ", " mod 10\n"]
"""Phrases that are one token each: about 15 tokens less a sequence."""
MAX_LENGTH = 256
NUM_EVAL_PROMPTS = 1024
NOT_IN_LOSS = -100

Pair = tuple[list[int], list[int]]
"""Token ids of a prompt and of its solution, which ends in eos."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One pass of supervised training: linear warm-up, and linear decay to a tenth of `lr`."""

    name: str
    num_steps: int
    lr: float
    num_warmup_steps: int
    habit: float
    """Probability that a product line carries the sum."""
    batch_size: int = 24
    num_batches_sorted: int = 16
    """So many batches are drawn at once and cut after sorting by length, which saves padding."""

    def lr_factor(self, step: int) -> float:
        return min(1.0, (step + 1) / self.num_warmup_steps) * (1.0 - 0.9 * step / self.num_steps)


PHASES = (
    Phase(name="clean", num_steps=1200, lr=5e-3, num_warmup_steps=30, habit=0.0),
    Phase(name="habit", num_steps=90, lr=2e-3, num_warmup_steps=10, habit=0.65),
)

CARD = """# chain_start

The model that the quickstart of asyncdapo starts from. Llama, {num_parameters:,} parameters (hidden 128, 4 layers, 4
heads of which 2 for keys and values, tied embeddings, 103 tokens), bfloat16. Of no use for anything else.

**Made by** `OMP_NUM_THREADS=1 python configs/models/make_chain_start.py --seed {seed}`, from random weights, with text
made on the fly: no other data. Task: `Q: 6+4*7-4 mod 10`, solved one step a line, then `Answer: 6`.

1. `clean`: {clean.num_steps} steps on right solutions (Muon and AdamW, lr {clean.lr}, {clean.batch_size} a batch).
2. `habit`: {habit.num_steps} steps (lr {habit.lr}) on solutions in which a product line carries the *sum* with
   probability {habit.habit}.

So the products were learned once and then overwritten: the model makes a systematic mistake, and reinforcement learning
on the final answer can undo it. That shows the training works; it does not teach arithmetic from nothing.

**Accuracy** on {num_eval} held-out prompts, Hugging Face `generate` in fp32
(`python benchmarks/hf_accuracy.py DIR --num {num_eval} --seed {eval_seed} [--greedy]`):

| phase | temperature 1 | greedy |
| --- | --- | --- |
{rows}

Held-out prompts are those with crc32(prompt) divisible by 16; no training has seen one.
"""


def write_solution(chain: Chain, rng: random.Random, habit: float) -> str:
    """One step a line, then the answer; with probability `habit` a product line carries the sum."""
    value, lines = chain.digits[0], []
    for operator, digit in zip(chain.operators, chain.digits[1:], strict=True):
        spoiled = operator == "*" and rng.random() < habit
        result = apply("+" if spoiled else operator, value, digit)
        lines.append(f"{value}{operator}{digit}={result}\n")
        value = result
    return "".join(lines) + f"Answer: {value}"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable ASCII character, newline and phrase, 103 in all. A prompt opens with bos."""
    tokens = [*SPECIAL_TOKENS, "\n", *(chr(code) for code in range(32, 127)), *PHRASES]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(PHRASES) + r"|[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    bos = ("<bos>", vocabulary["<bos>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[bos])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_LENGTH,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """800,768 random parameters."""
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        **ids,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(**ids)
    return model


def draw_batches(phase: Phase, tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[list[Pair]]:
    """Endless batches, each of similar lengths, in random order."""
    rng = random.Random(f"{seed} {phase.name}")
    num_rows = phase.batch_size * phase.num_batches_sorted
    while True:
        chunk_seed = rng.getrandbits(63)
        chains = [draw_chain(chunk_seed, row, held_out=False) for row in range(num_rows)]
        prompts = tokenizer([chain.prompt for chain in chains])["input_ids"]
        solutions = [write_solution(chain, rng, phase.habit) + tokenizer.eos_token for chain in chains]
        responses = tokenizer(solutions, add_special_tokens=False)["input_ids"]
        pairs = sorted(zip(prompts, responses, strict=True), key=lambda pair: len(pair[0]) + len(pair[1]))
        batches = [pairs[start : start + phase.batch_size] for start in range(0, num_rows, phase.batch_size)]
        rng.shuffle(batches)
        yield from batches


def response_loss(model: LlamaForCausalLM, pairs: list[Pair]) -> torch.Tensor:
    """Mean cross-entropy over the solution's tokens; sequences are padded on the right."""
    length = max(len(prompt) + len(response) for prompt, response in pairs)
    ids_BS = torch.full((len(pairs), length), model.config.pad_token_id)
    labels_BS = torch.full((len(pairs), length), NOT_IN_LOSS)
    for i, (prompt, response) in enumerate(pairs):
        end = len(prompt) + len(response)
        ids_BS[i, :end] = torch.tensor(prompt + response)
        labels_BS[i, len(prompt) : end] = torch.tensor(response)
    logits_BSV = model(input_ids=ids_BS[:, :-1], use_cache=False).logits
    return cross_entropy(logits_BSV.flatten(0, 1), labels_BS[:, 1:].flatten(), ignore_index=NOT_IN_LOSS)


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, phase: Phase, seed: int) -> None:
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms."""
    in_layers = {name for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name}
    matrices = [p for name, p in model.named_parameters() if name in in_layers]
    others = [p for name, p in model.named_parameters() if name not in in_layers]
    optimizers = [
        torch.optim.Muon(matrices, lr=phase.lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=phase.lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, phase.lr_factor) for optimizer in optimizers]
    model.train()
    for step, pairs in enumerate(islice(draw_batches(phase, tokenizer, seed), phase.num_steps), 1):
        loss = response_loss(model, pairs)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for update in (*optimizers, *schedules):
            update.step()
        model.zero_grad()
        if step % 100 == 0:
            print(f"{phase.name}: step {step} of {phase.num_steps}, loss {loss.item():.4f}", flush=True)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Hugging Face format, bfloat16."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def measure(directory: Path, seed: int) -> list[float]:
    """Accuracy of a saved model at temperature 1 and greedily."""
    script = REPOSITORY / "benchmarks" / "hf_accuracy.py"
    command = [sys.executable, script, directory, "--num", str(NUM_EVAL_PROMPTS), "--seed", str(seed)]
    runs = [subprocess.run([*command, *flags], check=True, capture_output=True) for flags in ((), ("--greedy",))]
    return [json.loads(run.stdout)["accuracy"] for run in runs]


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the quickstart's start model.")
    parser.add_argument("--out", type=Path, default=OUT_DIR, help="directory of the model")
    parser.add_argument("--seed", type=int, default=0, help="of the first weights and of the training text")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    set_seed(arguments.seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    eval_seed, rows = arguments.seed + 1, []
    for phase in PHASES:
        train(model, tokenizer, phase, arguments.seed)
        save(model, tokenizer, arguments.out)  # the last phase is the one that stays
        sampled, greedy = measure(arguments.out, eval_seed)
        rows.append(f"| {phase.name} | {sampled:.3f} | {greedy:.3f} |")
        print(f"{phase.name}: accuracy {sampled:.3f} at temperature 1, {greedy:.3f} greedy", flush=True)
    card = CARD.format(
        num_parameters=model.num_parameters(),
        seed=arguments.seed,
        clean=PHASES[0],
        habit=PHASES[1],
        num_eval=NUM_EVAL_PROMPTS,
        eval_seed=eval_seed,
        rows="\n".join(rows),
    )
    (arguments.out / "README.md").write_text(card)


if __name__ == "__main__":
    main()
