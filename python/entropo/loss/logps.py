"""Per-token log-probabilities and entropies of a linear head: the one public function, its checks and its dispatch.

Holds no tiling; that is `chunked`. Shapes: N trained tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from entropo.loss.chunked import chunked_stats

Stats = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class TokenStats(NamedTuple):
    """Shape of `targets` each, nats, fp32 (fp64 for fp64 inputs); exactly 0 where the mask is False."""

    logps: Tensor
    entropies: Tensor


def token_stats(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, mask: Tensor | None = None, impl: str = "auto"
) -> TokenStats:
    """log p(y_t) and the entropy H_t of p = softmax(W x_t) for every trained position t.

    z = W x, log p_y = z_y - log Σ e^z, H = -Σ p log p. Gradients: dlog p_y/dz = onehot(y) - p and
    dH/dz_j = -p_j (log p_j + H), into `hidden` and, where it asks for one, `weight`. Trained positions are gathered
    before the head; everything is accumulated in fp32 whatever the input type and whatever autocast says.

    Args:
        hidden: (..., H), the last hidden states; position t predicts `targets[t]` (the caller shifts by one).
        weight: (V, H), the head's matrix, no bias.
        targets: (...) int64; ids at masked positions are never read.
        mask: (...) bool, True = trained; None trains every position.
        impl: `torch` (full logits, the plain oracle), `chunked` (bounded memory), or `auto`.
    Raises: ValueError that says which argument to change, also for an `impl` that is not available here.
    Source: softmax calculus; precision rules in docs/method.md, "Log-probs and entropy".
    """
    _check(hidden, weight, targets, mask)
    stats = _implementation(impl)
    selected_N = torch.ones_like(targets, dtype=torch.bool) if mask is None else mask
    hidden_NH, targets_N = hidden[selected_N], targets[selected_N]
    if targets_N.device.type == "cpu" and targets_N.numel():
        _check_ids(targets_N, weight.shape[0])
    with torch.autocast(device_type=hidden.device.type, enabled=False):
        logps_N, entropies_N = stats(hidden_NH, weight, targets_N)
    return TokenStats(_scatter(logps_N, selected_N), _scatter(entropies_N, selected_N))


def sequence_sums(per_token: Tensor) -> Tensor:
    """Sums the last axis in fp64, in a fixed order: (B, L) -> (B,). In fp32, thousands of terms cost 1e-3 nat."""
    return per_token.double().sum(dim=-1)


def torch_stats(hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """The oracle: full logits, autograd, nothing clever. Memory 4·N·V bytes and more."""
    kind = torch.promote_types(torch.promote_types(hidden_NH.dtype, weight_VH.dtype), torch.float32)
    logq_NV = torch.log_softmax(hidden_NH.to(kind) @ weight_VH.to(kind).T, dim=-1)
    logps_N = logq_NV.gather(1, targets_N[:, None])[:, 0]
    return logps_N, -(logq_NV.exp() * logq_NV).sum(dim=-1)


IMPLEMENTATIONS: dict[str, Stats] = {"torch": torch_stats, "chunked": chunked_stats}


def available_impls() -> list[str]:
    """Names that `impl=` takes on this machine, `auto` apart."""
    return list(IMPLEMENTATIONS)


def resolve_impl(impl: str) -> str:
    """What `auto` means here. One answer for every shape, so that policy and reference share a kernel."""
    if impl == "auto":
        return "chunked"
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl={impl!r} is not available here; use impl='auto' or one of {available_impls()}")
    return impl


def _implementation(impl: str) -> Stats:
    return IMPLEMENTATIONS[resolve_impl(impl)]


def _scatter(values_N: Tensor, mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape, dtype=values_N.dtype, device=values_N.device).masked_scatter(mask, values_N)


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor | None) -> None:
    if not hidden.is_floating_point() or hidden.dim() < 2:
        raise ValueError(f"hidden must be floating point of shape (..., H), got {hidden.dtype} {tuple(hidden.shape)}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        raise ValueError(
            f"weight must have shape (V, {hidden.shape[-1]}), got {tuple(weight.shape)}; pass lm_head.weight"
        )
    if not weight.is_floating_point():
        raise ValueError(f"weight must be floating point, got {weight.dtype}; dequantize the head first")
    if targets.dtype != torch.int64 or targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"targets must be int64 of shape {tuple(hidden.shape[:-1])}, got {targets.dtype} {tuple(targets.shape)}; "
            "shift by one first: hidden[:, :-1] predicts input_ids[:, 1:]"
        )
    if mask is not None and (mask.dtype != torch.bool or mask.shape != targets.shape):
        raise ValueError(
            f"mask must be bool (True = trained) of shape {tuple(targets.shape)}, got {mask.dtype} {tuple(mask.shape)}"
        )
    devices = {tensor.device for tensor in (hidden, weight, targets, mask) if tensor is not None}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device, got {sorted(map(str, devices))}; move them with .to()")


def _check_ids(targets_N: Tensor, vocabulary: int) -> None:
    low, high = int(targets_N.min()), int(targets_N.max())
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"trained targets hold id {low if low < 0 else high}, the head knows 0 to {vocabulary - 1}; "
            "mask such positions, or use the tokenizer that belongs to the model"
        )
