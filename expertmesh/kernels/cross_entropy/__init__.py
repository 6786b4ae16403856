"""A language model's output layer and loss at once, without the logits of all tokens."""

from expertmesh.kernels.cross_entropy.chunked import linear_cross_entropy
from expertmesh.kernels.cross_entropy.reference import CrossEntropy, token_loss

__all__ = ["CrossEntropy", "linear_cross_entropy", "token_loss"]
