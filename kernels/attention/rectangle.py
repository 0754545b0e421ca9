"""Attention of a run of queries over a run of keys with no mask but the causal triangle, and its backward.

Both return or take the log-sum-exp, so that rectangles that share queries can be merged, and the backward accepts the
merged `out` and `lse` (MoBA, arXiv:2502.13189, trains this way): it recomputes exp(scores - lse), which is then the
probability under the merged softmax, and sum(dout * out) needs the merged out.

On the CPU this is torch's own fused attention, the operator under `scaled_dot_product_attention`, called directly
because only the operator hands out the lse. Elsewhere it is plain torch in chunks of queries.

Shape legend: B batch, H query heads, G key/value heads, L query tokens, S key tokens, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK_QUERIES = 1024
"""Queries whose scores the plain version holds at a time."""


def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """(out [B, H, L, D], lse [B, H, L], natural log); q is [B, H, L, D], k and v are [B, G, S, D], S = L if causal."""
    if q.device.type == "cpu":
        k, v = (_repeat_heads(tensor, q.shape[1]) for tensor in (k, v))
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    return plain_forward(q, k, v, causal, scale)


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), shaped as q, k and v. `out` and `lse` may be merged ones."""
    if q.device.type != "cpu":
        return plain_backward(dout, q, k, v, out, lse, causal, scale)
    grouped = (k.shape[1], q.shape[1] // k.shape[1])
    k, v = (_repeat_heads(tensor, q.shape[1]) for tensor in (k, v))
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, lse, 0.0, causal, scale=scale
    )
    if grouped[1] == 1:
        return dq, dk, dv
    return dq, dk.unflatten(1, grouped).sum(dim=2), dv.unflatten(1, grouped).sum(dim=2)


def plain_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """`forward` in plain torch, on any device; half precision is worked in fp32."""
    working = torch.promote_types(q.dtype, torch.float32)
    k_, v_ = (_repeat_heads(tensor.to(working), q.shape[1]) for tensor in (k, v))
    outs, lses = [], []
    for chunk in _chunks(q.shape[2]):
        scores = _scores(q[:, :, chunk].to(working), k_, chunk, causal, scale)
        lse = scores.logsumexp(dim=-1)
        outs.append(((scores - lse.unsqueeze(-1)).exp() @ v_).to(q.dtype))
        lses.append(lse)
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


def plain_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`backward` in plain torch, on any device; half precision is worked in fp32."""
    working = torch.promote_types(q.dtype, torch.float32)
    k_, v_ = (_repeat_heads(tensor.to(working), q.shape[1]) for tensor in (k, v))
    dq, dk, dv = [], torch.zeros_like(k_), torch.zeros_like(v_)
    for chunk in _chunks(q.shape[2]):
        q_, dout_, out_ = (tensor[:, :, chunk].to(working) for tensor in (q, dout, out))
        probabilities = (_scores(q_, k_, chunk, causal, scale) - lse[:, :, chunk].unsqueeze(-1)).exp()
        dscores = probabilities * (dout_ @ v_.mT - (dout_ * out_).sum(dim=-1, keepdim=True)) * scale
        dq.append((dscores @ k_).to(q.dtype))
        dk += dscores.mT @ q_
        dv += probabilities.mT @ dout_
    grouped = (k.shape[1], q.shape[1] // k.shape[1])
    dk, dv = (total.unflatten(1, grouped).sum(dim=2).to(k.dtype) for total in (dk, dv))
    return torch.cat(dq, dim=2), dk, dv


def _chunks(num_queries: int) -> Iterator[slice]:
    for start in range(0, num_queries, CHUNK_QUERIES):
        yield slice(start, min(start + CHUNK_QUERIES, num_queries))


def _scores(q: Tensor, k: Tensor, chunk: slice, causal: bool, scale: float) -> Tensor:
    """[B, H, queries of the chunk, S]; -inf beyond the diagonal if causal."""
    scores = q @ k.mT * scale
    if not causal:
        return scores
    query = torch.arange(chunk.start, chunk.stop, device=q.device).unsqueeze(1)
    return scores.masked_fill(torch.arange(k.shape[2], device=q.device) > query, -torch.inf)


def _repeat_heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, G, S, D] to [B, H, S, D]: consecutive query heads share a key/value head."""
    return x if x.shape[1] == num_heads else x.repeat_interleave(num_heads // x.shape[1], dim=1)
