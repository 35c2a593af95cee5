"""EntroPO-KTO in two forms, and the reference points each form may use.

`authors` is what the authors' code computes, `corrected` is derived here. Shapes: B sequences, M mismatched ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from entropo.loss.preference import check_coefficients, check_shapes

Form = Literal["authors", "corrected"]
SumOverRanks = Callable[[Tensor], Tensor]


class KtoLoss(NamedTuple):
    """Per sequence, fp64, shape (B,): the loss (class weight included) and the reward, which carries no gradient."""

    loss: Tensor
    rewards: Tensor


def kto_loss(
    logps_B: Tensor,
    ref_B: Tensor,
    labels_B: Tensor,
    *,
    z: Tensor | float,
    beta: float,
    entropy_alpha: float,
    form: Form = "authors",
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> KtoLoss:
    """λ_D·(1 - σ(v)) where desirable, λ_U·(1 - σ(-v)) where not; the mean over all sequences is the KTO loss.

    `authors`: v = β·((s - r) - z), reward β·(s - r); α acts only through z (`authors_reference_point`).
    `corrected`: v = û - z0 with û = α·(s - r) + (α - β)·r, reward û. z is detached in both.
    Gradient: dL_D/ds = -λ_D·κ·σ'(v), dL_U/ds = +λ_U·κ·σ'(v) with κ = β (`authors`) or α (`corrected`); at most λ·κ/4.

    Args: s `logps_B`, r `ref_B`: summed log-probs, nats; `labels_B` bool, True = desirable; `z` one number.
    Raises: ValueError for non-positive coefficients, negative weights, wrong shapes or an unknown form.
    Source: KTO, arXiv 2402.01306; EntroPO, arXiv 2509.12434, whose trainer is `authors`; `corrected` is derived here.
    """
    check_coefficients(beta, entropy_alpha)
    check_shapes(logps_B=logps_B, ref_B=ref_B, labels_B=labels_B)
    _check_labels(labels_B)
    if desirable_weight < 0 or undesirable_weight < 0:
        raise ValueError(f"weights must be >= 0, got desirable {desirable_weight} and undesirable {undesirable_weight}")
    z = torch.as_tensor(z, dtype=torch.float64, device=logps_B.device).detach()
    if z.numel() != 1:
        raise ValueError(f"z must be one number per batch, got shape {tuple(z.shape)}")
    s_B, r_B = logps_B.double(), ref_B.detach().double()
    if form == "authors":
        rewards_B = beta * (s_B - r_B)
        value_B = beta * ((s_B - r_B) - z)
    elif form == "corrected":
        rewards_B = corrected_rewards(s_B, r_B, beta=beta, entropy_alpha=entropy_alpha)
        value_B = rewards_B - z
    else:
        raise ValueError(f"form={form!r} is unknown; use one of {list(get_args(Form))}")
    loss_B = torch.where(
        labels_B, desirable_weight * (1 - torch.sigmoid(value_B)), undesirable_weight * (1 - torch.sigmoid(-value_B))
    )
    return KtoLoss(loss_B, rewards_B.detach())


def corrected_rewards(logps_B: Tensor, ref_B: Tensor, *, beta: float, entropy_alpha: float) -> Tensor:
    """û = α·(s - r) + (α - β)·r, equal to α·s - β·r; in this form α = β is β·(s - r) bit for bit."""
    return entropy_alpha * (logps_B - ref_B) + (entropy_alpha - beta) * ref_B


def authors_reference_point(
    logps_M: Tensor, ref_M: Tensor, *, beta: float, entropy_alpha: float, sum_over_ranks: SumOverRanks | None = None
) -> Tensor:
    """z = max(0, mean(α·s' - β·r')) of `authors`: mean over the device batch, then over ranks; a detached fp64 scalar.

    s', r' belong to mismatched sequences. At θ = ref and α > β, α·s' - β·r' = (α - β)·r' < 0, so z = 0 and α does
    nothing until the policy gains more than (1 - β/α)·|r'| on them.
    """
    check_coefficients(beta, entropy_alpha)
    check_shapes(logps_M=logps_M, ref_M=ref_M)
    values_M = entropy_alpha * logps_M.detach().double() - beta * ref_M.detach().double()
    return _mean_over_ranks(values_M.mean(), sum_over_ranks).clamp_min(0.0)


def kl_z0(logps_M: Tensor, ref_M: Tensor, *, beta: float, sum_over_ranks: SumOverRanks | None = None) -> Tensor:
    """z0 = β·max(0, mean(s' - r')) over mismatched sequences: TRL's estimate of β·KL. Detached fp64 scalar."""
    check_shapes(logps_M=logps_M, ref_M=ref_M)
    gap = (logps_M.detach().double() - ref_M.detach().double()).mean()
    return beta * _mean_over_ranks(gap, sum_over_ranks).clamp_min(0.0)


def batch_mean_z0(rewards_B: Tensor, labels_B: Tensor, *, sum_over_ranks: SumOverRanks | None = None) -> Tensor:
    """z0 = ½·(mean of û over desirable + mean of û over undesirable) of the batch of all ranks; detached, not clamped.

    Raises: ValueError when the batch holds one label only.
    """
    check_shapes(rewards_B=rewards_B, labels_B=labels_B)
    _check_labels(labels_B)
    rewards_B, desirable_B = rewards_B.detach().double(), labels_B.double()
    sums = torch.stack(
        [
            (rewards_B * desirable_B).sum(),
            desirable_B.sum(),
            (rewards_B * (1 - desirable_B)).sum(),
            (1 - desirable_B).sum(),
        ]
    )
    if sum_over_ranks is not None:
        sums = sum_over_ranks(sums)
    if sums[1] == 0 or sums[3] == 0:
        raise ValueError(
            "reference_point='batch_mean' needs both labels in every batch, this one has one only; "
            "use a batch of at least 2 with both labels, or reference_point='ema'"
        )
    return (sums[0] / sums[1] + sums[2] / sums[3]) / 2


@dataclass
class RunningMean:
    """z0 of `ema`: exponential mean of û over past batches; works at batch 1. Checkpoint its `state_dict`."""

    decay: float = 0.9
    value: float | None = None

    def update(self, rewards_B: Tensor, *, sum_over_ranks: SumOverRanks | None = None) -> float:
        """Returns z0 for this batch (the mean before it; the first batch uses its own), then takes the batch in."""
        sums = torch.stack(
            [
                rewards_B.detach().double().sum(),
                torch.tensor(float(rewards_B.numel()), dtype=torch.float64, device=rewards_B.device),
            ]
        )
        if sum_over_ranks is not None:
            sums = sum_over_ranks(sums)
        mean = float(sums[0] / sums[1])
        z0 = mean if self.value is None else self.value
        self.value = mean if self.value is None else self.decay * self.value + (1 - self.decay) * mean
        return z0

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes; JSON numbers, exact."""
        return {"decay": self.decay, "value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on exactly where the saved mean stood."""
        self.decay, self.value = state["decay"], state["value"]


def _mean_over_ranks(value: Tensor, sum_over_ranks: SumOverRanks | None) -> Tensor:
    if sum_over_ranks is None:
        return value
    total = sum_over_ranks(torch.stack([value, torch.ones_like(value)]))
    return total[0] / total[1]


def _check_labels(labels_B: Tensor) -> None:
    if labels_B.dtype != torch.bool:
        raise ValueError(f"labels_B must be bool (True = desirable), got {labels_B.dtype}; compare with == 1")
