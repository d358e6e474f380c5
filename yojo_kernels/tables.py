"""Which tile tables a call of the attention kernels asks for: said once, for the call and for who makes them before it."""

from yojo_kernels import tuning


def tables_for(layout, machine, dtype, head_dim, num_heads, num_key_heads, window=None, gradients=False, capped=False):
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

    Returns:
        (key of the forward's query tiles, of the backward's or None, of its key tiles or None), each as
        `Layout.table` takes it.
    """
    forward = tuning.tile_on(machine, "forward", head_dim, dtype)
    group = num_heads // num_key_heads
    tokens = forward.block_m // tuning.packed_heads(group, forward.block_m)
    query_tiles = "query_tiles", (tokens, forward.block_n, window or 0)
    if not gradients:
        return query_tiles, None, None
    by_query = tuning.tile_on(machine, "query_grad", head_dim, dtype, capped)
    by_key = tuning.tile_on(machine, "key_grad", head_dim, dtype, capped)
    extra = max(1, tuning.PIECES_PER_PROCESSOR * machine.processors // num_key_heads)
    return (
        query_tiles,
        ("query_tiles", (by_query.block_m, by_query.block_n, window or 0)),
        ("key_tiles", (by_key.block_m, by_key.block_n, extra, group, window or 0)),
    )
