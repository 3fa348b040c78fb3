"""What a model says of texts that are there: log-probabilities of their tokens, perplexity."""

from .score import Score, ScoringMixin

__all__ = ["Score", "ScoringMixin"]
