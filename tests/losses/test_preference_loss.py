"""What all methods share: values, the safeguard's part in the gradient, metrics, refusals."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import loss_reference as reference
import pytest
import torch

from sdpo import loser_scale, preference_loss
from sdpo.losses import dspo, method_names, needs_reference_output
from sdpo.losses.terms import PairTerms, branch_errors

# method, form, drift of the reference (a large one is DSPO's other SDXL branch), beta
CASES = [
    ("diffusion-dpo", "sd15", 0.1, 5.0),
    ("dspo", "sd15", 0.1, 0.3),
    ("dspo", "sdxl", 0.1, 5.0),
    ("dspo", "sdxl", 0.8, 2.0),
    ("dmpo", "sd15", 0.1, 5.0),
]
WITH_SFT = [*CASES, ("sft", "sd15", 0.1, 5.0)]
GUARDS = [None, ("batch", 0.6), ("pair", 0.6), ("pair", 1.0)]
every_case = pytest.mark.parametrize(("method", "form", "drift", "beta"), CASES)
every_method = pytest.mark.parametrize(("method", "form", "drift", "beta"), WITH_SFT)


def run(case, guard, pred, ref, target):
    method, form, beta = case
    mu, scope = (guard[1], guard[0]) if guard else (None, "batch")
    return preference_loss(
        method, pred, ref, target, beta=beta, mu=mu, scope=scope, alpha=0.05, form=form
    )


def gradient(case, guard, pred, ref, target):
    """The loss's gradient at the predictions, winners and losers apart."""
    leaf = pred.clone().requires_grad_()
    run(case, guard, leaf, ref, target).loss.backward()
    return leaf.grad.chunk(2)


@every_method
@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize(
    ("dtype", "rtol"),
    [
        (torch.float64, 1e-12),
        (torch.float32, 2e-5),
        # Compared with the exact loss of the rounded inputs: nothing more is lost inside.
        (torch.bfloat16, 2e-5),
        (torch.float16, 2e-5),
    ],
)
def test_value(method, form, drift, beta, guard, dtype, rtol):
    tensors = reference.tensors(4, dtype=dtype, drift=drift)
    output = run((method, form, beta), guard, *tensors)
    want = reference.value(method, *tensors, beta=beta, alpha=0.05, form=form)
    assert output.loss.item() == pytest.approx(want, rel=rtol)
    assert output.loss.shape == ()
    assert output.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@every_method
def test_unguarded_gradient_is_the_derivative_of_the_value(method, form, drift, beta):
    pred, ref, target = reference.tensors(2, drift=drift, shape=(1, 2, 3))

    def value(x):
        return reference.value(method, x, ref, target, beta=beta, alpha=0.05, form=form)

    found = torch.cat(gradient((method, form, beta), None, pred, ref, target))
    torch.testing.assert_close(found, reference.numeric_gradient(value, pred), rtol=1e-5, atol=1e-8)
    assert found.abs().max() > 1e-3


@every_case
def test_gradcheck(method, form, drift, beta):
    pred, ref, target = reference.tensors(2, drift=drift, shape=(1, 2, 2))
    assert torch.autograd.gradcheck(
        lambda x: run((method, form, beta), None, x, ref, target).loss, pred.requires_grad_()
    )


@every_case
@pytest.mark.parametrize("scope", ["batch", "pair"])
@pytest.mark.parametrize("mu", [0.0, 0.5, 0.9, 1.0])
def test_guard_scales_the_losers_gradient_alone(method, form, drift, beta, scope, mu):
    pred, ref, target = reference.tensors(4, drift=drift)
    case = (method, form, beta)
    free_w, free_l = gradient(case, None, pred, ref, target)
    held_w, held_l = gradient(case, (scope, mu), pred, ref, target)
    residual_w, residual_l = (pred - target).chunk(2)
    scale = loser_scale(residual_w, residual_l, mu, scope)
    assert (scale < 1).any(), "the residuals of this test should conflict"
    assert torch.equal(held_w, free_w)
    torch.testing.assert_close(held_l, scale.reshape(-1, 1, 1, 1) * free_l, rtol=1e-12, atol=1e-15)
    assert free_l.abs().max() > 0


@every_case
def test_pair_scope_scales_each_pair_by_its_own(method, form, drift, beta):
    pred, ref, target = reference.tensors(3, drift=drift)
    # The second pair's loser moves against its winner: nothing to hold back there.
    pred[4] = target[4] - (pred[1] - target[1])
    case = (method, form, beta)
    _, free = gradient(case, None, pred, ref, target)
    _, held = gradient(case, ("pair", 0.9), pred, ref, target)
    ratios = [(held[i] / free[i]).flatten() for i in range(3)]
    for ratio in ratios:
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))
    assert ratios[1][0].item() == pytest.approx(1.0)
    assert ratios[0][0] < 0.5
    assert ratios[2][0] < 0.5


@every_case
def test_conflicting_loser_gets_no_gradient_at_mu_one(method, form, drift, beta):
    # One linear layer is the model: what reaches its weights is the winners' gradient alone.
    pred, ref, target = reference.tensors(3, drift=drift)
    layer = torch.nn.Linear(4, 4, bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(4) + 0.01)

    def weight_gradient(losers_attached):
        layer.zero_grad()
        out_w, out_l = layer(pred[:3]), layer(pred[3:])
        residual_w, residual_l = out_w - target[:3], out_l - target[3:]
        assert ((residual_w * residual_l).sum((1, 2, 3)) > 0).all()
        out = torch.cat([out_w, out_l if losers_attached else out_l.detach()])
        run((method, form, beta), ("pair", 1.0), out, ref, target).loss.backward()
        return layer.weight.grad.clone()

    both = weight_gradient(True)
    assert torch.equal(both, weight_gradient(False))
    assert both.abs().max() > 0


@every_case
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_stay_finite(method, form, drift, beta, sign, dtype):
    # u = +-1e4 exactly: the loser's (or the winner's) error is larger than the reference's by 1.
    pred, ref, target = reference.tensors(2, drift=drift, dtype=dtype)
    ref = pred.clone()
    worse = slice(2, 4) if sign > 0 else slice(0, 2)
    residual = (pred - target)[worse]
    mse = residual.square().flatten(1).mean(1).reshape(-1, 1, 1, 1)
    pred[worse] = target[worse] + residual * ((mse + 1) / mse).sqrt()
    us = reference.logits(*(x.double().numpy() for x in (pred, ref, target)), beta=2e4)
    assert us == pytest.approx([sign * 1e4] * 2, rel=1e-3)
    case = (method, form, 2e4)
    for guard in (None, ("batch", 0.6)):
        output = run(case, guard, pred, ref, target)
        want = reference.value(method, pred, ref, target, beta=2e4, alpha=0.05, form=form)
        assert output.loss.item() == pytest.approx(want, rel=2e-3, abs=1e-12)
        assert all(g.isfinite().all() for g in gradient(case, guard, pred, ref, target))
        assert all(v.isfinite() for v in output.metrics.values())


@every_method
@pytest.mark.parametrize("guard", [None, ("pair", 0.6)])
def test_metrics(method, form, drift, beta, guard):
    pred, ref, target = reference.tensors(5, drift=drift)
    output = run((method, form, beta), guard, pred.requires_grad_(), ref, target)
    arrays = [x.detach().numpy() for x in (pred, ref, target)]
    model = reference.errors(arrays[0], arrays[2])
    frozen = reference.errors(arrays[1], arrays[2])
    us = reference.logits(*arrays, beta=beta)

    def mean(values):
        return sum(values) / len(values)

    want = {
        "loss": output.loss.item(),
        "winner_mse": mean(model[:5]),
        "loser_mse": mean(model[5:]),
        "ref_winner_mse": mean(frozen[:5]),
        "ref_loser_mse": mean(frozen[5:]),
        "winner_drift": mean(model[:5]) - mean(frozen[:5]),
        "loser_drift": mean(model[5:]) - mean(frozen[5:]),
        "margin": mean([-2 * u / beta for u in us]),
        "implicit_acc": sum(u > 0 for u in us) / 5,
        "loser_scale": 1.0,
        "loser_scale_min": 1.0,
    }
    if guard:
        scale = loser_scale(*(pred - target).chunk(2), guard[1], guard[0])
        want |= {"loser_scale": scale.mean().item(), "loser_scale_min": scale.min().item()}
        assert 0 < want["loser_scale_min"] < want["loser_scale"] < 1
    assert {k: v.item() for k, v in output.metrics.items()} == pytest.approx(want, abs=1e-12)
    assert not any(v.requires_grad for v in output.metrics.values())
    assert output.loss.requires_grad


@every_case
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, torch.tensor(0.5), torch.tensor([0.0, 0.3, 1.0])])
def test_fixed_scale_multiplies_the_losers_gradient_alone(method, form, drift, beta, scale):
    pred, ref, target = reference.tensors(3, drift=drift)
    leaf = pred.clone().requires_grad_()
    output = preference_loss(
        method, leaf, ref, target, beta=beta, alpha=0.05, form=form, fixed_scale=scale
    )
    output.loss.backward()
    plain = run((method, form, beta), None, pred, ref, target)
    assert torch.equal(output.loss.detach(), plain.loss)
    free_w, free_l = gradient((method, form, beta), None, pred, ref, target)
    each = torch.as_tensor(scale, dtype=torch.float64).expand(3)
    torch.testing.assert_close(leaf.grad[:3], free_w)
    torch.testing.assert_close(leaf.grad[3:], each.reshape(3, 1, 1, 1) * free_l)
    assert free_l.abs().max() > 0
    assert torch.equal(output.per_pair["loser_scale"], each)
    assert output.metrics["loser_scale"].item() == pytest.approx(each.mean().item())
    assert output.metrics["loser_scale_min"] == each.min()


@pytest.mark.parametrize("guard", GUARDS)
def test_what_is_told_of_each_pair(guard):
    pred, ref, target = reference.tensors(4)
    output = run(("dmpo", "sd15", 5.0), guard, pred.requires_grad_(), ref, target)
    arrays = [x.detach().numpy() for x in (pred, ref, target)]
    model, frozen = (reference.errors(a, arrays[2]) for a in arrays[:2])
    drift = [m - f for m, f in zip(model, frozen, strict=True)]
    assert output.per_pair["winner_drift"].tolist() == pytest.approx(drift[:4])
    assert output.per_pair["loser_drift"].tolist() == pytest.approx(drift[4:])
    scale = torch.ones(()).double()
    if guard:
        scale = loser_scale(*(pred - target).detach().chunk(2), guard[1], guard[0])
    torch.testing.assert_close(output.scale, scale)
    assert torch.equal(output.per_pair["loser_scale"], output.scale.expand(4))
    assert not any(v.requires_grad for v in (*output.per_pair.values(), output.scale))


def test_implicit_accuracy_counts_only_u_above_zero():
    pred, ref, target = reference.tensors(2)
    ref = pred.clone()
    output = run(("diffusion-dpo", "sd15", 5.0), None, pred, ref, target)
    assert output.metrics["implicit_acc"].item() == 0.0
    pred[3] = pred[3] + (pred[3] - target[3])  # the second pair's loser gets worse
    output = run(("diffusion-dpo", "sd15", 5.0), None, pred, ref, target)
    assert output.metrics["implicit_acc"].item() == 0.5


@every_method
def test_no_gradient_reaches_reference_or_target(method, form, drift, beta):
    leaves = [x.requires_grad_() for x in reference.tensors(2, drift=drift)]
    run((method, form, beta), ("batch", 0.5), *leaves).loss.backward()
    assert leaves[0].grad is not None
    assert leaves[1].grad is None
    assert leaves[2].grad is None


@pytest.mark.parametrize("method", ["diffusion-dpo", "dmpo", "sft"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_references_errors_stand_in_for_its_output(method, dtype):
    """To the bit, and against the formula with errors of one's own choice."""
    pred, ref, target = reference.tensors(3, dtype=dtype)
    leaves = [pred.clone().requires_grad_() for _ in range(2)]
    given = {"beta": 5.0, "mu": 0.6, "alpha": 0.05}
    errors = branch_errors(ref, target)
    outputs = [
        preference_loss(method, leaves[0], ref, target, **given),
        preference_loss(method, leaves[1], None, target, ref_errors=errors, **given),
    ]
    for output in outputs:
        output.loss.backward()
    assert torch.equal(leaves[0].grad, leaves[1].grad)
    assert outputs[0].metrics == outputs[1].metrics
    assert errors.shape == (6,)
    exact = [x.double().numpy() for x in (ref, target)]
    assert errors.tolist() == pytest.approx(reference.errors(*exact), rel=1e-6)


def test_which_methods_need_the_references_output():
    """By their text, as the command line is told, and in fact."""
    pred, ref, target = reference.tensors(2)
    needing = []
    for name in method_names():
        try:
            errors = branch_errors(ref, target)
            preference_loss(name, pred, None, target, beta=1.0, ref_errors=errors)
        except ValueError as error:
            assert str(error) == f"{name} needs ref_pred: the reference's errors are not enough"
            needing.append(name)
    assert needing == ["dspo"] == [n for n in method_names() if needs_reference_output(n)]
    terms = PairTerms(pred, None, pred, *torch.ones(4, 2), 1.0)
    with pytest.raises(ValueError, match="needs the reference's output"):
        dspo.loss(terms)


def test_bad_arguments_are_refused():
    pred, ref, target = reference.tensors(2)
    good = {"beta": 1.0}
    with pytest.raises(ValueError, match=r"unknown method 'ppo'.*diffusion-dpo, dmpo, dspo, sft"):
        preference_loss("ppo", pred, ref, target, **good)
    for helper in ("names", "terms", "diffusion_dpo"):
        with pytest.raises(ValueError, match="unknown method"):
            preference_loss(helper, pred, ref, target, **good)
    with pytest.raises(ValueError, match=r"form .*'flux'"):
        preference_loss("dspo", pred, ref, target, form="flux", **good)
    with pytest.raises(ValueError, match="scope"):
        preference_loss("dmpo", pred, ref, target, mu=0.5, scope="all", **good)
    with pytest.raises(ValueError, match="mu must lie"):
        preference_loss("dmpo", pred, ref, target, mu=1.5, **good)
    for scale in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"fixed_scale must lie in \[0, 1\]"):
            preference_loss("dmpo", pred, ref, target, fixed_scale=scale, **good)
    with pytest.raises(ValueError, match=r"fixed_scale must be \(\) or \(2,\), got \(3,\)"):
        preference_loss("dmpo", pred, ref, target, fixed_scale=torch.ones(3), **good)
    with pytest.raises(ValueError, match="not both"):
        preference_loss("dmpo", pred, ref, target, fixed_scale=0.5, mu=0.5, **good)
    with pytest.raises(ValueError, match="equal shapes"):
        preference_loss("dmpo", pred, ref[:2], target, **good)
    for both in ({}, {"ref_errors": torch.ones(4)}):
        with pytest.raises(ValueError, match="ref_pred or ref_errors, one of them"):
            preference_loss("dmpo", pred, ref if both else None, target, **both, **good)
    with pytest.raises(ValueError, match=r"ref_errors must be \(4,\), got \(2, 2\)"):
        preference_loss("dmpo", pred, None, target, ref_errors=torch.ones(2, 2), **good)
    with pytest.raises(ValueError, match="equal shapes"):
        preference_loss("dmpo", pred, ref, target[:, :1], **good)
    for count in (0, 3):
        with pytest.raises(ValueError, match="winners then losers"):
            preference_loss("dmpo", pred[:count], ref[:count], target[:count], **good)
    with pytest.raises(ValueError, match="winners then losers"):
        preference_loss("dmpo", pred[:, 0, 0, 0], ref[:, 0, 0, 0], target[:, 0, 0, 0], **good)


def test_one_new_file_adds_a_method(repo, tmp_path):
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(repo / "sdpo", tmp_path / "sdpo", ignore=ignored)
    (tmp_path / "sdpo/losses/my_method.py").write_text(
        "def loss(terms):\n    return (terms.error_w - terms.error_l).mean()\n"
    )
    # The copy alone is on the path: the repository's own package must not be what answers.
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}

    def python(*arguments):
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    helped = python("-m", "sdpo.args", "--help")
    assert "my-method" in helped
    program = (
        "import sdpo, torch; x = torch.arange(4.).reshape(4, 1);"
        "out = sdpo.preference_loss('my-method', x, x, 0 * x, beta=1.0, mu=0.5);"
        "print(sdpo.__file__, out.loss.item())"
    )
    where, loss = python("-c", program).split()
    assert where.startswith(str(tmp_path))
    assert float(loss) == pytest.approx((0 + 1) / 2 - (4 + 9) / 2)
