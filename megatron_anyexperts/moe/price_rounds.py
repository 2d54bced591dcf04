"""How margins are counted, and what each round of prices aims at: see `prices.py`."""

import torch
from torch import Tensor

# Rounds that aim at the cap; then, only while a rank is over it, rounds that aim lower by SLACK slots (of 2048).
FREE_ROUNDS = 3
SLACK = (0, 1, 3, 6)
ROUNDS = FREE_ROUNDS + len(SLACK)
# The shift is what counts while more than one slot of so many is over the cap, or where this lasts.
SHIFT_FROM, SHIFT_ROUND = 8192, 5
# Two bins to each power of two, from 2**-27 to 2**5, of either sign: the bits of a float without the lower 22.
LEVELS = 64
FIRST_LEVEL = 2 * (127 - 27)
# Equal values are told apart by at most this share of them, so that tokens that are all alike can be divided.
RELATIVE, ABSOLUTE = 2.0**-12, 2.0**-20


def aim_at(cap: int, slots: int, ranks: int, number: int) -> int:
    """Slots that a rank shall keep after a round: at first all it may, then ever fewer, so that a few too many fit."""
    late = number - FREE_ROUNDS
    return cap if late < 0 else max(-(-slots // ranks), cap - SLACK[late] * (1 + cap // 2048))


def shift_from(slots: int, number: int) -> int:
    """There is a shift when so many times the slots over the cap are more than `slots`."""
    return SHIFT_FROM if number < SHIFT_ROUND else slots + 1


def edges(device: torch.device) -> Tensor:
    """fp64 [B + 1], lower edges of the bins, and the upper one of the last."""
    bits = torch.arange(FIRST_LEVEL + 1, FIRST_LEVEL + LEVELS + 1, dtype=torch.int32, device=device) << 22
    positive = bits.view(torch.float32).double()
    return torch.cat((-positive.flip(0), torch.zeros_like(positive[:1]), positive))
