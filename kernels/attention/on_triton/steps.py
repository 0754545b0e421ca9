"""What one tile of queries and one tile of keys do to each other; shared by all kernels here.

Scores are worked in the base of 2: `scale_log2` is the scale times log2(e), applied after the product, in fp32. To
scale bf16 keys instead passes at unit scores and ruins dQ at 16 times as much (hao-ai-lab/FastVideo:
test_vsa_triton_backward_scale.py). Products take operands in the dtype of the inputs and add in fp32.

Shape legend: m queries of a tile, n keys of a tile, d head dim padded to a power of two.
"""

from __future__ import annotations

# The language is not the one that its types describe: constants are constexpr, static_range is iterated.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
import triton
import triton.language as tl


@triton.jit
def load_tile(pointer, stride, rows, num_rows, D: tl.constexpr, D_PADDED: tl.constexpr, EVEN: tl.constexpr):
    """[rows, d] of a matrix whose columns are contiguous; 0 outside. EVEN: no row is outside."""
    columns = tl.arange(0, D_PADDED)
    places = pointer + rows[:, None].to(tl.int64) * stride + columns[None, :]
    if EVEN and D == D_PADDED:
        return tl.load(places)
    return tl.load(places, mask=(rows[:, None] < num_rows) & (columns[None, :] < D), other=0.0)


@triton.jit
def store_tile(pointer, stride, rows, num_rows, values, D: tl.constexpr, D_PADDED: tl.constexpr):
    """The inverse of `load_tile`."""
    columns = tl.arange(0, D_PADDED)
    places = pointer + rows[:, None].to(tl.int64) * stride + columns[None, :]
    tl.store(places, values.to(pointer.dtype.element_ty), mask=(rows[:, None] < num_rows) & (columns[None, :] < D))


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
def load_intervals(lo, hi, glo, ghi, base, rows, num_rows):
    """The intervals of queries; outside the row they are empty."""
    inside = rows < num_rows
    places = base + rows
    return (
        tl.load(lo + places, mask=inside, other=1),
        tl.load(hi + places, mask=inside, other=0),
        tl.load(glo + places, mask=inside, other=0),
        tl.load(ghi + places, mask=inside, other=0),
    )


@triton.jit
def load_bounds(lo, hi, glo, ghi, base, rows, num_rows, first_key, listed, N: tl.constexpr):
    """The intervals of queries inside one tile of keys: four ends, counted from its first key, a byte each.

    One register in place of four, where a thread works on many queries.
    """
    tl.static_assert(N <= 128)
    lo_m, hi_m, glo_m, ghi_m = load_intervals(lo, hi, glo, ghi, base, rows, num_rows)
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
