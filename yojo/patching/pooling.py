"""Poolings: the final hidden states of one response -> the one vector its score is made from."""

import torch

from yojo_kernels.reference import accumulation_dtype

# These read one row, which the value head gathers for itself.
ONE_ROW = ("separator", "last", "first")
# These do not ask where a response begins, which ordinary [B, L] inputs do not say.
BY_END = ("separator", "last")


def width(pooling, hidden_size):
    """Length of the pooled vector."""
    return 2 * hidden_size if pooling == "first_last_concat" else hidden_size


def rows_read(pooling, first, separator):
    """The rows that a pooling reads of one response.

    Args:
        pooling: as in `YojoConfig`.
        first: row of the response's first token; None where it is unknown, for the poolings of `BY_END`.
        separator: row of the separator that closes it, so that its last token stands one row before.

    Returns:
        list of ints: one row; two, first and last token (the same one twice for a response of one token); or, for
        "response_mean", every row of the response.
    """
    if pooling == "separator":
        return [separator]
    if pooling == "last":
        return [separator - 1]
    if pooling == "first":
        return [first]
    if pooling == "response_mean":
        return list(range(first, separator))
    return [first, separator - 1]


def pool(hidden, rows, pooling, lengths=None):
    """Pool every reading of a batch, in float32 whatever the dtype of hidden (float64 for float64).

    Only rows are read, so hidden may as well hold nothing else: `pool(hidden, rows, ...)` is
    `pool(hidden[rows], torch.arange(len(rows)), ...)`.

    Args:
        hidden: [T, H] float.
        rows: [R] int64, what `rows_read` gives for each reading, reading after reading.
        pooling: as in `YojoConfig`.
        lengths: [Q] int64, rows of each of the Q readings, none 0; needed by "response_mean" alone.

    Returns:
        [Q, H] float32, [Q, 2H] for "first_last_concat". A reading's vector depends on its own rows alone: it has the
        same bits wherever they stand, and at every launch.
    """
    values = hidden[rows]
    if pooling == "response_mean":
        return _SegmentMean.apply(values, lengths)
    values = values.to(accumulation_dtype(values.dtype))
    if pooling in ONE_ROW:
        return values
    first, last = values.view(-1, 2, hidden.shape[1]).unbind(dim=1)
    if pooling == "first_last_concat":
        return torch.cat([first, last], dim=1)
    return first + last if pooling == "first_last_add" else last - first


class _SegmentMean(torch.autograd.Function):
    """Means of consecutive runs of rows: values [R, H], lengths [Q], which sum to R -> [Q, H].

    The sum runs in float64, so that the mean is right to the last bit of float32 however long the response. A function
    of its own because segment_reduce would keep the float64 values for a backward that does not need them.
    """

    @staticmethod
    def forward(ctx, values, lengths):
        ctx.save_for_backward(lengths)
        ctx.num_rows, ctx.dtype = values.shape[0], values.dtype
        # unsafe: no check of the lengths, which would wait for the device.
        means = torch.segment_reduce(values.double(), "mean", lengths=lengths, unsafe=True)
        return means.to(accumulation_dtype(values.dtype))

    @staticmethod
    def backward(ctx, gradient):
        (lengths,) = ctx.saved_tensors
        share = (gradient / lengths[:, None]).to(ctx.dtype)
        return share.repeat_interleave(lengths, dim=0, output_size=ctx.num_rows), None
