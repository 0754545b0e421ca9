"""What one tile of queries and one tile of keys do to each other; shared by all kernels here.

Scores are worked in the base of 2: `scale_log2` is the scale times log2(e), applied after the product, in fp32. To
scale bf16 keys instead passes at unit scores and ruins dQ at 16 times as much (hao-ai-lab/FastVideo:
test_vsa_triton_backward_scale.py). Products take operands in the dtype of the inputs and add in fp32.

What a loop reads comes through tensor descriptors: on Hopper one thread asks for a tile, and no thread holds addresses
(dK/dV spills with them). What a program reads once comes through pointers: a descriptor there costs dK/dV registers in
the loops, with Triton 3.9.

Shape legend: m queries of a tile, n keys of a tile, d head dim padded to a power of two.
"""

from __future__ import annotations

# The language is not the one that its types describe: constants are constexpr, static_range is iterated.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
import triton
import triton.language as tl


@triton.jit
def load_tile(pointer, stride, first, num_rows, ROWS: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr):
    """[ROWS, d] of a matrix whose columns are contiguous, from row `first` on; 0 outside."""
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, D_PADDED)[None, :]
    # The start is 64 bits wide, once; inside the tile 32 are enough.
    places = pointer + tl.cast(first, tl.int64) * stride + (row * stride + column)
    return tl.load(places, mask=(row < num_rows - first) & (column < D), other=0.0)


@triton.jit
def load_block(described, b, head, first, ROWS: tl.constexpr, D_PADDED: tl.constexpr):
    """[ROWS, d] of [b, head, rows, d] behind a descriptor, from row `first` on; 0 outside."""
    return described.load([b, head, first, 0]).reshape(ROWS, D_PADDED)


@triton.jit
def load_row(described, b, head, field, first, ROWS: tl.constexpr):
    """[ROWS] of [b, head, field, rows] behind a descriptor, from row `first` on."""
    return described.load([b, head, field, first]).reshape(ROWS)


@triton.jit
def store_block(described, b, head, first, values, ROWS: tl.constexpr, D_PADDED: tl.constexpr):
    """The inverse of `load_block`; what lies outside is dropped."""
    described.store([b, head, first, 0], values.reshape(1, 1, ROWS, D_PADDED))


@triton.jit
def product(x, y, IEEE: tl.constexpr):
    """x @ y in fp32; IEEE: fp32 operands are not rounded to TF32."""
    if IEEE:
        return tl.dot(x, y, input_precision="ieee")
    return tl.dot(x, y)


@triton.jit
def is_visible(keys, listed, lo, hi, glo, ghi):
    """bool: which keys queries with these intervals see. Shapes broadcast; `listed` says the tile counts as own."""
    return ((lo <= keys) & (keys <= hi) & listed) | ((glo <= keys) & (keys < ghi))


@triton.jit
def load_intervals(intervals, plan_row, rows, padded_tokens):
    """lo, hi, glo and ghi of queries; `intervals` is [rows of the plan, 4, padded_tokens]."""
    places = intervals + plan_row * 4 * padded_tokens + rows
    return (
        tl.load(places),
        tl.load(places + padded_tokens),
        tl.load(places + 2 * padded_tokens),
        tl.load(places + 3 * padded_tokens),
    )


@triton.jit
def load_bounds(intervals, b, plan_head, first, first_key, listed, M: tl.constexpr, N: tl.constexpr):
    """The intervals of queries inside one tile of keys: four ends, counted from its first key, a byte each.

    One register in place of four, where a thread works on many queries.
    """
    tl.static_assert(N <= 128)
    lo_m = load_row(intervals, b, plan_head, 0, first, M)
    hi_m = load_row(intervals, b, plan_head, 1, first, M)
    glo_m = load_row(intervals, b, plan_head, 2, first, M)
    ghi_m = load_row(intervals, b, plan_head, 3, first, M)
    end = tl.where(listed, hi_m + 1, 0)
    shared = inside_tile(glo_m, first_key, N) << 16 | inside_tile(ghi_m, first_key, N) << 24
    return inside_tile(lo_m, first_key, N) | inside_tile(end, first_key, N) << 8 | shared


@triton.jit
def inside_tile(keys, first_key, N: tl.constexpr):
    """Counted from the first key of the tile, 0 to N."""
    return tl.minimum(tl.maximum(keys - first_key, 0), N)


@triton.jit
def is_within_bounds(keys, bounds):
    """bool: as `is_visible`, for keys counted from the first of the tile and the bounds that `load_bounds` gives."""
    own = ((bounds & 255) <= keys) & (keys < (bounds >> 8 & 255))
    return own | ((bounds >> 16 & 255) <= keys) & (keys < (bounds >> 24 & 255))


@triton.jit
def load_list(offsets, entries, place):
    """Of one row of `TileLists`: its entries, how many are full, how many partial."""
    begin = tl.load(offsets + place * 3)
    split = tl.load(offsets + place * 3 + 1)
    end = tl.load(offsets + place * 3 + 2)
    return entries + begin, (split - begin).to(tl.int32), (end - split).to(tl.int32)


@triton.jit
def first_entry(entries, n, end):
    """The n-th entry of a list; 0 where the list has ended."""
    return tl.load(entries + n, mask=n < end, other=0)


@triton.jit
def next_entry(entries, n, end):
    """The entry behind the n-th, or the last. Loops read it a step ahead, so that its tiles are asked for in time.

    No mask: with one, Triton 3.6 makes a loop whose tensor core instructions ptxas serialises.
    """
    return tl.load(entries + tl.minimum(n + 1, end - 1))


@triton.jit
def key_tile_of(n, runs, PARTIAL: tl.constexpr):
    """The n-th of the full, or of the partial, key tiles of a tile of queries; `runs` points to its three runs."""
    first = 0
    tile = 0
    for run in tl.static_range(3):
        begin, full_begin, full_end, end = load_run(runs + 4 * run)
        if PARTIAL:
            tile = tl.where(n >= first, begin + n - first, tile)
            first += full_begin - begin
            tile = tl.where(n >= first, full_end + n - first, tile)
            first += end - full_end
        else:
            tile = tl.where(n >= first, full_begin + n - first, tile)
            first += full_end - full_begin
    return tile


@triton.jit
def load_run(run):
    """(begin, full_begin, full_end, end)."""
    return tl.load(run), tl.load(run + 1), tl.load(run + 2), tl.load(run + 3)


@triton.jit
def count_key_tiles(runs):
    """How many full and how many partial key tiles a tile of queries visits."""
    full = 0
    partial = 0
    for run in tl.static_range(3):
        begin, full_begin, full_end, end = load_run(runs + 4 * run)
        full += full_end - full_begin
        partial += full_begin - begin + end - full_end
    return full, partial


@triton.jit
def visits_key_tile(runs, tile):
    """Whether a tile of queries visits a key tile."""
    found = False
    for run in tl.static_range(3):
        begin, _, _, end = load_run(runs + 4 * run)
        found = found | ((begin <= tile) & (tile < end))
    return found
