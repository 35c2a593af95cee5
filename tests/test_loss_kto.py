"""EntroPO-KTO: both forms against hand arithmetic, every reference point, TRL's own code, bounds and gradients."""

from __future__ import annotations

import math
from collections import defaultdict
from types import MethodType, SimpleNamespace

import pytest
import torch

from entropo.loss import RunningMean, authors_reference_point, batch_mean_z0, kl_z0, kto_loss
from entropo.loss.kto import corrected_rewards

COEFFICIENTS = {"beta": 0.1, "entropy_alpha": 0.11}


def logistic(x):
    return 1 / (1 + math.exp(-x))


def draw(B=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    reference = -100 * torch.rand(B, generator=generator, dtype=torch.float64) - 20
    policy = reference + 3 * torch.randn(B, generator=generator, dtype=torch.float64)
    labels = torch.arange(B) % 3 != 1
    return policy.requires_grad_(), reference, labels


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_authors_form_by_hand_with_z_zero():
    """(α-β)·r' < 0 at the reference, so z = 0 and the loss is KTO with reference point 0 and both weights."""
    z = authors_reference_point(vector(-900.0, -1100.0), vector(-900.0, -1100.0), **COEFFICIENTS)
    assert float(z) == 0.0
    got = kto_loss(
        vector(-10.0, -20.0),
        vector(-12.0, -15.0),
        torch.tensor([True, False]),
        z=z,
        form="authors",
        desirable_weight=1.5,
        undesirable_weight=0.5,
        **COEFFICIENTS,
    )
    assert got.loss.tolist() == pytest.approx([1.5 * (1 - logistic(0.2)), 0.5 * (1 - logistic(0.5))], abs=1e-15)
    assert got.rewards.tolist() == pytest.approx([0.2, -0.5], abs=1e-15)


def test_authors_form_by_hand_with_z_positive_which_is_multiplied_by_beta_again():
    z = authors_reference_point(vector(-50.0, -70.0), vector(-100.0, -90.0), **COEFFICIENTS)
    expected = ((-5.5 + 10.0) + (-7.7 + 9.0)) / 2
    assert float(z) == pytest.approx(expected, abs=1e-13)
    got = kto_loss(
        vector(-10.0, -20.0), vector(-12.0, -15.0), torch.tensor([True, False]), z=z, form="authors", **COEFFICIENTS
    )
    d, u = 1 - logistic(0.1 * (2 - expected)), 1 - logistic(0.1 * (expected + 5))
    assert got.loss.tolist() == pytest.approx([d, u], abs=1e-15)


@pytest.mark.parametrize("label", [True, False])
def test_authors_form_works_with_one_label_missing(label):
    got = kto_loss(vector(-10.0), vector(-12.0), torch.tensor([label]), z=0.0, form="authors", **COEFFICIENTS)
    assert got.loss.tolist() == pytest.approx([1 - logistic(0.2 if label else -0.2)], abs=1e-15)


def test_authors_reference_point_is_the_mean_of_rank_means_not_of_sequences():
    """Rank 0 holds two sequences, rank 1 one: the second rank weighs as much as the first."""
    first, second = (vector(-50.0, -70.0), vector(-100.0, -90.0)), (vector(-40.0), vector(-80.0))
    means = [float((0.11 * s - 0.1 * r).mean()) for s, r in (first, second)]

    def sum_over_ranks(pair):
        return pair + torch.stack([torch.tensor(means[1], dtype=torch.float64), torch.ones((), dtype=torch.float64)])

    z = authors_reference_point(*first, **COEFFICIENTS, sum_over_ranks=sum_over_ranks)
    assert float(z) == pytest.approx(sum(means) / 2, abs=1e-13)


def test_authors_form_at_equal_coefficients_scales_trls_kl_by_beta():
    s, r = vector(-50.0, -70.0), vector(-100.0, -90.0)
    z = authors_reference_point(s, r, beta=0.1, entropy_alpha=0.1)
    assert float(z) == pytest.approx(0.1 * float((s - r).mean()), abs=1e-13)


def test_corrected_form_by_hand():
    got = kto_loss(
        vector(-10.0, -20.0),
        vector(-12.0, -15.0),
        torch.tensor([True, False]),
        z=-0.3,
        form="corrected",
        **COEFFICIENTS,
    )
    u_w, u_l = 0.11 * -10 + 0.1 * 12, 0.11 * -20 + 0.1 * 15
    assert got.rewards.tolist() == pytest.approx([u_w, u_l], abs=1e-14)
    assert got.loss.tolist() == pytest.approx([1 - logistic(u_w + 0.3), 1 - logistic(-0.3 - u_l)], abs=1e-14)


def test_both_writings_of_the_reward_agree():
    s, r, _ = draw()
    torch.testing.assert_close(corrected_rewards(s, r, **COEFFICIENTS), 0.11 * s - 0.1 * r, rtol=1e-13, atol=1e-13)


def test_batch_mean_is_half_the_sum_of_class_means_and_detached():
    rewards = vector(1.0, 3.0, -5.0).requires_grad_()
    z0 = batch_mean_z0(rewards, torch.tensor([True, True, False]))
    assert float(z0) == (2.0 - 5.0) / 2
    assert not z0.requires_grad


def test_batch_mean_over_ranks_counts_every_sequence():
    """This rank has desirable rewards 1 and 3, the other one undesirable -6 and -4."""
    z0 = batch_mean_z0(
        vector(1.0, 3.0), torch.tensor([True, True]), sum_over_ranks=lambda sums: sums + vector(0.0, 0.0, -10.0, 2.0)
    )
    assert float(z0) == (2.0 - 5.0) / 2


def test_batch_mean_with_one_label_names_ema():
    with pytest.raises(ValueError, match="'ema'"):
        batch_mean_z0(vector(1.0), torch.tensor([True]))


def test_kl_is_clamped_at_zero():
    assert float(kl_z0(vector(-5.0), vector(-3.0), beta=0.1)) == 0.0
    assert float(kl_z0(vector(-1.0), vector(-3.0), beta=0.1)) == pytest.approx(0.2)


def test_running_mean_uses_the_past_and_resumes_exactly():
    mean = RunningMean(decay=0.5)
    assert mean.update(vector(2.0, 4.0)) == 3.0
    assert mean.update(vector(7.0)) == 3.0
    copy = RunningMean()
    copy.load_state_dict(mean.state_dict())
    assert copy.update(vector(0.0)) == mean.update(vector(0.0)) == 5.0
    assert copy.value == mean.value == 2.5


@pytest.mark.parametrize("form", ["authors", "corrected"])
def test_gradient_is_documented_bounded_and_never_flows_into_z(form):
    policy, reference, labels = draw(B=12)
    z = (policy.sum() * 0 + 0.4).requires_grad_()
    got = kto_loss(
        policy, reference, labels, z=z, form=form, desirable_weight=2.0, undesirable_weight=0.7, **COEFFICIENTS
    )
    (gradient,) = torch.autograd.grad(got.loss.sum(), policy)
    kappa, value = (0.1, got.rewards - 0.1 * 0.4) if form == "authors" else (0.11, got.rewards - 0.4)
    slope = torch.sigmoid(value) * torch.sigmoid(-value) * kappa
    expected = torch.where(labels, -2.0 * slope, 0.7 * slope)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-14)
    weights = torch.where(labels, 2.0, 0.7)
    assert bool((gradient.abs() <= weights * kappa / 4 + 1e-15).all())


@pytest.mark.parametrize("form", ["authors", "corrected"])
def test_gradcheck(form):
    policy, reference, labels = draw(B=4)
    assert torch.autograd.gradcheck(
        lambda s: kto_loss(s, reference, labels, z=0.2, form=form, beta=0.5, entropy_alpha=0.7).loss, (policy,)
    )


@pytest.mark.parametrize("form", ["authors", "corrected"])
def test_micro_batches_equal_one_batch_with_z_held(form):
    policy, reference, labels = draw(B=8)

    def loss(part):
        return kto_loss(policy[part], reference[part], labels[part], z=0.3, form=form, **COEFFICIENTS).loss

    (whole,) = torch.autograd.grad(loss(slice(0, 8)).mean(), policy)
    (parts,) = torch.autograd.grad(sum(loss(slice(i, i + 2)).mean() for i in range(0, 8, 2)) / 4, policy)
    torch.testing.assert_close(whole, parts, rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"beta": 0.0}, "beta must be > 0"),
        ({"form": "fixed"}, "use one of"),
        ({"labels_B": torch.tensor([1, 0])}, "bool"),
        ({"desirable_weight": -1.0}, ">= 0"),
        ({"z": torch.zeros(2)}, "one number"),
        ({"ref_B": torch.zeros(3)}, "one shape"),
    ],
)
def test_wrong_arguments_say_what_to_change(change, said):
    arguments = {"logps_B": torch.zeros(2), "ref_B": torch.zeros(2), "labels_B": torch.tensor([True, False]), "z": 0.0}
    with pytest.raises(ValueError, match=said):
        kto_loss(**(arguments | COEFFICIENTS | change))


@pytest.mark.parametrize("labels", [[True, False, True, False], [True] * 4, [False] * 4])
def test_trl_kto_gives_the_same_loss_and_gradient_for_corrected_kl_at_equal_coefficients(labels):
    """TRL's own `_compute_loss` and KL estimate, fed the same log-probs as one-token completions."""
    from trl.trainer.kto_trainer import KTOTrainer

    policy, reference, _ = draw(B=4)
    mismatched, ref_mismatched, _ = draw(B=4, seed=9)
    mismatched = mismatched.detach() + 5
    leaf = policy.detach().clone().requires_grad_()
    labels = torch.tensor(labels)
    zeros = torch.zeros(4, 1)

    def model(**inputs):
        logps = mismatched if "is_kl" in inputs or not torch.is_grad_enabled() else leaf
        return SimpleNamespace(log_probs=logps[:, None], entropy=zeros, mean_logits=zeros)

    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda value: value),
        aux_loss_enabled=False,
        calculate_KL=True,
        precompute_ref_logps=True,
        loss_type="kto",
        beta=0.1,
        desirable_weight=1.3,
        undesirable_weight=0.8,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    trainer._compute_kl_logps = MethodType(KTOTrainer._compute_kl_logps, trainer)
    ids, ones, completion = torch.zeros(4, 2, dtype=torch.int64), torch.ones(4, 2).long(), torch.tensor([[0, 1]] * 4)
    batch = {
        "input_ids": ids,
        "attention_mask": ones,
        "completion_mask": completion,
        "KL_input_ids": ids,
        "KL_attention_mask": ones,
        "KL_completion_mask": completion,
        "label": labels,
        "ref_logps": reference,
        "ref_KL_logps": ref_mismatched,
    }
    theirs = KTOTrainer._compute_loss(trainer, model, batch, False)
    theirs.backward()
    z0 = kl_z0(mismatched, ref_mismatched, beta=0.1)
    assert float(z0) > 0
    got = kto_loss(
        policy,
        reference,
        labels,
        z=z0,
        form="corrected",
        beta=0.1,
        entropy_alpha=0.1,
        desirable_weight=1.3,
        undesirable_weight=0.8,
    ).loss.mean()
    got.backward()
    torch.testing.assert_close(got, theirs, rtol=1e-13, atol=0)
    torch.testing.assert_close(policy.grad, leaf.grad, rtol=1e-12, atol=1e-16)
