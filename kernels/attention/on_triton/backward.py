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
    first_entry,
    is_visible,
    is_within_bounds,
    key_tile_of,
    load_block,
    load_bounds,
    load_intervals,
    load_list,
    load_row,
    load_run,
    load_tile,
    next_entry,
    product,
    store_block,
    visits_key_tile,
)

LOG_2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def row_sums(
    dout, out, lse, dlse, row_terms, stride_db, stride_dh, stride_dl, stride_ob, stride_oh, stride_ol,
    num_heads, q_tokens, padded_tokens, D: tl.constexpr, D_PADDED: tl.constexpr, M: tl.constexpr,
    HAS_DLSE: tl.constexpr,
):  # fmt: skip
    """row_terms [B, H, 2, padded L], fp32: lse in the base of 2 with +inf in place of -inf, and delta."""
    program, num_tiles = tl.program_id(0), padded_tokens // M
    row = (program // num_tiles).to(tl.int64)
    b, head = row // num_heads, row % num_heads
    first = program % num_tiles * M
    rows = first + tl.arange(0, M)
    dout_md = load_tile(dout + b * stride_db + head * stride_dh, stride_dl, first, q_tokens, M, D, D_PADDED)
    out_md = load_tile(out + b * stride_ob + head * stride_oh, stride_ol, first, q_tokens, M, D, D_PADDED)
    delta = tl.sum(dout_md.to(tl.float32) * out_md.to(tl.float32), 1)
    places, inside = row * q_tokens + rows, rows < q_tokens
    if HAS_DLSE:
        delta -= tl.load(dlse + places, mask=inside, other=0.0)
    natural = tl.load(lse + places, mask=inside, other=-float("inf"))
    row_terms += row * 2 * padded_tokens + rows
    tl.store(row_terms, tl.where(natural == -float("inf"), float("inf"), natural * LOG_2_E))
    tl.store(row_terms + padded_tokens, delta)


@triton.jit
def key_step(
    dk, dv, k_nd, v_nd, first_key, q, dout, row_terms, intervals, b, head, plan_head, query_tile, listed, scale_log2,
    D_PADDED: tl.constexpr, M: tl.constexpr, N: tl.constexpr, MASKED: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """What one tile of queries adds to the dK and dV of a tile of keys. Scores are worked transposed, [n, m].

    A thread then holds few keys and many queries, so what belongs to queries costs registers: the intervals are packed,
    and row terms are read as late as can be.
    """
    first = query_tile * M
    q_md = load_block(q, b, head, first, M, D_PADDED)
    dout_md = load_block(dout, b, head, first, M, D_PADDED)
    scores_nm = product(k_nd, tl.trans(q_md), IEEE) * scale_log2
    if MASKED:
        bounds_m = load_bounds(intervals, b, plan_head, first, first_key, listed, M, N)
        visible = is_within_bounds(tl.arange(0, N)[:, None], bounds_m[None, :])
        scores_nm = tl.where(visible, scores_nm, -float("inf"))
    lse_m = load_row(row_terms, b, head, 0, first, M)
    weights_nm = tl.exp2(scores_nm - lse_m[None, :])
    dv += product(weights_nm.to(dout_md.dtype), dout_md, IEEE)
    dweights_nm = product(v_nd, tl.trans(dout_md), IEEE)
    delta_m = load_row(row_terms, b, head, 1, first, M)
    dscores_nm = weights_nm * (dweights_nm - delta_m[None, :])
    dk += product(dscores_nm.to(q_md.dtype), q_md, IEEE)
    return dk, dv


@triton.jit
def attention_backward_keys(
    q, k, v, dout, row_terms, dk, dv, partial_sums, intervals, items, key_runs, query_runs, offsets, entries,
    stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs, scale, scale_log2, num_heads, kv_heads,
    plan_heads, k_tokens, num_query_tiles, num_key_tiles, D: tl.constexpr, D_PADDED: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, HAS_LISTS: tl.constexpr, HAS_GAPS: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """dk and dv [B, G, S, D] of one tile of keys, or what one chunk of its queries adds to them.

    Descriptors: q, dout, row_terms [B, H, 2, padded L], intervals [B, P, 4, padded L], dk, dv, and partial_sums
    [slots, G, 2 * N, d]. HAS_GAPS: not every query tile of a key tile's run visits it.
    """
    program = tl.program_id(0)
    kv_head = program % kv_heads
    item = items + (program // kv_heads) * 4
    place, chunk, num_chunks, slot = tl.load(item), tl.load(item + 1), tl.load(item + 2), tl.load(item + 3)
    b, key_tile = place // num_key_tiles, place % num_key_tiles
    first_key = key_tile * N
    k += b.to(tl.int64) * stride_kb + kv_head.to(tl.int64) * stride_kh
    v += b.to(tl.int64) * stride_vb + kv_head.to(tl.int64) * stride_vh
    k_nd = load_tile(k, stride_ks, first_key, k_tokens, N, D, D_PADDED)
    v_nd = load_tile(v, stride_vs, first_key, k_tokens, N, D, D_PADDED)
    dk_nd = tl.zeros([N, D_PADDED], tl.float32)
    dv_nd = tl.zeros([N, D_PADDED], tl.float32)
    group = num_heads // kv_heads
    for head in range(kv_head * group, (kv_head + 1) * group):
        plan_head = head * plan_heads // num_heads
        plan_row = (b * plan_heads + plan_head).to(tl.int64)
        if HAS_LISTS:
            own, num_full, num_partial = load_list(offsets, entries, plan_row * num_key_tiles + key_tile)
            end = num_full * (chunk + 1) // num_chunks
            entry = first_entry(own, num_full * chunk // num_chunks, end)
            for n in range(num_full * chunk // num_chunks, end):
                following = next_entry(own, n, end)
                dk_nd, dv_nd = key_step(
                    dk_nd, dv_nd, k_nd, v_nd, first_key, q, dout, row_terms, intervals, b, head, plan_head,
                    entry // 2, True, scale_log2, D_PADDED, M, N, False, IEEE,
                )  # fmt: skip
                entry = following
            own += num_full
            end = num_partial * (chunk + 1) // num_chunks
            entry = first_entry(own, num_partial * chunk // num_chunks, end)
            for n in range(num_partial * chunk // num_chunks, end):
                following = next_entry(own, n, end)
                dk_nd, dv_nd = key_step(
                    dk_nd, dv_nd, k_nd, v_nd, first_key, q, dout, row_terms, intervals, b, head, plan_head,
                    entry // 2, entry % 2 == 1, scale_log2, D_PADDED, M, N, True, IEEE,
                )  # fmt: skip
                entry = following
        else:
            begin, full_begin, full_end, end = load_run(key_runs + (plan_row * num_key_tiles + key_tile) * 4)
            num_full = full_end - full_begin
            num_partial = full_begin - begin + end - full_end
            for n in range(num_full * chunk // num_chunks, num_full * (chunk + 1) // num_chunks):
                dk_nd, dv_nd = key_step(
                    dk_nd, dv_nd, k_nd, v_nd, first_key, q, dout, row_terms, intervals, b, head, plan_head,
                    full_begin + n, True, scale_log2, D_PADDED, M, N, False, IEEE,
                )  # fmt: skip
            for n in range(num_partial * chunk // num_chunks, num_partial * (chunk + 1) // num_chunks):
                query_tile = tl.where(n < full_begin - begin, begin + n, full_end + n - (full_begin - begin))
                # A condition keeps the compiler from asking for the next tiles ahead, so few plans pay for it.
                if not HAS_GAPS or visits_key_tile(
                    query_runs + (plan_row * num_query_tiles + query_tile) * 12, key_tile
                ):
                    dk_nd, dv_nd = key_step(
                        dk_nd, dv_nd, k_nd, v_nd, first_key, q, dout, row_terms, intervals, b, head, plan_head,
                        query_tile, True, scale_log2, D_PADDED, M, N, True, IEEE,
                    )  # fmt: skip
    dk_nd *= scale
    if slot < 0:
        store_block(dk, b, kv_head, first_key, dk_nd.to(k_nd.dtype), N, D_PADDED)
        store_block(dv, b, kv_head, first_key, dv_nd.to(k_nd.dtype), N, D_PADDED)
    else:
        store_block(partial_sums, slot, kv_head, 0, dk_nd, N, D_PADDED)
        store_block(partial_sums, slot, kv_head, N, dv_nd, N, D_PADDED)


@triton.jit
def add_partial_sums(partial_sums, dk, dv, splits, kv_heads, num_key_tiles, D_PADDED: tl.constexpr, N: tl.constexpr):
    """Adds the chunks of a split key tile, in order, and writes its dk and dv; all three are descriptors."""
    program = tl.program_id(0)
    kv_head = program % kv_heads
    split = splits + (program // kv_heads) * 3
    place, first_slot, num_chunks = tl.load(split), tl.load(split + 1), tl.load(split + 2)
    b, first_key = place // num_key_tiles, place % num_key_tiles * N
    dk_nd = tl.zeros([N, D_PADDED], tl.float32)
    dv_nd = tl.zeros([N, D_PADDED], tl.float32)
    for chunk in range(0, num_chunks):
        dk_nd += load_block(partial_sums, first_slot + chunk, kv_head, 0, N, D_PADDED)
        dv_nd += load_block(partial_sums, first_slot + chunk, kv_head, N, N, D_PADDED)
    store_block(dk, b, kv_head, first_key, dk_nd.to(dk.dtype), N, D_PADDED)
    store_block(dv, b, kv_head, first_key, dv_nd.to(dk.dtype), N, D_PADDED)


@triton.jit
def query_step(
    dq, q_md, dout_md, lse_m, delta_m, k, v, b, kv_head, tile, listed, lo, hi, glo, ghi, scale_log2,
    D_PADDED: tl.constexpr, N: tl.constexpr, MASKED: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """What one tile of keys adds to the dQ of a tile of queries."""
    k_nd = load_block(k, b, kv_head, tile * N, N, D_PADDED)
    v_nd = load_block(v, b, kv_head, tile * N, N, D_PADDED)
    scores_mn = product(q_md, tl.trans(k_nd), IEEE) * scale_log2
    if MASKED:
        keys = tile * N + tl.arange(0, N)
        visible = is_visible(keys[None, :], listed, lo[:, None], hi[:, None], glo[:, None], ghi[:, None])
        scores_mn = tl.where(visible, scores_mn, -float("inf"))
    weights_mn = tl.exp2(scores_mn - lse_m[:, None])
    dweights_mn = product(dout_md, tl.trans(v_nd), IEEE)
    dscores_mn = weights_mn * (dweights_mn - delta_m[:, None])
    return dq + product(dscores_mn.to(k_nd.dtype), k_nd, IEEE)


@triton.jit
def attention_backward_queries(
    q, k, v, dout, row_terms, dq, intervals, order, runs, offsets, entries, stride_qb, stride_qh, stride_ql,
    stride_db, stride_dh, stride_dl, scale, scale_log2, num_heads, kv_heads, plan_heads, q_tokens, padded_tokens,
    num_query_tiles, D: tl.constexpr, D_PADDED: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    HAS_LISTS: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """dq [B, H, L, D] of one tile of queries of one head. Descriptors: k, v, dq."""
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
    dout += b.to(tl.int64) * stride_db + head.to(tl.int64) * stride_dh
    row_terms += (b * num_heads + head).to(tl.int64) * 2 * padded_tokens + rows
    q_md = load_tile(q, stride_ql, first, q_tokens, M, D, D_PADDED)
    dout_md = load_tile(dout, stride_dl, first, q_tokens, M, D, D_PADDED)
    lse_m, delta_m = tl.load(row_terms), tl.load(row_terms + padded_tokens)
    dq_md = tl.zeros([M, D_PADDED], tl.float32)
    if HAS_LISTS:
        own, num_full, num_partial = load_list(offsets, entries, plan_row * num_query_tiles + query_tile)
        entry = first_entry(own, 0, num_full)
        for n in range(0, num_full):
            following = next_entry(own, n, num_full)
            dq_md = query_step(
                dq_md, q_md, dout_md, lse_m, delta_m, k, v, b, kv_head, entry // 2, True, lo_m, hi_m, glo_m, ghi_m,
                scale_log2, D_PADDED, N, False, IEEE,
            )  # fmt: skip
            entry = following
        own += num_full
        entry = first_entry(own, 0, num_partial)
        for n in range(0, num_partial):
            following = next_entry(own, n, num_partial)
            dq_md = query_step(
                dq_md, q_md, dout_md, lse_m, delta_m, k, v, b, kv_head, entry // 2, entry % 2 == 1, lo_m, hi_m, glo_m,
                ghi_m, scale_log2, D_PADDED, N, True, IEEE,
            )  # fmt: skip
            entry = following
    else:
        own_runs = runs + (plan_row * num_query_tiles + query_tile) * 12
        num_full, num_partial = count_key_tiles(own_runs)
        for n in range(0, num_full):
            dq_md = query_step(
                dq_md, q_md, dout_md, lse_m, delta_m, k, v, b, kv_head, key_tile_of(n, own_runs, False), True, lo_m,
                hi_m, glo_m, ghi_m, scale_log2, D_PADDED, N, False, IEEE,
            )  # fmt: skip
        for n in range(0, num_partial):
            dq_md = query_step(
                dq_md, q_md, dout_md, lse_m, delta_m, k, v, b, kv_head, key_tile_of(n, own_runs, True), True, lo_m,
                hi_m, glo_m, ghi_m, scale_log2, D_PADDED, N, True, IEEE,
            )  # fmt: skip
    store_block(dq, b, head, first, (dq_md * scale).to(q_md.dtype), M, D_PADDED)
