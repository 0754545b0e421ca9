"""The objective: weighted next-token cross-entropy, without ever holding the logits of a whole long row.

Shapes: B rows, T tokens, D hidden width, V vocabulary, N targets of a micro-batch. The loss at position t is for target
t, predicted from the tokens before it; position 0 is never a target. Logits are float32 whatever the model's type.

A row of 131,072 tokens has 62 GiB of float32 logits at a vocabulary of 128,256. So `kernels/loss` makes losses from the
hidden states and the output embedding: `chunk_tokens` targets have logits at a time, which are made again in the
backward pass, and what is no target has none. Models that bend their logits afterwards give them whole, if the
micro-batch is as short as a chunk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ropewalk.kernels.loss import linear_cross_entropy


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass on one rank sees."""

    input_ids: torch.Tensor
    """[B, T] int64."""
    position_ids: torch.Tensor
    """[B, T] int64."""
    targets: torch.Tensor
    """[B, T] bool: token t is a target."""
    inserted: torch.Tensor
    """[B, T] bool: token t is a target that no document holds, such as a planted answer."""

    def to(self, device: torch.device) -> MicroBatch:
        """The same on another device."""
        tensors = (self.input_ids, self.position_ids, self.targets, self.inserted)
        return MicroBatch(*(tensor.to(device) for tensor in tensors))


class WeightedLoss(nn.Module):
    """A causal language model whose forward pass ends in the loss, so that it runs inside the engine."""

    def __init__(self, model: Any, chunk_tokens: int) -> None:
        super().__init__()
        self.model = model
        self.chunk_tokens = chunk_tokens
        self.head_is_linear: bool | None = None

    def forward(
        self, batch: MicroBatch, visibility: Mapping[str, Any], target_weight: float, inserted_weight: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The objective, a scalar: `target_weight` x sum over targets + `inserted_weight` x sum over inserted ones.

        Also returns, detached, the two bare sums ([2], float32). `visibility` says which tokens see which
        (`attention.py`).
        """
        inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False, **visibility}
        kept = (batch.targets | batch.inserted)[:, 1:]
        losses = self._losses(inputs, batch.input_ids, kept)
        targets, inserted = batch.targets[:, 1:], batch.inserted[:, 1:]
        sums = torch.stack([losses[targets].sum(), losses[inserted].sum()])
        return target_weight * sums[0] + inserted_weight * sums[1], sums.detach()

    def _losses(self, inputs: dict[str, Any], input_ids: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """Loss of each prediction, [B, T-1], 0 where it is not kept."""
        if self.head_is_linear is None:
            self.head_is_linear = self._ask_head(input_ids[:, :8])
        if not self.head_is_linear:
            return self._of_whole_logits(inputs, input_ids)
        hidden = self._body()(**inputs)[0][:, :-1]
        losses = linear_cross_entropy(
            hidden.flatten(0, 1),
            self.model.get_output_embeddings().weight,
            input_ids[:, 1:].flatten(),
            loss_mask=kept.flatten(),
            chunk_tokens=self.chunk_tokens,
            reduction="none",
        )
        return losses.view(kept.shape)

    def _of_whole_logits(self, inputs: dict[str, Any], input_ids: torch.Tensor) -> torch.Tensor:
        if input_ids.numel() > self.chunk_tokens:
            raise ValueError(
                f"{type(self.model).__name__} changes its logits after the output embedding, so they cannot be made "
                "in chunks: set loss_chunk_tokens to micro_batch_tokens or more, and to the longest row or more"
            )
        logits = self.model(**inputs).logits[:, :-1].float()
        return functional.cross_entropy(logits.transpose(1, 2), input_ids[:, 1:], reduction="none")

    @torch.no_grad()
    def _ask_head(self, input_ids: torch.Tensor) -> bool:
        """Whether hidden states times the output embedding give the model's own logits: some scale or cap these."""
        head = self.model.get_output_embeddings()
        if getattr(head, "bias", None) is not None:
            return False
        was_training = self.model.training
        self.model.eval()  # Dropout would draw from the step's random numbers, and differ from pass to pass.
        expected = self.model(input_ids, use_cache=False).logits.float()
        found = functional.linear(self._body()(input_ids, use_cache=False)[0], head.weight).float()
        self.model.train(was_training)
        return torch.allclose(found, expected, rtol=1e-2, atol=1e-2)

    def _body(self) -> Any:
        """The model without its head."""
        return getattr(self.model, self.model.base_model_prefix)
