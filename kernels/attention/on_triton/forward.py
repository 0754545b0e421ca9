"""The forward kernel: one program for each tile of queries of each head, longest lists first.

Full tiles first, then partial ones, each in a loop of its own so that the first has no mask (FlashAttention-2,
arXiv:2307.08691, with the loop over what the plan lists). Programs of the heads of one key/value head are neighbours in
the launch order, so that they find its tiles in the L2 cache.

Shape legend: B batch, P plan heads, H query heads, G key/value heads, L query tokens, S key tokens, Q query tiles.
"""

from __future__ import annotations

# The language is not the one that its types describe: constants are constexpr, static_range is iterated.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
import triton
import triton.language as tl

from .steps import (
    count_key_tiles,
    first_entry,
    is_visible,
    key_tile_of,
    load_block,
    load_intervals,
    load_list,
    load_tile,
    next_entry,
    product,
    store_block,
)

LOG_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def forward_step(
    acc, total, highest, q_md, k, v, b, kv_head, tile, listed, lo, hi, glo, ghi, scale_log2,
    D_PADDED: tl.constexpr, N: tl.constexpr, MASKED: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """One tile of keys: the new accumulator, sum and maximum of the online softmax."""
    k_nd = load_block(k, b, kv_head, tile * N, N, D_PADDED)
    scores_mn = product(q_md, tl.trans(k_nd), IEEE) * scale_log2
    if MASKED:
        keys = tile * N + tl.arange(0, N)
        visible = is_visible(keys[None, :], listed, lo[:, None], hi[:, None], glo[:, None], ghi[:, None])
        scores_mn = tl.where(visible, scores_mn, -float("inf"))
    new_highest = tl.maximum(highest, tl.max(scores_mn, 1))
    finite = new_highest
    if MASKED:
        # A query that has seen nothing yet: -inf minus -inf would be NaN.
        finite = tl.where(new_highest == -float("inf"), 0.0, new_highest)
    weights_mn = tl.exp2(scores_mn - finite[:, None])
    kept = tl.exp2(highest - finite)
    v_nd = load_block(v, b, kv_head, tile * N, N, D_PADDED)
    acc = acc * kept[:, None] + product(weights_mn.to(v_nd.dtype), v_nd, IEEE)
    return acc, total * kept + tl.sum(weights_mn, 1), new_highest


@triton.jit
def attention_forward(
    q, k, v, out, lse, intervals, order, runs, offsets, entries, stride_qb, stride_qh, stride_ql, scale_log2,
    num_heads, kv_heads, plan_heads, q_tokens, padded_tokens, num_query_tiles, D: tl.constexpr,
    D_PADDED: tl.constexpr, M: tl.constexpr, N: tl.constexpr, HAS_LISTS: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """out [B, H, L, D] and lse [B, H, L] (fp32, natural log) of one tile of queries of one head.

    Descriptors: k, v, out.
    """
    program = tl.program_id(0)
    head = program % num_heads
    place = tl.load(order + program // num_heads)
    b, query_tile = place // num_query_tiles, place % num_query_tiles
    kv_head = head // (num_heads // kv_heads)
    plan_row = (b * plan_heads + head * plan_heads // num_heads).to(tl.int64)
    first = query_tile * M
    rows = first + tl.arange(0, M)
    lo_m, hi_m, glo_m, ghi_m = load_intervals(intervals, plan_row, rows, padded_tokens)
    q += b.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
    q_md = load_tile(q, stride_ql, first, q_tokens, M, D, D_PADDED)
    acc = tl.zeros([M, D_PADDED], tl.float32)
    total = tl.zeros([M], tl.float32)
    highest = tl.full([M], -float("inf"), tl.float32)
    if HAS_LISTS:
        own, num_full, num_partial = load_list(offsets, entries, plan_row * num_query_tiles + query_tile)
        entry = first_entry(own, 0, num_full)
        for n in range(0, num_full):
            following = next_entry(own, n, num_full)
            acc, total, highest = forward_step(
                acc, total, highest, q_md, k, v, b, kv_head, entry // 2, True, lo_m, hi_m, glo_m, ghi_m, scale_log2,
                D_PADDED, N, False, IEEE,
            )  # fmt: skip
            entry = following
        own += num_full
        entry = first_entry(own, 0, num_partial)
        for n in range(0, num_partial):
            following = next_entry(own, n, num_partial)
            acc, total, highest = forward_step(
                acc, total, highest, q_md, k, v, b, kv_head, entry // 2, entry % 2 == 1, lo_m, hi_m, glo_m, ghi_m,
                scale_log2, D_PADDED, N, True, IEEE,
            )  # fmt: skip
            entry = following
    else:
        own_runs = runs + (plan_row * num_query_tiles + query_tile) * 12
        num_full, num_partial = count_key_tiles(own_runs)
        for n in range(0, num_full):
            acc, total, highest = forward_step(
                acc, total, highest, q_md, k, v, b, kv_head, key_tile_of(n, own_runs, False), True, lo_m, hi_m, glo_m,
                ghi_m, scale_log2, D_PADDED, N, False, IEEE,
            )  # fmt: skip
        for n in range(0, num_partial):
            acc, total, highest = forward_step(
                acc, total, highest, q_md, k, v, b, kv_head, key_tile_of(n, own_runs, True), True, lo_m, hi_m, glo_m,
                ghi_m, scale_log2, D_PADDED, N, True, IEEE,
            )  # fmt: skip
    sees = total > 0
    normalised = acc / tl.where(sees, total, 1.0)[:, None]
    store_block(out, b, head, first, normalised.to(q_md.dtype), M, D_PADDED)
    lse_m = tl.where(sees, (highest + tl.log2(tl.where(sees, total, 1.0))) * LOG_2, -float("inf"))
    tl.store(lse + (b * num_heads + head).to(tl.int64) * q_tokens + rows, lse_m, mask=rows < q_tokens)
