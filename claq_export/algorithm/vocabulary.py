"""How often text uses each row of a vocabulary, and what that means for fitting its codebooks.

A few thousand tokens make up most of a text, and a language model gives them most of its probability, while all rows of a
vocabulary share the codebook of a column. So rows count in its k-means by how often they are used (``docs/algorithm.md``).
"""

from __future__ import annotations

import torch


def token_probability(frequency: torch.Tensor) -> torch.Tensor:
    """float64 ``[N]``: the chance of each row in text like that which was counted; sums to 1.

    Of tokens that were not seen there are as many to come as there were tokens seen once (Good and Turing's estimate); they
    are shared out evenly over all rows.

    Args:
        frequency: int ``[N]``, how often each row was used; all 0: nothing is known, and all are alike.
    """
    rows, total = frequency.numel(), int(frequency.sum())
    if not total:
        return torch.full((rows,), 1 / rows, dtype=torch.float64, device=frequency.device)
    unseen = max(int((frequency == 1).sum()), 1) / (total + 1)
    return (1 - unseen) * frequency.to(torch.float64) / total + unseen / rows
