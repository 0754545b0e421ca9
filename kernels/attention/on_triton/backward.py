"""The backward kernels: dK and dV by tiles of keys, dQ by tiles of queries. No atomics: the same bits each time.

Both work the probabilities out anew from the log-sum-exp, which may be that of a merged attention, as may `out`. A
query that sees nothing, or lies behind the last, has lse +inf here, so that its probabilities are 0. `delta` is the row
sum of dout * out, less the gradient of the log-sum-exp where there is one.

A program of dK/dV loops over the query heads that share its key/value head, and adds up in registers. Key tiles with
much more work than others are split over programs that write partial sums, which `add_partial_sums` adds in order.

Shape legend: B batch, P plan heads, H query heads, G key/value heads, L query tokens, S key tokens, Q query tiles, K
key tiles, D head dim.
"""

from __future__ import annotations

# The language is not the one that its types describe: constants are constexpr, static_range is iterated.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
import triton
import triton.language as tl

from .steps import (
    count_key_tiles,
    is_visible,
    is_within_bounds,
    key_tile_of,
    load_bounds,
    load_intervals,
    load_run,
    load_tile,
    product,
    store_tile,
    visits_key_tile,
)

LOG_2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def row_sums(
    dout, out, lse, dlse, delta, lse_log2, stride_db, stride_dh, stride_dl, stride_ob, stride_oh, stride_ol,
    num_heads, q_tokens, D: tl.constexpr, D_PADDED: tl.constexpr, M: tl.constexpr, HAS_DLSE: tl.constexpr,
):  # fmt: skip
    """delta [B, H, L], and lse in the base of 2 with +inf in place of -inf; both fp32."""
    row = tl.program_id(1).to(tl.int64)
    b, head = row // num_heads, row % num_heads
    rows = tl.program_id(0) * M + tl.arange(0, M)
    dout_md = load_tile(dout + b * stride_db + head * stride_dh, stride_dl, rows, q_tokens, D, D_PADDED, False)
    out_md = load_tile(out + b * stride_ob + head * stride_oh, stride_ol, rows, q_tokens, D, D_PADDED, False)
    sums = tl.sum(dout_md.to(tl.float32) * out_md.to(tl.float32), 1)
    places, inside = row * q_tokens + rows, rows < q_tokens
    if HAS_DLSE:
        sums -= tl.load(dlse + places, mask=inside, other=0.0)
    natural = tl.load(lse + places, mask=inside, other=0.0)
    tl.store(delta + places, sums, mask=inside)
    tl.store(lse_log2 + places, tl.where(natural == -float("inf"), float("inf"), natural * LOG_2_E), mask=inside)


@triton.jit
def key_step(
    dk, dv, k_nd, v_nd, first_key, q, dout, lse_log2, delta, stride_ql, stride_dl, query_tile, listed,
    lo, hi, glo, ghi, plan_base, q_tokens, scale_log2, D: tl.constexpr, D_PADDED: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, MASKED: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """What one tile of queries adds to the dK and dV of a tile of keys. Scores are worked transposed, [n, m].

    A thread then holds few keys and many queries, so what belongs to queries costs registers: the intervals are packed,
    and delta is read as late as can be.
    """
    rows = query_tile * M + tl.arange(0, M)
    q_md = load_tile(q, stride_ql, rows, q_tokens, D, D_PADDED, False)
    dout_md = load_tile(dout, stride_dl, rows, q_tokens, D, D_PADDED, False)
    inside = rows < q_tokens
    lse_m = tl.load(lse_log2 + rows, mask=inside, other=float("inf"))
    scores_nm = product(k_nd, tl.trans(q_md), IEEE) * scale_log2
    if MASKED:
        bounds_m = load_bounds(lo, hi, glo, ghi, plan_base, rows, q_tokens, first_key, listed, N)
        visible = is_within_bounds(tl.arange(0, N)[:, None], bounds_m[None, :])
        scores_nm = tl.where(visible, scores_nm, -float("inf"))
    weights_nm = tl.exp2(scores_nm - lse_m[None, :])
    dv += product(weights_nm.to(dout_md.dtype), dout_md, IEEE)
    dweights_nm = product(v_nd, tl.trans(dout_md), IEEE)
    delta_m = tl.load(delta + rows, mask=inside, other=0.0)
    dscores_nm = weights_nm * (dweights_nm - delta_m[None, :])
    dk += product(dscores_nm.to(q_md.dtype), q_md, IEEE)
    return dk, dv


@triton.jit
def attention_backward_keys(
    q, k, v, dout, lse_log2, delta, dk, dv, partial_sums, lo, hi, glo, ghi, items, key_runs, query_runs, offsets,
    entries, stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_db, stride_dh, stride_dl, scale, scale_log2, num_heads, kv_heads, plan_heads, q_tokens, k_tokens,
    num_query_tiles, num_key_tiles, D: tl.constexpr, D_PADDED: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    HAS_LISTS: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """dk and dv [B, G, S, D], contiguous, of one tile of keys, or what one chunk of its queries adds to them."""
    program = tl.program_id(0)
    kv_head = program % kv_heads
    item = items + (program // kv_heads) * 4
    place, chunk, num_chunks, slot = tl.load(item), tl.load(item + 1), tl.load(item + 2), tl.load(item + 3)
    b = (place // num_key_tiles).to(tl.int64)
    key_tile = place % num_key_tiles
    first_key = key_tile * N
    keys = first_key + tl.arange(0, N)
    k_nd = load_tile(
        k + b * stride_kb + kv_head.to(tl.int64) * stride_kh, stride_ks, keys, k_tokens, D, D_PADDED, False
    )
    v_nd = load_tile(
        v + b * stride_vb + kv_head.to(tl.int64) * stride_vh, stride_vs, keys, k_tokens, D, D_PADDED, False
    )
    dk_nd = tl.zeros([N, D_PADDED], tl.float32)
    dv_nd = tl.zeros([N, D_PADDED], tl.float32)
    group = num_heads // kv_heads
    for member in range(0, group):
        head = kv_head * group + member
        plan_row = b * plan_heads + head * plan_heads // num_heads
        plan_base = plan_row * q_tokens
        head_base = (b * num_heads + head) * q_tokens
        q_head = q + b * stride_qb + head.to(tl.int64) * stride_qh
        dout_head = dout + b * stride_db + head.to(tl.int64) * stride_dh
        tile_place = plan_row * num_key_tiles + key_tile
        if HAS_LISTS:
            begin = tl.load(offsets + tile_place * 3)
            split = tl.load(offsets + tile_place * 3 + 1)
            end = tl.load(offsets + tile_place * 3 + 2)
            num_full, num_partial = split - begin, end - split
            for n in range(begin + num_full * chunk // num_chunks, begin + num_full * (chunk + 1) // num_chunks):
                query_tile = tl.load(entries + n) // 2
                dk_nd, dv_nd = key_step(
                    dk_nd, dv_nd, k_nd, v_nd, first_key, q_head, dout_head, lse_log2 + head_base, delta + head_base,
                    stride_ql, stride_dl, query_tile, True, lo, hi, glo, ghi, plan_base, q_tokens, scale_log2,
                    D, D_PADDED, M, N, False, IEEE,
                )  # fmt: skip
            for n in range(split + num_partial * chunk // num_chunks, split + num_partial * (chunk + 1) // num_chunks):
                entry = tl.load(entries + n)
                dk_nd, dv_nd = key_step(
                    dk_nd, dv_nd, k_nd, v_nd, first_key, q_head, dout_head, lse_log2 + head_base, delta + head_base,
                    stride_ql, stride_dl, entry // 2, entry % 2 == 1, lo, hi, glo, ghi, plan_base, q_tokens,
                    scale_log2, D, D_PADDED, M, N, True, IEEE,
                )  # fmt: skip
        else:
            begin, full_begin, full_end, end = load_run(key_runs + tile_place * 4)
            num_full = full_end - full_begin
            num_partial = full_begin - begin + end - full_end
            for n in range(num_full * chunk // num_chunks, num_full * (chunk + 1) // num_chunks):
                dk_nd, dv_nd = key_step(
                    dk_nd, dv_nd, k_nd, v_nd, first_key, q_head, dout_head, lse_log2 + head_base, delta + head_base,
                    stride_ql, stride_dl, full_begin + n, True, lo, hi, glo, ghi, plan_base, q_tokens, scale_log2,
                    D, D_PADDED, M, N, False, IEEE,
                )  # fmt: skip
            for n in range(num_partial * chunk // num_chunks, num_partial * (chunk + 1) // num_chunks):
                query_tile = tl.where(n < full_begin - begin, begin + n, full_end + n - (full_begin - begin))
                if visits_key_tile(query_runs + (plan_row * num_query_tiles + query_tile) * 12, key_tile):
                    dk_nd, dv_nd = key_step(
                        dk_nd, dv_nd, k_nd, v_nd, first_key, q_head, dout_head, lse_log2 + head_base, delta + head_base,
                        stride_ql, stride_dl, query_tile, True, lo, hi, glo, ghi, plan_base, q_tokens, scale_log2,
                        D, D_PADDED, M, N, True, IEEE,
                    )  # fmt: skip
    dk_nd *= scale
    if slot < 0:
        row = (b * kv_heads + kv_head) * k_tokens * D
        store_tile(dk + row, D, keys, k_tokens, dk_nd, D, D_PADDED)
        store_tile(dv + row, D, keys, k_tokens, dv_nd, D, D_PADDED)
    else:
        own = partial_sums + (slot.to(tl.int64) * kv_heads + kv_head) * 2 * N * D_PADDED
        places = tl.arange(0, N)
        store_tile(own, D_PADDED, places, N, dk_nd, D_PADDED, D_PADDED)
        store_tile(own + N * D_PADDED, D_PADDED, places, N, dv_nd, D_PADDED, D_PADDED)


@triton.jit
def add_partial_sums(
    partial_sums, dk, dv, splits, kv_heads, k_tokens, num_key_tiles, D: tl.constexpr, D_PADDED: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """Adds the chunks of a split key tile, in order, and writes its dk and dv."""
    program = tl.program_id(0)
    kv_head = program % kv_heads
    split = splits + (program // kv_heads) * 3
    place, first_slot, num_chunks = tl.load(split), tl.load(split + 1), tl.load(split + 2)
    b, key_tile = (place // num_key_tiles).to(tl.int64), place % num_key_tiles
    dk_nd = tl.zeros([N, D_PADDED], tl.float32)
    dv_nd = tl.zeros([N, D_PADDED], tl.float32)
    places = tl.arange(0, N)
    for chunk in range(0, num_chunks):
        own = partial_sums + ((first_slot + chunk).to(tl.int64) * kv_heads + kv_head) * 2 * N * D_PADDED
        dk_nd += load_tile(own, D_PADDED, places, N, D_PADDED, D_PADDED, True)
        dv_nd += load_tile(own + N * D_PADDED, D_PADDED, places, N, D_PADDED, D_PADDED, True)
    keys = key_tile * N + places
    row = (b * kv_heads + kv_head) * k_tokens * D
    store_tile(dk + row, D, keys, k_tokens, dk_nd, D, D_PADDED)
    store_tile(dv + row, D, keys, k_tokens, dv_nd, D, D_PADDED)


@triton.jit
def query_step(
    dq, q_md, dout_md, lse_m, delta_m, k, v, stride_ks, stride_vs, tile, listed, lo, hi, glo, ghi, k_tokens,
    scale_log2, D: tl.constexpr, D_PADDED: tl.constexpr, N: tl.constexpr, MASKED: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """What one tile of keys adds to the dQ of a tile of queries."""
    keys = tile * N + tl.arange(0, N)
    k_nd = load_tile(k, stride_ks, keys, k_tokens, D, D_PADDED, not MASKED)
    v_nd = load_tile(v, stride_vs, keys, k_tokens, D, D_PADDED, not MASKED)
    scores_mn = product(q_md, tl.trans(k_nd), IEEE) * scale_log2
    if MASKED:
        visible = is_visible(keys[None, :], listed, lo[:, None], hi[:, None], glo[:, None], ghi[:, None])
        scores_mn = tl.where(visible, scores_mn, -float("inf"))
    weights_mn = tl.exp2(scores_mn - lse_m[:, None])
    dweights_mn = product(dout_md, tl.trans(v_nd), IEEE)
    dscores_mn = weights_mn * (dweights_mn - delta_m[:, None])
    return dq + product(dscores_mn.to(k_nd.dtype), k_nd, IEEE)


@triton.jit
def attention_backward_queries(
    q, k, v, dout, lse_log2, delta, dq, lo, hi, glo, ghi, order, runs, offsets, entries,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_db, stride_dh, stride_dl, scale, scale_log2, num_heads, kv_heads, plan_heads, q_tokens, k_tokens,
    num_query_tiles, D: tl.constexpr, D_PADDED: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    HAS_LISTS: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """dq [B, H, L, D], contiguous, of one tile of queries of one head."""
    program = tl.program_id(0)
    head = program % num_heads
    place = tl.load(order + program // num_heads)
    b = (place // num_query_tiles).to(tl.int64)
    query_tile = place % num_query_tiles
    kv_head = head // (num_heads // kv_heads)
    rows = query_tile * M + tl.arange(0, M)
    inside = rows < q_tokens
    plan_row = b * plan_heads + head * plan_heads // num_heads
    lo_m, hi_m, glo_m, ghi_m = load_intervals(lo, hi, glo, ghi, plan_row * q_tokens, rows, q_tokens)
    q_md = load_tile(q + b * stride_qb + head.to(tl.int64) * stride_qh, stride_ql, rows, q_tokens, D, D_PADDED, False)
    dout_md = load_tile(
        dout + b * stride_db + head.to(tl.int64) * stride_dh, stride_dl, rows, q_tokens, D, D_PADDED, False
    )
    head_base = (b * num_heads + head) * q_tokens
    lse_m = tl.load(lse_log2 + head_base + rows, mask=inside, other=float("inf"))
    delta_m = tl.load(delta + head_base + rows, mask=inside, other=0.0)
    k += b * stride_kb + kv_head.to(tl.int64) * stride_kh
    v += b * stride_vb + kv_head.to(tl.int64) * stride_vh
    dq_md = tl.zeros([M, D_PADDED], tl.float32)
    tile_place = plan_row * num_query_tiles + query_tile
    if HAS_LISTS:
        begin = tl.load(offsets + tile_place * 3)
        split = tl.load(offsets + tile_place * 3 + 1)
        end = tl.load(offsets + tile_place * 3 + 2)
        for n in range(begin, split):
            tile = tl.load(entries + n) // 2
            dq_md = query_step(
                dq_md, q_md, dout_md, lse_m, delta_m, k, v, stride_ks, stride_vs, tile, True, lo_m, hi_m, glo_m,
                ghi_m, k_tokens, scale_log2, D, D_PADDED, N, False, IEEE,
            )  # fmt: skip
        for n in range(split, end):
            entry = tl.load(entries + n)
            dq_md = query_step(
                dq_md, q_md, dout_md, lse_m, delta_m, k, v, stride_ks, stride_vs, entry // 2, entry % 2 == 1, lo_m,
                hi_m, glo_m, ghi_m, k_tokens, scale_log2, D, D_PADDED, N, True, IEEE,
            )  # fmt: skip
    else:
        own_runs = runs + tile_place * 12
        num_full, num_partial = count_key_tiles(own_runs)
        for n in range(0, num_full):
            tile = key_tile_of(n, own_runs, False)
            dq_md = query_step(
                dq_md, q_md, dout_md, lse_m, delta_m, k, v, stride_ks, stride_vs, tile, True, lo_m, hi_m, glo_m,
                ghi_m, k_tokens, scale_log2, D, D_PADDED, N, False, IEEE,
            )  # fmt: skip
        for n in range(0, num_partial):
            tile = key_tile_of(n, own_runs, True)
            dq_md = query_step(
                dq_md, q_md, dout_md, lse_m, delta_m, k, v, stride_ks, stride_vs, tile, True, lo_m, hi_m, glo_m,
                ghi_m, k_tokens, scale_log2, D, D_PADDED, N, True, IEEE,
            )  # fmt: skip
    row = (b * num_heads + head) * q_tokens * D
    store_tile(dq + row, D, rows, q_tokens, dq_md * scale, D, D_PADDED)
