"""Losses and token log-probabilities as pure functions of tensors; needs torch only.

Knows no config, tokenizer or trainer: it works inside TRL or a bare loop.
"""

from entropo.loss.kto import RunningMean, authors_reference_point, batch_mean_z0, kl_z0, kto_loss
from entropo.loss.logps import TokenStats, available_impls, sequence_sums, token_stats
from entropo.loss.preference import DpoLoss, dpo_loss, nll_term, pair_offset

__all__ = [
    "DpoLoss",
    "RunningMean",
    "TokenStats",
    "authors_reference_point",
    "available_impls",
    "batch_mean_z0",
    "dpo_loss",
    "kl_z0",
    "kto_loss",
    "nll_term",
    "pair_offset",
    "sequence_sums",
    "token_stats",
]
