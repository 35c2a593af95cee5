"""EntroPO-DPO: the pair loss, its offset modes and the optional likelihood term.

Pure functions of summed log-probs; how those are computed is `logps`. Shapes: B pairs, all values in nats.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

Offset = Literal["full", "length_normalised", "centred", "none"]


class DpoLoss(NamedTuple):
    """Per pair, fp64, shape (B,). margin = rewards_chosen - rewards_rejected; only `loss` carries a gradient."""

    loss: Tensor
    rewards_chosen: Tensor
    rewards_rejected: Tensor
    margin: Tensor
    offset: Tensor


def dpo_loss(
    logps_chosen_B: Tensor,
    logps_rejected_B: Tensor,
    ref_chosen_B: Tensor,
    ref_rejected_B: Tensor,
    *,
    beta: float,
    entropy_alpha: float,
    offset: Offset = "full",
    label_smoothing: float = 0.0,
    num_chosen_B: Tensor | None = None,
    num_rejected_B: Tensor | None = None,
    mean_ref_margin: float | None = None,
) -> DpoLoss:
    """-(1-ε)·log σ(m) - ε·log σ(-m) with m = α·(Δs - Δr) + offset; `full` gives the paper's m = α·Δs - β·Δr.

    Δs = s_w - s_l (policy), Δr = r_w - r_l (reference), α = `entropy_alpha`, β = `beta`, ε = `label_smoothing`.
    Written as DPO(α) plus an offset that is exactly 0 at α = β, so that case is DPO bit for bit. Gradient:
    dL/ds_w = -α·(σ(-m) - ε), dL/ds_l = +α·(σ(-m) - ε). Implicit reward: α·s - β·r (mode `full`).

    Args:
        logps_chosen_B, logps_rejected_B: s, sums over trained tokens, shape (B,).
        ref_chosen_B, ref_rejected_B: r, the same sums under the reference; no gradient flows into them.
        offset: `full` (α-β)·Δr | `length_normalised` (α-β)·N̄·(r̄_w - r̄_l) | `centred` (α-β)·(Δr - mean Δr) | `none` 0.
        num_chosen_B, num_rejected_B: trained tokens N, for `length_normalised`.
        mean_ref_margin: mean Δr over the training set, for `centred`.
    Raises: ValueError when beta or entropy_alpha <= 0, label_smoothing is outside [0, 1/2), shapes differ or a mode
        lacks its input.
    Source: EntroPO, arXiv 2509.12434; α = β is DPO, arXiv 2305.18290. The offset form is this project's derivation.
    """
    check_coefficients(beta, entropy_alpha)
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must lie in [0, 0.5), got {label_smoothing}")
    check_shapes(
        logps_chosen_B=logps_chosen_B,
        logps_rejected_B=logps_rejected_B,
        ref_chosen_B=ref_chosen_B,
        ref_rejected_B=ref_rejected_B,
    )
    s_w, s_l = logps_chosen_B.double(), logps_rejected_B.double()
    r_w, r_l = ref_chosen_B.detach().double(), ref_rejected_B.detach().double()
    offset_w, offset_l = pair_offset(
        r_w,
        r_l,
        beta=beta,
        entropy_alpha=entropy_alpha,
        mode=offset,
        num_chosen_B=num_chosen_B,
        num_rejected_B=num_rejected_B,
        mean_ref_margin=mean_ref_margin,
    )
    offset_B = offset_w - offset_l
    margin_B = entropy_alpha * ((s_w - r_w) - (s_l - r_l)) + offset_B
    loss_B = -logsigmoid(margin_B)
    if label_smoothing:
        loss_B = (1 - label_smoothing) * loss_B - label_smoothing * logsigmoid(-margin_B)
    return DpoLoss(
        loss_B,
        (entropy_alpha * (s_w - r_w) + offset_w).detach(),
        (entropy_alpha * (s_l - r_l) + offset_l).detach(),
        margin_B.detach(),
        offset_B,
    )


def pair_offset(
    ref_chosen_B: Tensor,
    ref_rejected_B: Tensor,
    *,
    beta: float,
    entropy_alpha: float,
    mode: Offset,
    num_chosen_B: Tensor | None = None,
    num_rejected_B: Tensor | None = None,
    mean_ref_margin: float | None = None,
) -> tuple[Tensor, Tensor]:
    """What EntroPO adds to DPO(α), split between the two rewards: offset = first - second, shape (B,) each.

    Constant in training; ref_w - ref_l is dominated by length: Δr = N̄(r̄_w - r̄_l) + (N_w - N_l)(r̄_w + r̄_l)/2.
    """
    gap = entropy_alpha - beta
    if mode == "full":
        return gap * ref_chosen_B, gap * ref_rejected_B
    if mode == "none":
        return torch.zeros_like(ref_chosen_B), torch.zeros_like(ref_rejected_B)
    if mode == "centred":
        if mean_ref_margin is None:
            raise ValueError(
                "offset='centred' needs mean_ref_margin, the mean of ref_chosen - ref_rejected over the training set"
            )
        return gap * (ref_chosen_B - mean_ref_margin / 2), gap * (ref_rejected_B + mean_ref_margin / 2)
    if mode == "length_normalised":
        if num_chosen_B is None or num_rejected_B is None:
            raise ValueError(
                "offset='length_normalised' needs num_chosen_B and num_rejected_B, the trained tokens per sequence"
            )
        if bool((num_chosen_B <= 0).any()) or bool((num_rejected_B <= 0).any()):
            raise ValueError("num_chosen_B and num_rejected_B must be positive; drop rows without a trained token")
        mean_B = (num_chosen_B + num_rejected_B).to(ref_chosen_B.dtype) / 2
        return gap * mean_B * (ref_chosen_B / num_chosen_B), gap * mean_B * (ref_rejected_B / num_rejected_B)
    raise ValueError(f"offset={mode!r} is unknown; use one of {list(get_args(Offset))}")


def nll_term(logps_B: Tensor, num_trained_B: Tensor) -> Tensor:
    """-s/N per sequence, (B,): the likelihood term that `sft_weight` adds for the chosen sequence."""
    check_shapes(logps_B=logps_B, num_trained_B=num_trained_B)
    return -logps_B.double() / num_trained_B


def check_coefficients(beta: float, entropy_alpha: float) -> None:
    """Raises: ValueError unless both are positive. entropy_alpha < beta is allowed: it sharpens, not diversifies."""
    if not beta > 0:
        raise ValueError(f"beta must be > 0, got {beta}")
    if not entropy_alpha > 0:
        raise ValueError(f"entropy_alpha must be > 0, got {entropy_alpha}; entropy_alpha=beta is plain DPO or KTO")


def check_shapes(**tensors: Tensor) -> None:
    """Raises: ValueError unless every tensor has one axis of the same length >= 1."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) != 1 or any(len(shape) != 1 or shape[0] == 0 for shape in shapes.values()):
        raise ValueError(f"expected tensors of one shape (B,) with B >= 1, got {shapes}")
