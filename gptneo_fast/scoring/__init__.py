"""What a model says of texts that are there: log-probabilities of their tokens, perplexity, embeddings."""

from .embed import EmbeddingMixin
from .score import Score, ScoringMixin

__all__ = ["EmbeddingMixin", "Score", "ScoringMixin"]
