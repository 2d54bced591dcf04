"""Keeps sampling and scoring to the tokens that the tokenizer knows."""

import torch

from megatron_anyexperts.data.vocabulary import Vocabulary


class KnownTokens:
    """Takes the columns out of logits that stand for no token: Megatron pads the output layer.

    Args:
        vocabulary: of the run.
    """

    def __init__(self, vocabulary: Vocabulary):
        self._ids = torch.tensor(sorted(vocabulary.ids()))
        self._unknown: torch.Tensor | None = None

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits [..., V] with minus infinity where there is no token: probability 0, and no part in a softmax."""
        if self._unknown is None:
            unknown = torch.ones(logits.size(-1), dtype=torch.bool)
            unknown[self._ids] = False
            self._unknown = unknown.nonzero()[:, 0].to(logits.device)
        return logits.index_fill(-1, self._unknown, -torch.inf)
