"""The plain padded train step: Hugging Face and torch without optimizations of ours.

Rows in their order, padded on the right to the longest of the batch, as many a forward pass as the budget of padded
tokens holds; full logits, log_softmax, the clipped loss as a token mean, AdamW. The loss is written out here once more,
on purpose: its gradient is what ours is compared with. bfloat16 is autocast over float32 weights.

Shapes: B rows of a forward pass, T tokens of the longest sequence, V vocabulary, N rows of the batch.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.learner_step.batch import BatchFile

CLIP_LOW, CLIP_HIGH = 0.2, 0.28


class PaddedStep:
    """One model, its optimizer, and one batch."""

    def __init__(
        self, model: str, file: BatchFile, *, device: str, dtype: str, tokens_per_microbatch: int, lr: float
    ) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to(device).train()
        self._adamw = torch.optim.AdamW(self.model.parameters(), lr=lr, weight_decay=0.0, fused=True)
        self._file, self._device, self._dtype = file, device, getattr(torch, dtype)
        self._max_tokens = tokens_per_microbatch

    def __call__(self, grad_clip: float = 1.0) -> dict[str, float]:
        """One optimizer update; its loss and its gradient norm before clipping."""
        loss = self.accumulate()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), grad_clip).item()
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
        return {"loss": loss, "grad_norm": norm}

    def accumulate(self) -> float:
        """Gradients of the whole batch in `.grad`; returns the loss."""
        total, num_tokens = 0.0, int(self._file.num_response_N.sum())
        for tokens_BT, mask_BT, logprobs_BT, advantages_B in self._micro_batches():
            logp_BT = self._logprobs(tokens_BT, mask_BT)
            ratio_BT = (logp_BT - logprobs_BT).exp()
            clipped_BT = ratio_BT.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH)
            gain_BT = torch.min(ratio_BT * advantages_B[:, None], clipped_BT * advantages_B[:, None])
            loss = -gain_BT[mask_BT].sum() / num_tokens
            loss.backward()
            total += loss.item()
        return total

    @torch.no_grad()
    def logprobs(self) -> np.ndarray:
        """float32 [R]: of the response tokens under the model as it is."""
        pieces = [self._logprobs(*batch[:2])[batch[1]] for batch in self._micro_batches()]
        return torch.cat(pieces).float().cpu().numpy()

    def _logprobs(self, tokens_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """[B, T]; 0 where the mask is false. Padding on the right is out of sight of what counts."""
        with torch.autocast(self._device, torch.bfloat16, enabled=self._dtype == torch.bfloat16):
            logits_BTV = self.model(tokens_BT, use_cache=False).logits
        logp_BTV = logits_BTV[:, :-1].float().log_softmax(-1)
        logp_BT = logp_BTV.gather(-1, tokens_BT[:, 1:, None])[..., 0]
        return torch.nn.functional.pad(logp_BT, (1, 0)).where(mask_BT, 0.0)

    def _micro_batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        sequences = self._file.sequences()
        logprobs = np.split(self._file.logprobs_R, self._file.num_response_N.cumsum()[:-1])
        length = max(len(prompt) + len(response) for prompt, response in sequences)
        num_rows = max(1, self._max_tokens // length)
        for start in range(0, len(sequences), num_rows):
            rows = range(start, min(start + num_rows, len(sequences)))
            tokens_BT = np.zeros((len(rows), length), np.int64)
            mask_BT, logprobs_BT = np.zeros(tokens_BT.shape, bool), np.zeros(tokens_BT.shape, np.float32)
            for line, row in enumerate(rows):
                prompt, response = sequences[row]
                place = slice(len(prompt), len(prompt) + len(response))
                tokens_BT[line, : place.stop] = np.r_[prompt, response]
                mask_BT[line, place], logprobs_BT[line, place] = True, logprobs[row]
            advantages_B = self._file.advantages_N[rows.start : rows.stop].astype(np.float32)
            arrays = (tokens_BT, mask_BT, logprobs_BT, advantages_B)
            yield tuple(torch.from_numpy(array).to(self._device) for array in arrays)
