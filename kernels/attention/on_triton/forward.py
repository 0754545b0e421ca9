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

from .steps import count_key_tiles, is_visible, key_tile_of, load_intervals, load_tile, product, store_tile

LOG_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def forward_step(
    acc,
    total,
    highest,
    q_md,
    k,
    v,
    stride_k,
    stride_v,
    tile,
    listed,
    lo,
    hi,
    glo,
    ghi,
    k_tokens,
    scale_log2,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    N: tl.constexpr,
    MASKED: tl.constexpr,
    IEEE: tl.constexpr,
):
    """One tile of keys: the new accumulator, sum and maximum of the online softmax."""
    keys = tile * N + tl.arange(0, N)
    k_nd = load_tile(k, stride_k, keys, k_tokens, D, D_PADDED, not MASKED)
    scores_mn = product(q_md, tl.trans(k_nd), IEEE) * scale_log2
    if MASKED:
        visible = is_visible(keys[None, :], listed, lo[:, None], hi[:, None], glo[:, None], ghi[:, None])
        scores_mn = tl.where(visible, scores_mn, -float("inf"))
    new_highest = tl.maximum(highest, tl.max(scores_mn, 1))
    finite = new_highest
    if MASKED:
        # A query that has seen nothing yet: -inf minus -inf would be NaN.
        finite = tl.where(new_highest == -float("inf"), 0.0, new_highest)
    weights_mn = tl.exp2(scores_mn - finite[:, None])
    kept = tl.exp2(highest - finite)
    v_nd = load_tile(v, stride_v, keys, k_tokens, D, D_PADDED, not MASKED)
    acc = acc * kept[:, None] + product(weights_mn.to(v_nd.dtype), v_nd, IEEE)
    return acc, total * kept + tl.sum(weights_mn, 1), new_highest


@triton.jit
def attention_forward(
    q,
    k,
    v,
    out,
    lse,
    lo,
    hi,
    glo,
    ghi,
    order,
    runs,
    offsets,
    entries,
    stride_qb,
    stride_qh,
    stride_ql,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_ob,
    stride_oh,
    stride_ol,
    scale_log2,
    num_heads,
    kv_heads,
    plan_heads,
    q_tokens,
    k_tokens,
    num_query_tiles,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    HAS_LISTS: tl.constexpr,
    IEEE: tl.constexpr,
):
    """out [B, H, L, D] and lse [B, H, L] (fp32, natural log) of one tile of queries of one head."""
    program = tl.program_id(0)
    head = program % num_heads
    place = tl.load(order + program // num_heads)
    b = (place // num_query_tiles).to(tl.int64)
    query_tile = place % num_query_tiles
    plan_head = head * plan_heads // num_heads
    kv_head = head // (num_heads // kv_heads)
    rows = query_tile * M + tl.arange(0, M)
    plan_row = b * plan_heads + plan_head
    lo_m, hi_m, glo_m, ghi_m = load_intervals(lo, hi, glo, ghi, plan_row * q_tokens, rows, q_tokens)
    q_md = load_tile(q + b * stride_qb + head.to(tl.int64) * stride_qh, stride_ql, rows, q_tokens, D, D_PADDED, False)
    k += b * stride_kb + kv_head.to(tl.int64) * stride_kh
    v += b * stride_vb + kv_head.to(tl.int64) * stride_vh
    acc = tl.zeros([M, D_PADDED], tl.float32)
    total = tl.zeros([M], tl.float32)
    highest = tl.full([M], -float("inf"), tl.float32)
    tile_place = plan_row * num_query_tiles + query_tile
    if HAS_LISTS:
        begin = tl.load(offsets + tile_place * 3)
        split = tl.load(offsets + tile_place * 3 + 1)
        end = tl.load(offsets + tile_place * 3 + 2)
        for n in range(begin, split):
            tile = tl.load(entries + n) // 2
            acc, total, highest = forward_step(
                acc, total, highest, q_md, k, v, stride_ks, stride_vs, tile, True, lo_m, hi_m, glo_m, ghi_m,
                k_tokens, scale_log2, D, D_PADDED, N, False, IEEE,
            )  # fmt: skip
        for n in range(split, end):
            entry = tl.load(entries + n)
            acc, total, highest = forward_step(
                acc, total, highest, q_md, k, v, stride_ks, stride_vs, entry // 2, entry % 2 == 1, lo_m, hi_m, glo_m,
                ghi_m, k_tokens, scale_log2, D, D_PADDED, N, True, IEEE,
            )  # fmt: skip
    else:
        own_runs = runs + tile_place * 12
        num_full, num_partial = count_key_tiles(own_runs)
        for n in range(0, num_full):
            tile = key_tile_of(n, own_runs, False)
            acc, total, highest = forward_step(
                acc, total, highest, q_md, k, v, stride_ks, stride_vs, tile, True, lo_m, hi_m, glo_m, ghi_m,
                k_tokens, scale_log2, D, D_PADDED, N, False, IEEE,
            )  # fmt: skip
        for n in range(0, num_partial):
            tile = key_tile_of(n, own_runs, True)
            acc, total, highest = forward_step(
                acc, total, highest, q_md, k, v, stride_ks, stride_vs, tile, True, lo_m, hi_m, glo_m, ghi_m,
                k_tokens, scale_log2, D, D_PADDED, N, True, IEEE,
            )  # fmt: skip
    sees = total > 0
    normalised = acc / tl.where(sees, total, 1.0)[:, None]
    out += b * stride_ob + head.to(tl.int64) * stride_oh
    store_tile(out, stride_ol, rows, q_tokens, normalised, D, D_PADDED)
    lse_m = tl.where(sees, (highest + tl.log2(tl.where(sees, total, 1.0))) * LOG_2, -float("inf"))
    tl.store(lse + (b * num_heads + head) * q_tokens + rows, lse_m, mask=rows < q_tokens)
