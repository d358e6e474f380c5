"""Which tile tables a call of the attention kernels asks for: said once, for the call and for who makes them before it."""

from yojo_kernels import tuning


def tables_for(layout, machine, dtype, head_dim, num_heads, num_key_heads, window=None, gradients=False, capped=False,
               forward="forward"):  # fmt: skip
    """The tables of one call.

    Args:
        layout: `Layout` of the row.
        machine: `tuning.Machine` the call will run on.
        dtype: of query, key and value.
        head_dim: theirs.
        num_heads, num_key_heads: heads of the query, and of key and value.
        window: sliding window, or None.
        gradients: whether a backward may follow.
        capped: whether scores have a soft cap.
        forward: the kernel of the forward, "forward" or "gluon_forward".

    Returns:
        (key of the forward's query tiles, of the backward's or None, of its key tiles or None), each as
        `Layout.table` takes it.
    """
    group = num_heads // num_key_heads
    tile = tuning.tile_on(machine.chip, forward, head_dim, dtype)
    packed = tuning.packed_on(group, tile.block_m) if forward == "forward" else 1
    query_tiles = "query_tiles", (tile.block_m // packed, tile.block_n, window or 0)
    if not gradients:
        return query_tiles, None, None
    by_query = tuning.tile_on(machine.chip, "query_grad", head_dim, dtype, capped)
    by_key = tuning.tile_on(machine.chip, "key_grad", head_dim, dtype, capped)
    extra = max(1, tuning.PIECES_PER_PROCESSOR * machine.processors // num_key_heads)
    return (
        query_tiles,
        ("query_tiles", (by_query.block_m, by_query.block_n, window or 0)),
        ("key_tiles", (by_key.block_m, by_key.block_n, extra, group, window or 0)),
    )
