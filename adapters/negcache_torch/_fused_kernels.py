"""Triton kernels that score slots and reduce the scores in registers.

Read TRITON_INTERPRET=1 as "run these with NumPy": Triton looks at it when it is imported, which
importing this module does.
"""

import triton
import triton.language as tl


# Numbers that differ from call to call do not make a new kernel; that of columns does.
@triton.jit(do_not_specialize=["B", "C"])
def weigh(
    queries,
    table,
    age,
    query_scale,
    row_scale,
    bias,
    ids,
    own_ids,
    group,
    own_group,
    ceiling,
    weights,
    B,
    C,
    D,
    places: tl.constexpr,
    EMPTY: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write the log-sum-exp of one block of slots for one tile of queries: weights (blocks, B)."""
    tiles = tl.cdiv(B, BLOCK_B)
    at, block = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    rows = (at * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    slots = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    written = tl.load(age + slots, mask=slots < C, other=EMPTY) != EMPTY
    scores = _scores(
        queries, table, query_scale, row_scale, bias, ids, own_ids, group, own_group, ceiling,
        rows, slots, written, B, D, places, OPERAND, PRECISION, BLOCK_B, BLOCK, BLOCK_K,
    )  # fmt: skip
    top, total, _ = _reduce(scores)
    tl.store(weights + block.to(tl.int64) * B + rows, _log(top, total), mask=rows < B)


@triton.jit(do_not_specialize=["B", "C", "stretch"])
def read(
    queries,
    table,
    age,
    query_scale,
    row_scale,
    bias,
    ids,
    own_ids,
    group,
    own_group,
    ceiling,
    weights,
    logs,
    means,
    B,
    C,
    D,
    stretch,
    places: tl.constexpr,
    EMPTY: tl.constexpr,
    OPERAND: tl.constexpr,
    READ: tl.constexpr,
    ROUNDED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
):
    """Write that of a stretch of blocks, with their log-partition and a part of their mean row.

    logs (splits, B) and means (splits, B, D) are of each stretch alone. A program has FIRST +
    SECOND columns of the mean, in two accumulators: 768 are 512 and 256, where one block would
    have 1,024.
    """
    tiles, parts = tl.cdiv(B, BLOCK_B), tl.cdiv(D, FIRST + SECOND)
    at, part = tl.program_id(0) % tiles, tl.program_id(0) // tiles % parts
    split = (tl.program_id(0) // tiles // parts).to(tl.int64)
    rows = (at * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    column = part * (FIRST + SECOND)
    top = tl.full((BLOCK_B,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_B,), tl.float32)
    first = tl.zeros((BLOCK_B, FIRST), tl.float32)
    # Not used without a second part, but a name must have a value.
    second = tl.zeros((BLOCK_B, SECOND if SECOND else 1), tl.float32)
    for block in range(split * stretch, tl.minimum((split + 1) * stretch, tl.cdiv(C, BLOCK))):
        block_top = tl.full((BLOCK_B,), -float("inf"), tl.float32)
        block_total = tl.zeros((BLOCK_B,), tl.float32)
        for offset in range(0, BLOCK, BLOCK_N):
            slots = block * BLOCK + offset + tl.arange(0, BLOCK_N)
            written = tl.load(age + slots, mask=slots < C, other=EMPTY) != EMPTY
            scores = _scores(
                queries, table, query_scale, row_scale, bias, ids, own_ids, group, own_group,
                ceiling, rows, slots, written, B, D, places, OPERAND, PRECISION, BLOCK_B, BLOCK_N,
                BLOCK_K,
            )  # fmt: skip
            new_top, new_total, shares = _reduce(scores)
            block_top, block_total, _, _ = _join(block_top, block_total, new_top, new_total)
            top, total, kept, added = _join(top, total, new_top, new_total)
            shares = shares * added[:, None]
            unit = 1.0
            if row_scale is not None:
                # Rows stay integers; shares of at most 1 keep half types in their range.
                scale = tl.load(row_scale + slots, mask=written, other=0.0)
                unit = tl.max(tl.abs(scale), 0)
                unit = tl.where(unit == 0.0, 1.0, unit)
                shares = shares * (scale / unit)[None, :]
            shares = shares.to(ROUNDED).to(READ)
            first = _add_rows(
                first, kept, shares, unit, table, slots, written, column, D, READ, PRECISION, FIRST
            )
            if SECOND:
                second = _add_rows(
                    second, kept, shares, unit, table, slots, written, column + FIRST, D, READ,
                    PRECISION, SECOND,
                )  # fmt: skip
        if part == 0:
            log = _log(block_top, block_total)
            tl.store(weights + block * B + rows, log, mask=rows < B)
    if part == 0:
        tl.store(logs + split * B + rows, _log(top, total), mask=rows < B)
    share = 1.0 / tl.where(total == 0.0, 1.0, total)[:, None]
    means += split * B * D
    _store_columns(means, first * share, rows, column, B, D, FIRST)
    if SECOND:
        _store_columns(means, second * share, rows, column + FIRST, B, D, SECOND)


@triton.jit
def _scores(
    queries,
    table,
    query_scale,
    row_scale,
    bias,
    ids,
    own_ids,
    group,
    own_group,
    ceiling,
    rows,
    slots,
    written,
    B,
    D,
    places: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Return the scores (BLOCK_B, BLOCK_N) of some queries and slots, -inf where one is left out.

    rows and slots are int64: a table can have more than 2**31 numbers.
    """
    there = rows < B
    ACCUMULATOR: tl.constexpr = tl.int32 if OPERAND == tl.int8 else tl.float32
    products = tl.zeros((BLOCK_B, BLOCK_N), ACCUMULATOR)
    for start in range(0, D, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mine = (rows * D)[:, None] + k[None, :]
        left = tl.load(queries + mine, mask=there[:, None] & (k < D)[None, :], other=0)
        theirs = (slots * D)[:, None] + k[None, :]
        right = tl.load(table + theirs, mask=written[:, None] & (k < D)[None, :], other=0)
        products = tl.dot(
            left.to(OPERAND),
            tl.trans(right.to(OPERAND)),
            products,
            input_precision=PRECISION,
            out_dtype=ACCUMULATOR,
        )
    scores = products.to(tl.float32)
    if query_scale is not None:
        scores = scores * tl.load(query_scale + rows, mask=there, other=0.0)[:, None]
    if row_scale is not None:
        scores = scores * tl.load(row_scale + slots, mask=written, other=0.0)[None, :]
    counts = written[None, :] & there[:, None]
    for key in tl.static_range(len(places)):
        label = tl.load(ids[key] + slots, mask=written, other=0).to(tl.int64)
        for place in range(places[key]):
            mark = tl.load(own_ids[key] + rows * places[key] + place, mask=there, other=0)
            counts = counts & (label[None, :] != mark.to(tl.int64)[:, None])
    if own_group is not None:
        label = tl.load(group + slots, mask=written, other=0).to(tl.int64)
        mark = tl.load(own_group + rows, mask=there, other=0).to(tl.int64)
        counts = counts & (label[None, :] == mark[:, None])
    if ceiling is not None:
        limit = tl.load(ceiling + rows, mask=there, other=0.0)[:, None]
        counts = counts & ~(scores > limit)  # NaN is not above it, so it shows
    if bias is not None:
        scores = scores - tl.load(bias + slots, mask=written, other=0.0)[None, :]
    return tl.where(counts, scores, -float("inf"))


@triton.jit
def _reduce(scores):
    """Return the highest score of each query, and the sum and all of exp(score - highest)."""
    top = tl.max(scores, 1)
    shares = tl.exp(scores - _finite(top)[:, None])
    return top, tl.sum(shares, 1), shares


@triton.jit
def _join(top, total, new_top, new_total):
    """Return the highest score and the sum of both; and what each one's sum was multiplied by."""
    both = tl.maximum(top, new_top)
    kept, added = tl.exp(top - _finite(both)), tl.exp(new_top - _finite(both))
    return both, total * kept + new_total * added, kept, added


@triton.jit
def _finite(top):
    """Return 0 where no slot counts: -inf minus -inf is NaN."""
    return tl.where(top == -float("inf"), 0.0, top)


@triton.jit
def _log(top, total):
    log = _finite(top) + tl.log(tl.where(total == 0.0, 1.0, total))
    return tl.where(total == 0.0, -float("inf"), log)


@triton.jit
def _add_rows(
    mean,
    kept,
    shares,
    unit,
    table,
    slots,
    written,
    column,
    D,
    READ: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Return mean (BLOCK_B, WIDTH) · kept + shares @ rows · unit. Empty slots' rows may be NaN."""
    d = column + tl.arange(0, WIDTH)
    place = (slots * D)[:, None] + d[None, :]
    row = tl.load(table + place, mask=written[:, None] & (d < D)[None, :], other=0)
    mean = mean * (kept / unit)[:, None]
    return tl.dot(shares, row.to(READ), mean, input_precision=PRECISION) * unit


@triton.jit
def _store_columns(means, values, rows, column, B, D, WIDTH: tl.constexpr):
    d = column + tl.arange(0, WIDTH)
    place = (rows * D)[:, None] + d[None, :]
    tl.store(means + place, values, mask=(rows < B)[:, None] & (d < D)[None, :])
