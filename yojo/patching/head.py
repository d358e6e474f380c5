"""The value head."""

import math

import torch

from yojo.patching import pooling as poolings
from yojo_kernels import score_head


class ScoreHead(torch.nn.Module):
    """The value head: final hidden states, pooled -> one float32 score per reading.

    Its weights are plain parameters rather than Linear layers, so that neither quantisation nor
    `LoraConfig(target_modules="all-linear")` takes hold of them. With them lives `separator_delta` [H], what training
    adds to the separator's embedding (see `yojo.patching.separator`).
    """

    def __init__(self, hidden_size, config):
        super().__init__()
        width = poolings.width(config.pooling, hidden_size)
        if config.head == "mlp":
            self.weight1 = torch.nn.Parameter(torch.empty(config.head_dim, width))
            self.bias1 = torch.nn.Parameter(torch.zeros(config.head_dim))
            torch.nn.init.normal_(self.weight1, std=0.01)
            width = config.head_dim
        else:
            self.weight1 = self.bias1 = None
        self.weight2 = torch.nn.Parameter(torch.empty(1, width))
        self.bias2 = torch.nn.Parameter(torch.zeros(1))
        torch.nn.init.normal_(self.weight2, std=0.01)
        self.separator_delta = torch.nn.Parameter(torch.zeros(hidden_size))
        self.pooling = config.pooling
        self.activation = config.activation
        self.scale = math.sqrt(hidden_size) if config.scale_scores else 1.0

    def forward(self, hidden, rows, lengths=None):
        """Score every reading: hidden [T, H], rows [R] int64 and lengths as `Separators` has them -> [Q] float32.

        With a pooling that reads one row, R = Q and the head gathers the rows itself.
        """
        if self.pooling not in poolings.ONE_ROW:
            hidden = poolings.pool(hidden, rows, self.pooling, lengths)
            rows = torch.arange(hidden.shape[0], device=hidden.device)
        return score_head(
            hidden,
            rows,
            self.weight1,
            self.bias1,
            self.weight2,
            self.bias2,
            activation=self.activation,
            scale=self.scale,
        )
