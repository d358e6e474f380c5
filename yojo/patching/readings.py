"""Where the scores of a batch are read, and whose they are."""

import dataclasses

import torch

from yojo.patching import pooling as poolings


@dataclasses.dataclass(frozen=True, eq=False)
class Separators:
    """Where the scores of a batch are read, and whose they are.

    Attributes:
        rows: [M, K] int64, row of each response's separator in every branch that holds it.
        weights: [M, K] float32, the weight of each reading in the response's score; they sum to 1 over K.
        cells: [M] int64, index of each response in the flattened [S, Nmax] scores.
        offsets: [S + 1] int32, sample s owns the responses offsets[s]:offsets[s + 1].
        width: Nmax, the most responses any sample has.
        read_counts: S ints, how many of the rows that are read belong to each sample; known without asking the device.
        pooling: the pooling that tokens and lengths are for.
        tokens: [R] int64, the rows of response tokens that the pooling reads, reading after reading; None for the
            pooling "separator", which reads rows.
        lengths: [M * K] int64, how many of them belong to each reading; None unless the pooling is "response_mean".
    """

    rows: torch.Tensor
    weights: torch.Tensor
    cells: torch.Tensor
    offsets: torch.Tensor
    width: int
    read_counts: tuple[int, ...]
    pooling: str = "separator"
    tokens: torch.Tensor | None = None
    lengths: torch.Tensor | None = None

    @staticmethod
    def build(spans, pooling="separator", device=None):
        """From where the responses stand.

        Args:
            spans: per sample and response a list of (row of its first token, row of its separator), one pair for each
                branch that holds it; the first may be None for the poolings of `yojo.patching.pooling.BY_END`.
            pooling: as in `YojoConfig`.
            device: where the tensors go.
        """
        counts = [len(sample) for sample in spans]
        flat = [response for sample in spans for response in sample]
        most = max(map(len, flat))
        width = max(counts)
        cells = [s * width + n for s, count in enumerate(counts) for n in range(count)]
        # A response that fewer branches hold fills the table up with its first reading, which then weighs nothing.
        full = [[response + response[:1] * (most - len(response)) for response in sample] for sample in spans]
        read = [[poolings.rows_read(pooling, *span) for response in sample for span in response] for sample in full]
        readings = [rows for sample in read for rows in sample]
        tokens = lengths = None
        if pooling != "separator":
            tokens = torch.tensor([row for rows in readings for row in rows], device=device)
            if pooling == "response_mean":
                lengths = torch.tensor([len(rows) for rows in readings], device=device)
        return Separators(
            rows=torch.tensor([[row for _, row in response] for sample in full for response in sample], device=device),
            weights=torch.tensor(
                [[1.0 / len(response)] * len(response) + [0.0] * (most - len(response)) for response in flat],
                device=device,
            ),
            cells=torch.tensor(cells, device=device),
            offsets=torch.tensor([0, *counts], device=device).cumsum(0).to(torch.int32),
            width=width,
            read_counts=tuple(sum(map(len, sample)) for sample in read),
            pooling=pooling,
            tokens=tokens,
            lengths=lengths,
        )

    @property
    def read(self):
        """[R] int64: every row of the final hidden states that is read; one may appear several times."""
        return self.rows.flatten() if self.tokens is None else self.tokens

    @property
    def num_samples(self):
        """S, the samples of the batch."""
        return self.offsets.shape[0] - 1

    def to(self, device, non_blocking=False):
        """The same on another device (itself if it is there already)."""
        device = torch.device(device)
        if self.rows.device == device:
            return self
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self):
        """The same in page-locked memory; DataLoader(pin_memory=True) calls this."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function):
        names = ["rows", "weights", "cells", "offsets"]
        names += [name for name in ("tokens", "lengths") if getattr(self, name) is not None]
        return dataclasses.replace(self, **{name: function(getattr(self, name)) for name in names})
