"""token_stats against full logits in fp64: values, gradients, masks, awkward vocabularies, extreme rows."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from entropo.loss import available_impls, sequence_sums, token_stats
from entropo.loss import chunked as chunked_module

IMPLS = ["torch", "chunked"]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles that divide nothing, so that every tail is exercised."""
    monkeypatch.setattr(chunked_module, "TILE_ROWS", 7)
    monkeypatch.setattr(chunked_module, "TILE_COLUMNS", 48)


def make(T, V, H, dtype=torch.float64, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(T, H, generator=generator, dtype=torch.float64) * scale
    weight = torch.randn(V, H, generator=generator, dtype=torch.float64)
    targets = torch.randint(V, (T,), generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def oracle(hidden, weight, targets):
    """Written out: p from exponentials, no log_softmax."""
    z = hidden.double() @ weight.double().T
    p = (z - z.amax(1, keepdim=True)).exp()
    p = p / p.sum(1, keepdim=True)
    logp = p.clamp_min(1e-300).log()
    return logp[torch.arange(len(targets)), targets], -(p * logp).sum(1)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("T", "V", "H"), [(1, 7, 3), (5, 129, 17), (33, 1000, 64), (8, 48, 4), (3, 1, 2)])
def test_token_stats_match_written_out_softmax(impl, T, V, H):
    hidden, weight, targets = make(T, V, H)
    stats = token_stats(hidden, weight, targets, impl=impl)
    logps, entropies = oracle(hidden, weight, targets)
    torch.testing.assert_close(stats.logps, logps, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(stats.entropies, entropies, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("T", "V", "H"), [(5, 129, 17), (33, 200, 8)])
def test_chunked_gradients_match_the_oracle_for_logps_and_entropies(T, V, H):
    generator = torch.Generator().manual_seed(1)
    c, h = torch.randn(2, T, generator=generator, dtype=torch.float64)
    gradients = {}
    for impl in IMPLS:
        hidden, weight, targets = make(T, V, H)
        stats = token_stats(hidden, weight, targets, impl=impl)
        ((stats.logps * c).sum() + (stats.entropies * h).sum()).backward()
        gradients[impl] = (hidden.grad, weight.grad)
    for got, expected in zip(gradients["chunked"], gradients["torch"]):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("output", [0, 1])
def test_gradcheck(impl, output):
    hidden, weight, targets = make(4, 53, 3)
    assert torch.autograd.gradcheck(lambda x, w: token_stats(x, w, targets, impl=impl)[output], (hidden, weight))


@pytest.mark.parametrize("impl", IMPLS)
def test_masked_positions_change_nothing_and_get_no_gradient(impl):
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(2, 9, 5, generator=generator, dtype=torch.float64)
    weight = torch.randn(61, 5, generator=generator, dtype=torch.float64)
    targets = torch.randint(61, (2, 9), generator=generator)
    mask = torch.rand(2, 9, generator=generator) < 0.4

    def run(hidden, targets):
        hidden = hidden.clone().requires_grad_()
        stats = token_stats(hidden, weight, targets, mask=mask, impl=impl)
        (stats.logps.sum() + stats.entropies.sum()).backward()
        return stats, hidden.grad

    stats, gradient = run(hidden, targets)
    changed = torch.where(mask[..., None], hidden, torch.randn(2, 9, 5, dtype=torch.float64))
    other, other_gradient = run(changed, torch.where(mask, targets, torch.full_like(targets, -100)))
    assert torch.equal(stats.logps, other.logps)
    assert torch.equal(stats.entropies, other.entropies)
    assert torch.equal(gradient, other_gradient)
    assert stats.logps[~mask].abs().sum() == 0
    assert gradient[~mask].abs().sum() == 0


@pytest.mark.parametrize("impl", IMPLS)
def test_no_trained_position_gives_zeros_and_zero_gradients(impl):
    hidden, weight, targets = make(4, 9, 3)
    stats = token_stats(hidden, weight, targets, mask=torch.zeros(4, dtype=torch.bool), impl=impl)
    (stats.logps.sum() + stats.entropies.sum()).backward()
    assert stats.logps.tolist() == [0.0] * 4
    assert hidden.grad is None or hidden.grad.abs().sum() == 0


def test_turn_sums_add_up_to_the_sequence_sum():
    hidden, weight, targets = make(40, 77, 6)
    turns = torch.arange(40) // 9
    whole = sequence_sums(token_stats(hidden, weight, targets).logps[None])[0]
    parts = [sequence_sums(token_stats(hidden, weight, targets, mask=turns == t).logps[None])[0] for t in range(5)]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-13, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shift", [-300.0, 300.0])
def test_a_constant_added_to_all_logits_of_a_row_changes_nothing(impl, shift):
    """Identity 8: a constant feature; lse far below 0 and a vocabulary no tile divides catch phantom columns."""
    hidden, weight, targets = make(5, 130, 8, dtype=torch.float32)
    plain = token_stats(hidden, weight, targets, impl=impl)
    wide_hidden = torch.cat([hidden, torch.full((5, 1), shift)], dim=1)
    wide_weight = torch.cat([weight, torch.ones(130, 1)], dim=1)
    moved = token_stats(wide_hidden, wide_weight, targets, impl=impl)
    torch.testing.assert_close(moved.logps, plain.logps, rtol=1e-4, atol=2e-4)
    torch.testing.assert_close(moved.entropies, plain.entropies, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("impl", IMPLS)
def test_entropy_of_uniform_is_log_v_of_one_hot_is_zero_and_in_between_stays_between(impl):
    weight = torch.eye(50, dtype=torch.float64)
    targets = torch.zeros(3, dtype=torch.int64)
    hidden = torch.stack([torch.zeros(50), 1000 * torch.eye(50)[0], torch.linspace(-2, 2, 50)]).double()
    uniform, one_hot, between = token_stats(hidden, weight, targets, impl=impl).entropies.tolist()
    assert uniform == pytest.approx(math.log(50), abs=1e-13)
    assert one_hot == pytest.approx(0.0, abs=1e-13)
    assert 0 < between < math.log(50)


@pytest.mark.parametrize("gap", [4.0, 8.0, 12.0, 20.0])
def test_target_gradient_stays_accurate_as_p_goes_to_one(gap):
    """Identity 13 in fp32: 1 - p reaches 1e-8, where p - 1 would have no digit left."""
    weight = torch.randn(64, 16, generator=torch.Generator().manual_seed(3))
    hidden = weight[:1] * (gap / weight[:1].square().sum() * 4)
    targets = torch.zeros(1, dtype=torch.int64)
    got = hidden.clone().requires_grad_()
    stats = token_stats(got, weight, targets, impl="chunked")
    stats.logps.sum().backward()
    exact = hidden.double().requires_grad_()
    z = exact @ weight.double().T
    torch.autograd.backward(z[0, 0] - torch.logsumexp(z[0], 0))
    torch.testing.assert_close(got.grad.double(), exact.grad, rtol=2e-4, atol=0)
    torch.testing.assert_close(stats.logps.double(), torch.log_softmax(z, 1)[:, 0].detach(), rtol=2e-4, atol=0)


@pytest.mark.parametrize("rows", [1, 2, 64])
@pytest.mark.parametrize("columns", [1, 13, 1000])
def test_chunk_sizes_change_nothing(monkeypatch, rows, columns):
    monkeypatch.setattr(chunked_module, "TILE_ROWS", rows)
    monkeypatch.setattr(chunked_module, "TILE_COLUMNS", columns)
    hidden, weight, targets = make(9, 37, 4)
    stats = token_stats(hidden, weight, targets, impl="chunked")
    expected = token_stats(hidden, weight, targets, impl="torch")
    torch.testing.assert_close(stats.logps, expected.logps, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(stats.entropies, expected.entropies, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_bf16_inputs_are_accumulated_in_fp32_even_under_autocast(impl):
    hidden, weight, targets = make(16, 500, 64, dtype=torch.bfloat16)
    logps, _ = oracle(hidden, weight, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stats = token_stats(hidden, weight, targets, impl=impl)
        stats.logps.sum().backward()
    assert stats.logps.dtype == torch.float32
    assert hidden.grad.dtype == torch.bfloat16
    torch.testing.assert_close(stats.logps.double(), logps, rtol=0, atol=1e-4)


def test_frozen_head_gets_no_gradient_buffer():
    hidden, weight, targets = make(5, 60, 4)
    frozen = weight.detach()
    token_stats(hidden, frozen, targets).logps.sum().backward()
    assert frozen.grad is None
    assert hidden.grad is not None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"impl": "warp"}, "use impl='auto' or one of"),
        ({"targets": torch.zeros(4, dtype=torch.int32)}, "int64"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, "shift by one"),
        ({"targets": torch.tensor([0, 1, 2, 9])}, "id 9, the head knows 0 to 8"),
        ({"targets": torch.tensor([0, 1, 2, -100])}, "id -100"),
        ({"mask": torch.ones(4)}, "mask must be bool"),
        ({"weight": torch.zeros(9, 4)}, "lm_head.weight"),
        ({"weight": torch.zeros(9, 3, dtype=torch.int8)}, "dequantize"),
        ({"hidden": torch.zeros(4, 3, dtype=torch.int64)}, "floating point"),
        ({"hidden": torch.zeros(4, 3, device="meta")}, "one device"),
    ],
)
def test_wrong_arguments_say_what_to_change(change, said):
    arguments = {"hidden": torch.zeros(4, 3), "weight": torch.zeros(9, 3), "targets": torch.zeros(4, dtype=torch.int64)}
    arguments |= change
    with pytest.raises(ValueError, match=said):
        token_stats(arguments.pop("hidden"), arguments.pop("weight"), arguments.pop("targets"), **arguments)


def test_available_impls_are_tested_here_or_elsewhere():
    assert set(IMPLS) <= set(available_impls())


def test_importing_the_loss_needs_torch_only():
    code = """
import sys, torch
before = set(sys.modules)
import entropo.loss
new = {name.partition(".")[0] for name in set(sys.modules) - before}
outside = new - {"entropo", "torch"} - set(sys.stdlib_module_names)
assert not outside, outside
assert not {"transformers", "pydantic", "pyarrow", "numpy.ma"} & new
others = {name for name in sys.modules if name.startswith("entropo.") and not name.startswith("entropo.loss")}
assert not others, others
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
