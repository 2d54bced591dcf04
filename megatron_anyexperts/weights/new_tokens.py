"""Continues with the tokenizer of released weights: tokens for media and chat are added, and rows for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from megatron_anyexperts.data.tokenizer import SPECIAL_TOKENS, adopt_tokenizer
from megatron_anyexperts.training.arguments import UsageError
from megatron_anyexperts.weights.families.rows import PREFIX, Mapped

MULTIPLE = 128
"""A vocabulary that grows becomes a multiple of this: such matrices multiply faster, and tensor parallelism divides
them. Rows beyond the last token are never a target."""

_GROWING = {f"{PREFIX}embedding.word_embeddings.weight", f"{PREFIX}output_layer.weight"}


@dataclass(frozen=True)
class Extended:
    """A tokenizer with every token of `SPECIAL_TOKENS`.

    Attributes:
        folder: where it lies, as a Hugging Face directory.
        known: ids of the tokens that it had.
        added: the new tokens and their ids.
        rows: rows of the embedding that it needs, at least those of the weights.
    """

    folder: Path
    known: Tensor
    added: Mapping[str, int]
    rows: int

    def grown(self, box: Mapped) -> Mapped:
        """A box of the embedding or the output layer with rows for the new tokens; any other as it is.

        New rows, and those that no token has, are the mean of the rows of the tokens that were known: a token that was
        never read then says no more than any other.
        """
        if box.key not in _GROWING:
            return box
        shape = (self.rows, *box.shape[1:])
        return replace(box, whole=shape, shape=shape, join=self._grow(box.join))

    def _grow(self, join: Callable[[Sequence[Tensor]], Tensor]) -> Callable[[Sequence[Tensor]], Tensor]:
        def grow(tensors: Sequence[Tensor]) -> Tensor:
            old_VH = join(tensors)
            known = self.known[self.known < len(old_VH)]
            mean_H = old_VH[known].float().mean(0).to(old_VH.dtype)
            grown_VH = mean_H.expand(self.rows, -1).clone()
            grown_VH[: len(old_VH)] = old_VH
            grown_VH[list(self.added.values())] = mean_H
            return grown_VH

        return grow

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """config.json, or the settings of generation, with the new size and the tokens that end and pad here."""
        ids = Tokenizer.from_file(str(self.folder / "tokenizer.json")).token_to_id
        ends = [ids(SPECIAL_TOKENS[role]) for role in ("end_of_text", "turn_end")]
        changed = {"eos_token_id": ends, "pad_token_id": ids(SPECIAL_TOKENS["pad"])}
        if "vocab_size" in config:
            changed["vocab_size"] = self.rows
        return {**config, **changed}

    def said(self, rows: int) -> str:
        """One line of what was done to weights of that many rows."""
        text = f"{len(self.added)} tokens added: {' '.join(self.added)}" if self.added else "all tokens were there"
        return f"{text}; rows {rows} -> {self.rows}, new ones the mean of the others"


def extend(source: Path, folder: Path, rows: int) -> Extended:
    """Add what the tokenizer of a Hugging Face directory lacks.

    Args:
        source: holds the tokenizer.
        folder: where the new one is written.
        rows: of the embedding of the weights.

    Raises:
        UsageError: there is no usable tokenizer.
    """
    try:
        added = adopt_tokenizer(source, folder)
    except ValueError as error:
        raise UsageError(f"--add-tokens: {error}") from error
    found = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    new = {token: found[token] for token in added}
    needed = max(found.values()) + 1
    size = rows if needed <= rows else -(-needed // MULTIPLE) * MULTIPLE
    known = torch.tensor(sorted(set(found.values()) - set(new.values())))
    return Extended(folder, known, new, size)
