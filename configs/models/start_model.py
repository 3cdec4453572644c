"""How a quickstart's start model is made: a Llama of 0.8 M parameters, from random weights, on text made on the fly.

In: a `Recipe`, which is what `make_chain_start.py` and `make_tool_start.py` differ in. Out: a directory in Hugging Face
format with a model card. A recipe's first phase teaches the task. The last one teaches a habit that spoils it: a
systematic mistake, which reinforcement learning can undo. Training never sees a held-out prompt. The accuracy after
each phase is printed and written to the card. Seeded: the same machine and libraries make the same model.

Shapes: B sequences, S tokens, V vocabulary.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from transformers.utils import logging

REPOSITORY = Path(__file__).parents[2]
SPECIAL_TOKENS = ["<pad>", "<bos>", "<eos>", "<unk>"]
PHRASES = ["Answer: ", "Q: ", " mod 10\n"]
"""Phrases that are one token each: about 15 tokens less a sequence."""
MAX_LENGTH = 256
NOT_IN_LOSS = -100

Text = list[tuple[str, bool]]
"""A written episode, piece by piece. True: the model writes this piece and then stops. False: it is given."""
Example = tuple[list[int], list[int]]
"""Token ids of a text, and the labels: NOT_IN_LOSS where a token is given."""
Write = Callable[[random.Random, int, int], Text]
"""(random numbers, seed, row) -> the text of this row."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One pass of supervised training: linear warm-up, and linear decay to a tenth of `lr`."""

    name: str
    write: Write
    num_steps: int
    lr: float
    num_warmup_steps: int
    batch_size: int = 24
    num_batches_sorted: int = 16
    """So many batches are drawn at once and cut after sorting by length, which saves padding."""

    def lr_factor(self, step: int) -> float:
        return min(1.0, (step + 1) / self.num_warmup_steps) * (1.0 - 0.9 * step / self.num_steps)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a start model learns."""

    name: str
    """Of its directory beside the script."""
    task: str
    num_eval_prompts: int
    phases: Sequence[Phase]
    about: str
    """The card's words on task and phases."""


CARD = """# {name}

{about}

Llama, {num_parameters:,} parameters (hidden 128, 4 layers, 4 heads of which 2 for keys and values, tied embeddings, 103
tokens), bfloat16. Of no use for anything else.

**Made by** `OMP_NUM_THREADS=1 python configs/models/{script} --seed {seed}`, from random weights,
with text made on the fly: no other data. Muon and AdamW:

{phases}

**Accuracy** on {num_eval} held-out prompts, Hugging Face `generate` in fp32
(`python benchmarks/hf_accuracy.py DIR --task {task} --num {num_eval} --seed {eval_seed} [--greedy]`):

| phase | temperature 1 | greedy |
| --- | --- | --- |
{rows}

Held-out prompts are those with crc32(prompt) divisible by 16; no training has seen one.
"""


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


def encode(text: Text, tokenizer: PreTrainedTokenizerFast) -> Example:
    """Token ids of a text, bos first, and its labels."""
    ids, labels = [tokenizer.bos_token_id], [NOT_IN_LOSS]
    for piece, written in text:
        tokens = tokenizer(piece + tokenizer.eos_token * written, add_special_tokens=False)["input_ids"]
        ids += tokens
        labels += tokens if written else [NOT_IN_LOSS] * len(tokens)
    return ids, labels


def draw_batches(phase: Phase, tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[list[Example]]:
    """Endless batches, each of similar lengths, in random order."""
    rng = random.Random(f"{seed} {phase.name}")
    num_rows = phase.batch_size * phase.num_batches_sorted
    while True:
        chunk_seed = rng.getrandbits(63)
        examples = [encode(phase.write(rng, chunk_seed, row), tokenizer) for row in range(num_rows)]
        examples.sort(key=lambda example: len(example[0]))
        batches = [examples[start : start + phase.batch_size] for start in range(0, num_rows, phase.batch_size)]
        rng.shuffle(batches)
        yield from batches


def written_loss(model: LlamaForCausalLM, examples: list[Example]) -> torch.Tensor:
    """Mean cross-entropy over the tokens that the model writes; sequences are padded on the right."""
    shape = len(examples), max(len(ids) for ids, _ in examples)
    ids_BS, labels_BS = torch.full(shape, model.config.pad_token_id), torch.full(shape, NOT_IN_LOSS)
    for i, (ids, labels) in enumerate(examples):
        ids_BS[i, : len(ids)] = torch.tensor(ids)
        labels_BS[i, : len(ids)] = torch.tensor(labels)
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
    for step, examples in enumerate(islice(draw_batches(phase, tokenizer, seed), phase.num_steps), 1):
        loss = written_loss(model, examples)
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


def measure(directory: Path, recipe: Recipe, seed: int) -> list[float]:
    """Accuracy of a saved model at temperature 1 and greedily."""
    script = REPOSITORY / "benchmarks" / "hf_accuracy.py"
    asked = ["--task", recipe.task, "--num", str(recipe.num_eval_prompts), "--seed", str(seed)]
    command = [sys.executable, script, directory, *asked]
    runs = [subprocess.run([*command, *flags], check=True, capture_output=True) for flags in ((), ("--greedy",))]
    return [json.loads(run.stdout)["accuracy"] for run in runs]


def make(recipe: Recipe) -> None:
    """The command line of a recipe's script."""
    parser = argparse.ArgumentParser(description=f"Make the start model {recipe.name}.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / recipe.name, help="directory of the model")
    parser.add_argument("--seed", type=int, default=0, help="of the first weights and of the training text")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    set_seed(arguments.seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    eval_seed, phases, rows = arguments.seed + 1, [], []
    for number, phase in enumerate(recipe.phases, 1):
        train(model, tokenizer, phase, arguments.seed)
        save(model, tokenizer, arguments.out)  # the last phase is the one that stays
        sampled, greedy = measure(arguments.out, recipe, eval_seed)
        phases.append(f"{number}. `{phase.name}`: {phase.num_steps} steps, lr {phase.lr}, {phase.batch_size} a batch")
        rows.append(f"| {phase.name} | {sampled:.3f} | {greedy:.3f} |")
        print(f"{phase.name}: accuracy {sampled:.3f} at temperature 1, {greedy:.3f} greedy", flush=True)
    card = CARD.format(
        name=recipe.name,
        about=recipe.about,
        num_parameters=model.num_parameters(),
        script=Path(sys.argv[0]).name,
        seed=arguments.seed,
        phases="\n".join(phases),
        task=recipe.task,
        num_eval=recipe.num_eval_prompts,
        eval_seed=eval_seed,
        rows="\n".join(rows),
    )
    (arguments.out / "README.md").write_text(card)
