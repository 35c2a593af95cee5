"""Log-probabilities and entropies in bounded memory: token rows by vocabulary tiles, recomputed in the backward pass.

Pure PyTorch, any device. Holds no checks; `logps` has made them. Shapes: n rows and v columns of one tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

TILE_ROWS = 1024
TILE_COLUMNS = 16384


def chunked_stats(hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """log p_y and entropy per row, differentiable in both inputs; TILE_ROWS x TILE_COLUMNS logits exist at once."""
    return _ChunkedStats.apply(hidden_NH, weight_VH, targets_N)


class _ChunkedStats(torch.autograd.Function):
    """Online softmax forward; the backward pass projects each tile again (8·N·H·V in all, 6 with a frozen head)."""

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        kind = _accumulator(hidden_NH, weight_VH)
        rows = [_row_stats(hidden_NH[r], weight_VH, targets_N[r], kind) for r in _tiles(len(targets_N), TILE_ROWS)]
        if not rows:
            rows = [tuple(hidden_NH.new_zeros(0, dtype=kind) for _ in range(4))]
        logps_N, entropies_N, shift_N, logsum_N = (torch.cat(parts) for parts in zip(*rows))
        ctx.save_for_backward(hidden_NH, weight_VH, targets_N, logps_N, entropies_N, shift_N, logsum_N)
        ctx.set_materialize_grads(False)
        return logps_N, entropies_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_logps_N: Tensor | None, grad_entropies_N: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_NH, weight_VH, targets_N, logps_N, entropies_N, shift_N, logsum_N = ctx.saved_tensors
        if grad_logps_N is None and grad_entropies_N is None:
            return None, None, None
        kind = logps_N.dtype
        c_N = torch.zeros_like(logps_N) if grad_logps_N is None else grad_logps_N.to(kind)
        h_N = None if grad_entropies_N is None else grad_entropies_N.to(kind)
        want_hidden, want_weight, _ = ctx.needs_input_grad
        dhidden_NH = torch.zeros(hidden_NH.shape, dtype=kind, device=hidden_NH.device) if want_hidden else None
        dweight_VH = torch.zeros(weight_VH.shape, dtype=kind, device=weight_VH.device) if want_weight else None
        with torch.autocast(device_type=hidden_NH.device.type, enabled=False):
            for r in _tiles(len(targets_N), TILE_ROWS):
                for v in _tiles(len(weight_VH), TILE_COLUMNS):
                    logq_nv = _project(hidden_NH[r], weight_VH[v], kind) - shift_N[r, None] - logsum_N[r, None]
                    dz_nv = _dz(
                        logq_nv,
                        targets_N[r] - v.start,
                        logps_N[r],
                        entropies_N[r],
                        c_N[r],
                        None if h_N is None else h_N[r],
                    )
                    if dhidden_NH is not None:
                        dhidden_NH[r] += _multiply(dz_nv, weight_VH[v], kind)
                    if dweight_VH is not None:
                        dweight_VH[v] += _multiply(dz_nv.T, hidden_NH[r], kind)
        return (
            None if dhidden_NH is None else dhidden_NH.to(hidden_NH.dtype),
            None if dweight_VH is None else dweight_VH.to(weight_VH.dtype),
            None,
        )


def _row_stats(hidden_nH: Tensor, weight_VH: Tensor, targets_n: Tensor, kind: torch.dtype) -> tuple[Tensor, ...]:
    """log p_y, entropy, shift k (the row maximum) and log Σ e^(z-k), each (n,).

    The target column is kept out of the sum: log p_y = -log(1 + S'/e^(z_y-k)) stays exact as p_y -> 1.
    """
    shift_n = total_n = moment_n = hidden_nH.new_zeros(0)
    target_n = torch.zeros(len(targets_n), dtype=kind, device=hidden_nH.device)
    for v in _tiles(len(weight_VH), TILE_COLUMNS):
        z_nv = _project(hidden_nH, weight_VH[v], kind)
        inside_n, column_n1 = _locate(targets_n - v.start, z_nv.shape[1])
        target_n = torch.where(inside_n, z_nv.gather(1, column_n1)[:, 0], target_n)
        peak_n = z_nv.amax(dim=1) if v.start == 0 else torch.maximum(shift_n, z_nv.amax(dim=1))
        z_nv -= peak_n[:, None]
        e_nv = z_nv.exp()
        e_nv.scatter_(1, column_n1, torch.where(inside_n[:, None], 0.0, e_nv.gather(1, column_n1)))
        tile_total_n, tile_moment_n = e_nv.sum(dim=1), (e_nv * z_nv).sum(dim=1)
        if v.start == 0:
            total_n, moment_n = tile_total_n, tile_moment_n
        else:
            scale_n = (shift_n - peak_n).exp()
            moment_n = scale_n * (moment_n + (shift_n - peak_n) * total_n) + tile_moment_n
            total_n = scale_n * total_n + tile_total_n
        shift_n = peak_n
    y_n = target_n - shift_n
    sum_n = total_n + y_n.exp()
    logsum_n = sum_n.log()
    entropy_n = (logsum_n - (moment_n + y_n.exp() * y_n) / sum_n).clamp_min(0.0)
    return logsigmoid(y_n - total_n.log()), entropy_n, shift_n, logsum_n


def _dz(
    logq_nv: Tensor, targets_n: Tensor, logps_n: Tensor, entropies_n: Tensor, c_n: Tensor, h_n: Tensor | None
) -> Tensor:
    """c·(onehot - p) - h·p·(log p + H); the target column from log p_y itself, free of the p - 1 cancellation."""
    p_nv = logq_nv.exp()
    dz_nv = -c_n[:, None] * p_nv
    target_n = -c_n * torch.expm1(logps_n)
    if h_n is not None:
        dz_nv -= h_n[:, None] * p_nv * (logq_nv + entropies_n[:, None])
        target_n = target_n - h_n * logps_n.exp() * (logps_n + entropies_n)
    inside_n, column_n1 = _locate(targets_n, p_nv.shape[1])
    return dz_nv.scatter_(1, column_n1, torch.where(inside_n[:, None], target_n[:, None], dz_nv.gather(1, column_n1)))


def _locate(targets_n: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Which rows have their target in this tile, and at which column (0 where they have not)."""
    inside_n = (targets_n >= 0) & (targets_n < width)
    return inside_n, torch.where(inside_n, targets_n, 0)[:, None]


def _project(hidden_nH: Tensor, weight_vH: Tensor, kind: torch.dtype) -> Tensor:
    return _multiply(hidden_nH, weight_vH.T, kind)


def _multiply(left: Tensor, right: Tensor, kind: torch.dtype) -> Tensor:
    """left @ right accumulated in `kind`; half inputs keep their fast GEMM on CUDA, elsewhere they are upcast."""
    if left.device.type == "cuda" and right.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(left.to(right.dtype), right, out_dtype=kind)
    return left.to(kind) @ right.to(kind)


def _accumulator(hidden_NH: Tensor, weight_VH: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(hidden_NH.dtype, weight_VH.dtype), torch.float32)


def _tiles(size: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, size)) for start in range(0, size, step))
