"""Attention of a training batch: each row's policy as a plan, and the door through which stock models reach it.

`register()` makes `attn_implementation="ropewalk"` known to transformers. A plan then travels with each batch:
`model(input_ids, attention_plan=plan)`; without one, attention is causal, KV caches included. A function of q and k in
its place makes each layer a plan of its own, by an estimator of `kernels/attention/estimators`. The plan reaches layers
as a keyword argument, so models stay unchanged and gradient checkpointing works. Masks never come from position ids:
transformers would take every jump in them for a new document, and methods that skip positions jump on purpose.

A layer's own sliding window narrows the plan. What attention of ours cannot honour it refuses: padding masks, dropout,
soft caps, static KV caches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ropewalk.kernels.attention import AttentionPlan

ATTENTION_NAME = "ropewalk"
FORBIDDEN = -3e38
"""Near the least number of float32 and bfloat16."""
AttentionImplementation = Literal["ropewalk", "sdpa", "eager"]
"""Names known to transformers once `register()` was called: ours, torch's, and the model's own code, which holds all
scores at once and alone knows soft caps and sinks."""


def register() -> None:
    """Register the attention and its mask function with transformers under `ATTENTION_NAME`; repeating is harmless."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION_NAME, attention_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, refuse_masks)


def visibility(
    policies: Sequence[str],
    segments: Sequence[Sequence[Mapping[str, Any]]],
    row_tokens: int,
    *,
    implementation: AttentionImplementation = "ropewalk",
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """What a model is given, by keyword, so that each row is masked by its own policy: a plan, or for others a mask.

    Arguments and errors are those of `plan_for_rows`. A mask of causal rows is all ones: without one, transformers
    takes jumps in position ids for borders of documents. One of other rows is dense, [B, 1, row_tokens, row_tokens].
    """
    import torch

    plan = plan_for_rows(policies, segments, row_tokens)
    if implementation == ATTENTION_NAME:
        return {"attention_plan": plan.to(device)}
    if set(policies) == {"causal"}:
        return {"attention_mask": torch.ones(len(policies), row_tokens, dtype=torch.int64, device=device)}
    visible = plan.to(device).visible()
    if implementation == "sdpa":
        return {"attention_mask": visible}
    # The model's own code adds it to the scores.
    return {"attention_mask": torch.zeros_like(visible, dtype=torch.float32).masked_fill_(~visible, FORBIDDEN)}


def plan_for_rows(
    policies: Sequence[str], segments: Sequence[Sequence[Mapping[str, Any]]], row_tokens: int
) -> AttentionPlan:
    """The plan of a batch of rows, on the CPU.

    `policies` holds each row's `causal`, `document` or `anchor`, `segments` each row's segments (`doc_id`,
    `num_tokens`, `row_start`). A document of the mask is a run of segments with one `doc_id`; positions in no segment
    belong to the segment before them, leading ones to the first. An `anchor` row begins with the anchor token, which
    is in no segment.

    Raises ValueError, naming the row, for an unknown policy, segments that overlap or leave the row, and rows of
    policy `document` or `anchor` whose documents are not contiguous (they need policy `causal`) or that have none.
    """
    from ropewalk.kernels.attention import AttentionPlan

    if len(policies) != len(segments):
        raise ValueError(f"policies and segments must have one entry a row, got {len(policies)} and {len(segments)}")
    return AttentionPlan.stack(
        [
            _plan_for_row(f"row {row} of the batch", policy, row_segments, row_tokens)
            for row, (policy, row_segments) in enumerate(zip(policies, segments, strict=True))
        ]
    )


def _plan_for_row(row: str, policy: str, segments: Sequence[Mapping[str, Any]], row_tokens: int) -> AttentionPlan:
    from ropewalk.kernels.attention import anchor, causal, document

    match policy:
        case "causal":
            return causal(1, row_tokens)
        case "document":
            return document([[0, *_document_starts(row, policy, segments, row_tokens)[1:]]], row_tokens)
        case "anchor":
            starts = _document_starts(row, policy, segments, row_tokens)
            if starts[0] == 0:
                raise ValueError(
                    f"{row}: policy anchor needs position 0 for the anchor token, but a segment starts there"
                )
            return anchor([[0, 1, *starts[1:]]], row_tokens)
        case _:
            raise ValueError(f"{row}: attention must be causal, document or anchor, got {policy!r}")


def _document_starts(row: str, policy: str, segments: Sequence[Mapping[str, Any]], row_tokens: int) -> list[int]:
    """Where the first segment of each document starts in the row."""
    starts: list[int] = []
    seen: set[str] = set()
    current, end = None, 0
    for segment in segments:
        row_start, num_tokens, doc_id = segment["row_start"], segment["num_tokens"], segment["doc_id"]
        if row_start < end or num_tokens < 1 or row_start + num_tokens > row_tokens:
            raise ValueError(
                f"{row}: segments must be ordered, disjoint and inside {row_tokens} tokens, got {num_tokens} tokens "
                f"at {row_start} where the one before ends at {end}"
            )
        end = row_start + num_tokens
        if doc_id == current:
            continue
        if doc_id in seen:
            raise ValueError(
                f"{row}: document {doc_id!r} returns after another one; rows with split documents need policy causal, "
                f"not {policy}"
            )
        seen.add(doc_id)
        starts.append(row_start)
        current = doc_id
    if not starts:
        raise ValueError(f"{row}: policy {policy} needs at least one segment")
    return starts


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    attention_plan: AttentionPlan | Callable[[Tensor, Tensor], AttentionPlan] | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: [B, H, L, D] queries in, [B, L, H, D] out, no attention weights.

    Raises ValueError for whatever would have to be ignored; see the module's docstring.
    """
    import torch

    from ropewalk.kernels.attention import sparse_attention

    refused = {
        "an attention_mask": attention_mask is not None,
        f"attention dropout ({dropout})": dropout != 0.0,
        f"a soft cap ({softcap})": softcap is not None,
        "attention sinks (s_aux)": kwargs.get("s_aux") is not None,
        "a position bias": kwargs.get("position_bias") is not None,
        "output_attentions": bool(kwargs.get("output_attentions")),
        "bidirectional layers": not getattr(module, "is_causal", True) or kwargs.get("is_causal") is False,
    }
    if reasons := [what for what, given in refused.items() if given]:
        raise ValueError(f"attention {ATTENTION_NAME!r} cannot honour {', '.join(reasons)}: use 'eager'")
    if torch.is_autocast_enabled(query.device.type):
        # As torch does for its own attention: norms and rotary embeddings leave q and k in fp32, v is bfloat16.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if attention_plan is None:
        attention_plan = _causal_plan(query.shape[0], query.shape[2], key.shape[2], query.device)
    elif callable(attention_plan):
        attention_plan = attention_plan(query, key)
    if sliding_window is not None and key.shape[2] > sliding_window:
        attention_plan = attention_plan.within_window(sliding_window)
    out, _ = sparse_attention(query, key, value, attention_plan, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


def refuse_masks(
    *,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    **kwargs: Any,
) -> None:
    """transformers' mask function: builds no mask, because the plan says which keys are visible.

    Raises ValueError for padding, for custom mask functions and for KV caches that hold unwritten positions.
    """
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ValueError(
            f"attention {ATTENTION_NAME!r} takes no padding: attention_mask {list(attention_mask.shape)} has zeros; "
            "use rows of equal length, or one sample at a time"
        )
    if use_vmap:
        raise ValueError(f"attention {ATTENTION_NAME!r} takes no custom mask functions: pass attention_plan instead")
    if int(q_offset) + q_length != kv_offset + kv_length:
        raise ValueError(
            f"attention {ATTENTION_NAME!r} needs a KV cache that grows: {kv_length} keys from {kv_offset} for "
            f"{q_length} queries from {int(q_offset)} leave unwritten keys visible"
        )


@lru_cache(maxsize=4)
def _causal_plan(batch: int, q_tokens: int, k_tokens: int, device: torch.device) -> AttentionPlan:
    """The causal plan that all layers of a forward pass share."""
    from ropewalk.kernels.attention import causal

    return causal(batch, q_tokens, k_tokens).to(device)
