"""Triton kernels that score slots and reduce the scores in registers.

With TRITON_INTERPRET=1 in the environment NumPy runs them; Triton reads that when it is imported.
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
    D: tl.constexpr,
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
    row, slot = at.to(tl.int64) * BLOCK_B, block.to(tl.int64) * BLOCK
    there = tl.arange(0, BLOCK_B) < B - row
    written = _written(age, slot, C, EMPTY, BLOCK)
    scores = _scores(
        queries, table, query_scale, row_scale, bias, ids, own_ids, group, own_group, ceiling,
        row, slot, there, written, D, places, OPERAND, PRECISION, BLOCK_B, BLOCK, BLOCK_K,
    )  # fmt: skip
    top, total, _ = _reduce(scores)
    _store(weights + block.to(tl.int64) * B + row, _log(top, total), there, BLOCK_B)


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
    stretch,
    D: tl.constexpr,
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
    WHOLE: tl.constexpr = D % (FIRST + SECOND) == 0
    tiles, parts = tl.cdiv(B, BLOCK_B), tl.cdiv(D, FIRST + SECOND)
    at, part = tl.program_id(0) % tiles, tl.program_id(0) // tiles % parts
    split = (tl.program_id(0) // tiles // parts).to(tl.int64)
    row = at.to(tl.int64) * BLOCK_B
    there = tl.arange(0, BLOCK_B) < B - row
    column = part * (FIRST + SECOND)
    top = tl.full((BLOCK_B,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_B,), tl.float32)
    unit = tl.full((BLOCK_B,), 1.0, tl.float32)
    first = tl.zeros((BLOCK_B, FIRST), tl.float32)
    # Not used without a second part, but a name must have a value.
    second = tl.zeros((BLOCK_B, max(SECOND, 1)), tl.float32)
    for block in range(split * stretch, tl.minimum((split + 1) * stretch, tl.cdiv(C, BLOCK))):
        block_top = tl.full((BLOCK_B,), -float("inf"), tl.float32)
        block_total = tl.zeros((BLOCK_B,), tl.float32)
        for offset in range(0, BLOCK, BLOCK_N):
            slot = block * BLOCK + offset
            written = _written(age, slot, C, EMPTY, BLOCK_N)
            scores = _scores(
                queries, table, query_scale, row_scale, bias, ids, own_ids, group, own_group,
                ceiling, row, slot, there, written, D, places, OPERAND, PRECISION, BLOCK_B,
                BLOCK_N, BLOCK_K,
            )  # fmt: skip
            new_top, new_total, shares = _reduce(scores)
            block_top, block_total, _, _ = _join(block_top, block_total, new_top, new_total)
            top, total, kept, added = _join(top, total, new_top, new_total)
            shares = shares * added[:, None]
            if row_scale is not None:
                # Rows stay integers. A query's shares are divided by the largest of them so far,
                # which keeps half types in their range, however far apart the scales are.
                shares = shares * _load(row_scale + slot, written, BLOCK_N)[None, :]
                largest = tl.maximum(unit * kept, tl.max(tl.abs(shares), 1))
                some = tl.where(largest == 0.0, 1.0, largest)
                kept, unit = unit * kept / some, largest
                shares = shares / some[:, None]
            shares = shares.to(ROUNDED).to(READ)
            rows = table + slot * D + column
            first = _add_rows(
                first, kept, shares, rows, written, D - column, D, WHOLE, READ, PRECISION,
                BLOCK_N, FIRST,
            )  # fmt: skip
            if SECOND:
                second = _add_rows(
                    second, kept, shares, rows + FIRST, written, D - column - FIRST, D, WHOLE,
                    READ, PRECISION, BLOCK_N, SECOND,
                )  # fmt: skip
        if part == 0:
            _store(weights + block * B + row, _log(block_top, block_total), there, BLOCK_B)
    if part == 0:
        _store(logs + split * B + row, _log(top, total), there, BLOCK_B)
    share = 1.0 / tl.where(total == 0.0, 1.0, total)[:, None]
    means += (split * B + row) * D + column
    _store_columns(means, first * share * unit[:, None], there, D - column, D, BLOCK_B, FIRST)
    if SECOND:
        left = D - column - FIRST
        _store_columns(
            means + FIRST, second * share * unit[:, None], there, left, D, BLOCK_B, SECOND
        )


@triton.jit
def _written(age, slot, C, EMPTY: tl.constexpr, BLOCK_N: tl.constexpr):
    n = tl.arange(0, BLOCK_N)
    return tl.load(age + slot + n, mask=n < C - slot, other=EMPTY) != EMPTY


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
    row,
    slot,
    there,
    written,
    D: tl.constexpr,
    places: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Return the scores (BLOCK_B, BLOCK_N) of some queries and slots, -inf where one is left out.

    row and slot, the first of them, are int64: a table can have more than 2**31 numbers. From
    there on offsets are int32, which takes half the registers.
    """
    WHOLE: tl.constexpr = D % BLOCK_K == 0
    ACCUMULATOR: tl.constexpr = tl.int32 if tl.int8 == OPERAND else tl.float32
    products = tl.zeros((BLOCK_B, BLOCK_N), ACCUMULATOR)
    for k in range(0, D, BLOCK_K):
        left = _tile(queries + row * D + k, there, D - k, D, WHOLE, BLOCK_B, BLOCK_K)
        right = _tile(table + slot * D + k, written, D - k, D, WHOLE, BLOCK_N, BLOCK_K)
        products = tl.dot(
            left.to(OPERAND),
            tl.trans(right.to(OPERAND)),
            products,
            input_precision=PRECISION,
            out_dtype=ACCUMULATOR,
        )
    scores = products.to(tl.float32)
    if query_scale is not None:
        scores = scores * _load(query_scale + row, there, BLOCK_B)[:, None]
    if row_scale is not None:
        scores = scores * _load(row_scale + slot, written, BLOCK_N)[None, :]
    counts = there[:, None] & written[None, :]
    for key in tl.static_range(len(places)):
        label = _load(ids[key] + slot, written, BLOCK_N).to(tl.int64)
        marks = own_ids[key] + row * places[key] + tl.arange(0, BLOCK_B) * places[key]
        for place in range(places[key]):
            mark = tl.load(marks + place, mask=there, other=0).to(tl.int64)
            counts = counts & (mark[:, None] != label[None, :])
    if own_group is not None:
        label = _load(group + slot, written, BLOCK_N).to(tl.int64)
        mark = _load(own_group + row, there, BLOCK_B).to(tl.int64)
        counts = counts & (mark[:, None] == label[None, :])
    if ceiling is not None:
        limit = _load(ceiling + row, there, BLOCK_B)[:, None]
        counts = counts & ~(scores > limit)  # NaN is not above it, so it shows
    if bias is not None:
        scores = scores - _load(bias + slot, written, BLOCK_N)[None, :]
    return tl.where(counts, scores, -float("inf"))


@triton.jit
def _load(first, mask, SIZE: tl.constexpr):
    return tl.load(first + tl.arange(0, SIZE), mask=mask, other=0)


@triton.jit
def _store(first, values, mask, SIZE: tl.constexpr):
    tl.store(first + tl.arange(0, SIZE), values, mask=mask)


@triton.jit
def _tile(
    first,
    mask,
    left,
    D: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Return (ROWS, COLUMNS) of a matrix with D columns, 0 outside; `left` columns are there.

    WHOLE says that there are always COLUMNS.
    """
    place = tl.arange(0, ROWS)[:, None] * D + tl.arange(0, COLUMNS)[None, :]
    mask = mask[:, None]
    if not WHOLE:
        mask = mask & (tl.arange(0, COLUMNS) < left)[None, :]
    return tl.load(first + place, mask=mask, other=0)


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
    table,
    written,
    left,
    D: tl.constexpr,
    WHOLE: tl.constexpr,
    READ: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Return mean (BLOCK_B, WIDTH) · kept + shares @ rows. Empty slots' rows may be NaN."""
    rows = _tile(table, written, left, D, WHOLE, BLOCK_N, WIDTH).to(READ)
    return tl.dot(shares, rows, mean * kept[:, None], input_precision=PRECISION)


@triton.jit
def _store_columns(
    first, values, mask, left, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    place = tl.arange(0, ROWS)[:, None] * D + tl.arange(0, COLUMNS)[None, :]
    mask = mask[:, None] & (tl.arange(0, COLUMNS) < left)[None, :]
    tl.store(first + place, values, mask=mask)
