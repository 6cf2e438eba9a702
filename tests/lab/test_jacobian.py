"""Gradients, Gram products and spectra against Jacobians written out in full."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sdpo.lab.audit.gradients import Network
from sdpo.lab.audit.jacobian import (
    QUANTILES,
    Sample,
    branch_alignment,
    lanczos,
    spectrum,
)
from sdpo.models.forward import NoisedPairs
from sdpo.models.sd15 import SD15


class Mixer(nn.Module):
    """A UNet in its arguments only: out = tanh(W x) + b, few enough numbers to write J out."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(8, 8, generator=g, dtype=torch.float64) / 3)
        self.bias = nn.Parameter(torch.zeros(8, dtype=torch.float64))

    def forward(self, x, t, return_dict, encoder_hidden_states):
        out = torch.tanh(x.flatten(1) @ self.weight.T) + self.bias
        return (out.reshape(x.shape),)


@pytest.fixture(scope="module")
def two():
    """Winner and loser of one pair under a `Mixer`, and their Jacobians, (8, parameters)."""
    network = Network(SD15(), Mixer())
    g = torch.Generator().manual_seed(1)
    x, noise = (torch.randn(n, 2, 2, 2, generator=g, dtype=torch.float64) for n in (2, 1))
    inputs = NoisedPairs(
        x, torch.tensor([7, 7]), noise.repeat(2, 1, 1, 1), {"hidden": torch.zeros(2, 1, 1)}
    )
    parameters = list(network.parameters.values())
    samples = [Sample(network, inputs.samples(slice(i, i + 1))) for i in range(2)]
    jacobians = []
    for i in range(2):
        out = network.predict(inputs.samples(slice(i, i + 1))).flatten()
        rows = [torch.autograd.grad(o, parameters, retain_graph=True) for o in out]
        jacobians.append(torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]))
    return samples, jacobians


def test_products_with_the_jacobian(two):
    (winner, _), (jacobian, _) = two
    v = torch.randn(1, 2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    flat = torch.cat([g.flatten() for g in winner.transposed(v)])
    torch.testing.assert_close(flat, jacobian.T @ v.flatten())
    torch.testing.assert_close(winner.gram(v).flatten(), jacobian @ (jacobian.T @ v.flatten()))


def test_alignment_of_a_pair(two):
    samples, (j_w, j_l) = two
    r_w, r_l = (s.residual.flatten() for s in samples)
    found = branch_alignment(*samples)
    expected = {
        "output_inner": r_w @ r_l,
        "output_winner_sq": r_w @ r_w,
        "output_loser_sq": r_l @ r_l,
        "parameter_inner": r_w @ (j_w @ j_l.T) @ r_l,
        "parameter_winner_sq": r_w @ (j_w @ j_w.T) @ r_w,
        "parameter_loser_sq": r_l @ (j_l @ j_l.T) @ r_l,
    }
    assert found == pytest.approx({k: v.item() for k, v in expected.items()}, rel=1e-9)


def test_spectrum_is_that_of_the_whole_matrix(two):
    samples, (j_w, j_l) = two
    found = spectrum(*samples, 3000, 8, torch.Generator().manual_seed(3))
    values = torch.linalg.eigvalsh(j_w @ j_w.T)
    mean = values.mean().item()
    assert found["dimension"] == 8
    assert found["mean_eigenvalue"] == pytest.approx(mean, rel=0.05)
    assert found["variation"] == pytest.approx((values.std(correction=0) / mean).item(), rel=0.1)
    share = (values.sum() ** 2 / values.square().sum() / 8).item()
    assert found["participation"] == pytest.approx(share, rel=0.1)
    assert found["largest"] == pytest.approx((values.max() / mean).item(), rel=0.06)
    assert len(found["quantiles"]) == len(QUANTILES)
    assert found["quantiles"][-1] == pytest.approx((values.max() / mean).item(), rel=0.06)
    assert found["quantiles"][0] == pytest.approx((values.min() / mean).item(), rel=0.06)
    apart = ((j_w - j_l).norm() / j_w.norm()).item()
    assert found["jacobian_difference"] == pytest.approx(apart, rel=0.05)
    cosine = ((j_w * j_l).sum() / (j_w.norm() * j_l.norm())).item()
    assert found["jacobian_cosine"] == pytest.approx(cosine, abs=0.05)


def test_lanczos_gives_the_moments_that_its_start_sees():
    g = torch.Generator().manual_seed(4)
    root = torch.randn(30, 30, generator=g, dtype=torch.float64)
    matrix = root @ root.T / 30
    start = torch.randn(30, generator=g, dtype=torch.float64)
    values, weights = lanczos(lambda v: matrix @ v, start, 6)
    unit = start / start.norm()
    assert len(values) == 6
    # A Gauss rule of 6 nodes is exact up to the 11th power.
    for power in range(12):
        expected = unit @ torch.linalg.matrix_power(matrix, power) @ unit
        assert (weights * values**power).sum().item() == pytest.approx(expected.item(), rel=1e-8)


def test_lanczos_stops_where_nothing_is_left():
    diagonal = torch.tensor([1.0, 1.0, 5.0, 5.0], dtype=torch.float64)
    values, weights = lanczos(lambda v: diagonal * v, torch.ones(4, dtype=torch.float64), 10)
    assert values.tolist() == pytest.approx([1.0, 5.0])
    assert weights.tolist() == pytest.approx([0.5, 0.5])


def test_an_isometry_has_no_variation(two):
    """J J^T of a linear map with |x| = 1 and a bias is 2 I."""
    unet = Mixer()
    unet.forward = lambda x, t, return_dict, encoder_hidden_states: (
        (x.flatten(1) @ unet.weight.T + unet.bias).reshape(x.shape),
    )
    x = torch.zeros(1, 2, 2, 2, dtype=torch.float64)
    x.view(-1)[3] = 1.0
    inputs = NoisedPairs(x, torch.tensor([7]), x, {"hidden": torch.zeros(1, 1, 1)})
    sample = Sample(Network(SD15(), unet), inputs)
    found = spectrum(sample, sample, 2, 8, torch.Generator().manual_seed(5))
    assert found["variation"] == pytest.approx(0.0, abs=1e-6)
    assert found["participation"] == pytest.approx(1.0)
    assert found["quantiles"] == pytest.approx([1.0] * len(QUANTILES))
    assert found["jacobian_difference"] == pytest.approx(0.0, abs=1e-6)
    assert found["jacobian_cosine"] == pytest.approx(1.0)
