"""EntroPO-DPO: identities in fp64, plain DPO written independently, TRL's own code, a bandit to convergence."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import logsigmoid, softplus

from entropo.loss import dpo_loss, nll_term, pair_offset

MODES = ["full", "length_normalised", "centred", "none"]


def draw(B=6, seed=0, spread=3.0):
    """s_w, s_l, r_w, r_l and counts; s near r as in training."""
    generator = torch.Generator().manual_seed(seed)
    reference = -100 * torch.rand(2, B, generator=generator, dtype=torch.float64) - 20
    policy = reference + spread * torch.randn(2, B, generator=generator, dtype=torch.float64)
    counts = torch.randint(50, 400, (2, B), generator=generator)
    return policy.requires_grad_(), reference, counts


def plain_dpo(policy, reference, beta):
    """DPO as its paper has it, written here and nowhere else."""
    return -logsigmoid(beta * ((policy[0] - reference[0]) - (policy[1] - reference[1])))


def entropo(policy, reference, counts=None, **options):
    extra = {} if counts is None else {"num_chosen_B": counts[0], "num_rejected_B": counts[1]}
    if options.get("offset") == "centred":
        extra["mean_ref_margin"] = float((reference[0] - reference[1]).mean())
    return dpo_loss(policy[0], policy[1], reference[0], reference[1], **extra, **options)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("beta", [0.1, 0.3, 1 / 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equal_alpha_and_beta_is_plain_dpo_bit_for_bit(mode, beta, dtype):
    policy, reference, counts = draw()
    policy = policy.detach().to(dtype).requires_grad_()
    reference = reference.to(dtype)
    twin = policy.detach().clone().requires_grad_()
    got = entropo(policy, reference, counts, beta=beta, entropy_alpha=beta, offset=mode)
    expected = plain_dpo(twin.double(), reference.double(), beta)
    got.loss.mean().backward()
    expected.mean().backward()
    assert torch.equal(got.loss, expected)
    assert torch.equal(policy.grad, twin.grad)


@pytest.mark.parametrize(("alpha", "beta"), [(0.11, 0.1), (0.08, 0.1), (1.0, 0.5)])
def test_margin_and_rewards_are_the_papers(alpha, beta):
    policy, reference, _ = draw()
    got = entropo(policy, reference, beta=beta, entropy_alpha=alpha)
    s, r = policy.detach(), reference
    torch.testing.assert_close(got.margin, alpha * (s[0] - s[1]) - beta * (r[0] - r[1]), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(got.rewards_chosen, alpha * s[0] - beta * r[0], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(got.rewards_rejected, alpha * s[1] - beta * r[1], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(got.loss.detach(), -logsigmoid(got.margin), rtol=1e-13, atol=1e-13)


def test_loss_at_the_reference_is_softplus_of_the_offset():
    _, reference, _ = draw()
    got = entropo(reference, reference, beta=0.1, entropy_alpha=0.13)
    torch.testing.assert_close(got.loss, softplus(-0.03 * (reference[0] - reference[1])), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_dpo_alpha_plus_its_offset(mode):
    policy, reference, counts = draw()
    got = entropo(policy, reference, counts, beta=0.1, entropy_alpha=0.15, offset=mode)
    drop = 0.15 * ((policy[0] - reference[0]) - (policy[1] - reference[1]))
    torch.testing.assert_close(got.loss, -logsigmoid(drop + got.offset), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(got.rewards_chosen - got.rewards_rejected, got.margin, rtol=1e-12, atol=1e-12)
    if mode == "none":
        assert torch.equal(got.loss, plain_dpo(policy, reference, 0.15))
    if mode == "centred":
        assert float(got.offset.mean()) == pytest.approx(0.0, abs=1e-14)


def test_length_normalised_drops_exactly_the_length_term():
    _, reference, counts = draw()
    options = {"beta": 0.1, "entropy_alpha": 0.15, "num_chosen_B": counts[0], "num_rejected_B": counts[1]}
    full = torch.sub(*pair_offset(reference[0], reference[1], mode="full", **options))
    normalised = torch.sub(*pair_offset(reference[0], reference[1], mode="length_normalised", **options))
    means = reference / counts
    length = (0.15 - 0.1) * (counts[0] - counts[1]).double() * (means[0] + means[1]) / 2
    torch.testing.assert_close(full, normalised + length, rtol=1e-12, atol=1e-12)


def test_antisymmetry_and_swap():
    """L(m) - L(-m) = -m; swapping chosen and rejected flips the margin."""
    policy, reference, _ = draw()
    options = {"beta": 0.1, "entropy_alpha": 0.12}
    one = entropo(policy, reference, **options)
    other = entropo(policy.flip(0), reference.flip(0), **options)
    assert torch.equal(other.margin, -one.margin)
    torch.testing.assert_close(one.loss - other.loss, -one.margin, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("k", [0.01, 7.0, 100.0])
def test_scaling_coefficients_up_and_log_probs_down_leaves_the_margin(k):
    policy, reference, _ = draw()
    one = entropo(policy, reference, beta=0.1, entropy_alpha=0.13)
    other = entropo(policy / k, reference / k, beta=0.1 * k, entropy_alpha=0.13 * k)
    torch.testing.assert_close(one.margin, other.margin, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_gradient_is_the_documented_coefficient(smoothing):
    policy, reference, _ = draw()
    got = entropo(policy, reference, beta=0.1, entropy_alpha=0.13, label_smoothing=smoothing)
    got.loss.sum().backward()
    coefficient = -0.13 * (torch.sigmoid(-got.margin) - smoothing)
    torch.testing.assert_close(policy.grad, torch.stack([coefficient, -coefficient]), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_gradcheck(mode, smoothing):
    policy, reference, counts = draw(B=3)
    assert torch.autograd.gradcheck(
        lambda s: (
            entropo(s, reference, counts, beta=0.3, entropy_alpha=0.5, offset=mode, label_smoothing=smoothing).loss
        ),
        (policy,),
    )


@pytest.mark.parametrize("mode", MODES)
def test_micro_batches_equal_one_batch(mode):
    policy, reference, counts = draw(B=8)
    mean = float((reference[0] - reference[1]).mean())

    def loss(part):
        return dpo_loss(
            policy[0, part],
            policy[1, part],
            reference[0, part],
            reference[1, part],
            beta=0.1,
            entropy_alpha=0.14,
            offset=mode,
            num_chosen_B=counts[0, part],
            num_rejected_B=counts[1, part],
            mean_ref_margin=mean,
        ).loss

    (whole,) = torch.autograd.grad(loss(slice(0, 8)).mean(), policy)
    (parts,) = torch.autograd.grad(sum(loss(slice(i, i + 2)).mean() for i in range(0, 8, 2)) / 4, policy)
    torch.testing.assert_close(whole, parts, rtol=1e-13, atol=1e-15)


def test_saturated_pairs_stay_finite():
    policy = torch.tensor([[-1e4], [-2e6]], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([[-2e6], [-1e4]], dtype=torch.float64)
    for s in (policy, policy.flip(0)):
        got = entropo(s, reference, beta=0.1, entropy_alpha=0.11)
        (gradient,) = torch.autograd.grad(got.loss.sum(), policy)
        assert bool(torch.isfinite(got.loss).all())
        assert bool(torch.isfinite(gradient).all())


def test_likelihood_term_is_the_mean_negative_log_prob():
    assert nll_term(torch.tensor([-10.0, -6.0]), torch.tensor([5, 2])).tolist() == [2.0, 3.0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"beta": 0.0}, "beta must be > 0"),
        ({"entropy_alpha": -1.0}, "entropy_alpha must be > 0"),
        ({"entropy_alpha": math.nan}, "entropy_alpha must be > 0"),
        ({"label_smoothing": 0.5}, "label_smoothing"),
        ({"offset": "centered"}, "use one of"),
        ({"offset": "centred"}, "mean_ref_margin"),
        ({"offset": "length_normalised"}, "num_chosen_B"),
    ],
)
def test_wrong_options_say_what_to_change(change, said):
    s = torch.zeros(2)
    with pytest.raises(ValueError, match=said):
        dpo_loss(s, s, s, s, **({"beta": 0.1, "entropy_alpha": 0.1} | change))


def test_wrong_shapes_are_refused():
    s = torch.zeros(2)
    with pytest.raises(ValueError, match="one shape"):
        dpo_loss(s, s, s, torch.zeros(3), beta=0.1, entropy_alpha=0.1)
    with pytest.raises(ValueError, match="one shape"):
        dpo_loss(s[:0], s[:0], s[:0], s[:0], beta=0.1, entropy_alpha=0.1)


def test_trl_dpo_gives_the_same_loss_and_gradient_at_equal_coefficients():
    """TRL's own `_compute_loss`, fed the same log-probs as one-token completions."""
    from trl.trainer.dpo_trainer import DPOTrainer

    policy, reference, _ = draw(B=4)
    leaf = policy.detach().clone().requires_grad_()
    rows = 8
    gather = SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda value: value)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=gather,
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=["sigmoid"],
        loss_weights=[1.0],
        beta=0.1,
        label_smoothing=0.0,
        use_weighting=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )

    def model(**_):
        zeros = torch.zeros(rows, 1)
        return SimpleNamespace(log_probs=leaf.reshape(rows, 1), entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())

    inputs = {
        "input_ids": torch.zeros(rows, 2, dtype=torch.int64),
        "attention_mask": torch.ones(rows, 2, dtype=torch.int64),
        "completion_mask": torch.tensor([[0, 1]] * rows),
        "ref_chosen_logps": reference[0],
        "ref_rejected_logps": reference[1],
    }
    theirs = DPOTrainer._compute_loss(trainer, model, inputs, False)
    theirs.backward()
    got = entropo(policy, reference, beta=0.1, entropy_alpha=0.1)
    got.loss.mean().backward()
    torch.testing.assert_close(got.loss.mean(), theirs, rtol=1e-14, atol=0)
    torch.testing.assert_close(policy.grad, leaf.grad, rtol=1e-13, atol=1e-16)


def train_bandit(utility, reference_logp, *, beta, alpha, offset):
    """Population pair loss of a tabular softmax policy under Bradley-Terry preferences, Newton-like to convergence."""
    actions = len(utility)
    logits = reference_logp.clone().requires_grad_()
    first, second = torch.triu_indices(actions, actions, 1)
    prefer = torch.sigmoid(utility[first] - utility[second])
    optimiser = torch.optim.LBFGS(
        [logits], lr=1, max_iter=600, tolerance_grad=1e-14, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimiser.zero_grad()
        logp = torch.log_softmax(logits, 0)
        options = {"beta": beta, "entropy_alpha": alpha, "offset": offset}
        one = dpo_loss(logp[first], logp[second], reference_logp[first], reference_logp[second], **options).loss
        other = dpo_loss(logp[second], logp[first], reference_logp[second], reference_logp[first], **options).loss
        loss = (prefer * one + (1 - prefer) * other).mean()
        loss.backward()
        return loss

    for _ in range(3):
        optimiser.step(closure)
    return torch.softmax(logits.detach(), 0)


def test_bandit_converges_to_the_closed_form_and_keeps_more_entropy_than_dpo():
    """π* = π_ref^(β/α)·e^(u/α)/Z for `full`, π_ref·e^(u/α)/Z for `none`; `full` is DPO(β) tempered by α/β > 1."""
    generator = torch.Generator().manual_seed(4)
    utility = torch.randn(6, generator=generator, dtype=torch.float64)
    reference_logp = torch.log_softmax(torch.randn(6, generator=generator, dtype=torch.float64), 0)
    alpha, beta = 1.3, 1.0

    def check(policy, power, temperature):
        expected = torch.softmax(power * reference_logp + utility / temperature, 0)
        torch.testing.assert_close(policy, expected, rtol=0, atol=1e-7)
        return float(-(policy * policy.log()).sum())

    full = check(train_bandit(utility, reference_logp, beta=beta, alpha=alpha, offset="full"), beta / alpha, alpha)
    check(train_bandit(utility, reference_logp, beta=beta, alpha=alpha, offset="none"), 1.0, alpha)
    plain = check(train_bandit(utility, reference_logp, beta=beta, alpha=beta, offset="full"), 1.0, beta)
    assert full > plain
