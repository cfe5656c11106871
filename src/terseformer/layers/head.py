"""From the last hidden vector to the logits: dense, tied, multiplicative, and a training mixture."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from terseformer import config as c
from terseformer.layers.initializers import dense
from terseformer.layers.projection import Multiplicative


class TiedHead(nn.Module):
    """Logits by the embedding's own matrix, without bias."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.weight = embedding.weight

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
        return F.linear(x, self.weight)


class MixedHead(nn.Module):
    """A sparse and a dense head: training calls use the sparse one with `sparse_prob`, others always.

    Source: `SparseDenseWithOptions` with `prob_sparse` of the reference.
    """

    def __init__(self, sparse: nn.Module, dense_head: nn.Module, sparse_prob: float) -> None:
        super().__init__()
        self.sparse, self.dense, self.sparse_prob = sparse, dense_head, sparse_prob

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
        if self.training and torch.rand((), device="cpu").item() >= self.sparse_prob:
            return self.dense(x)
        return self.sparse(x)


def language_model_head(config: c.HeadConfig, hidden_size: int, embedding: nn.Embedding) -> nn.Module:
    """The head that a configuration names."""
    vocab_size = embedding.num_embeddings
    if isinstance(config, c.DenseHeadConfig):
        return TiedHead(embedding) if config.tied else dense(hidden_size, vocab_size)
    sparse = Multiplicative(hidden_size, vocab_size, config.head_modules, config.gates_std)
    if config.sparse_prob == 1:
        return sparse
    return MixedHead(sparse, dense(hidden_size, vocab_size), config.sparse_prob)
