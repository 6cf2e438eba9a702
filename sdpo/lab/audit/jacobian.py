"""What the method assumes of the UNet's Jacobians, measured.

The safeguard puts residuals where gradients over the parameters would be. With J the Jacobian of
one sample's output (n numbers) in the parameters, the gradient of its error is 2/n J^T r, so that

    <J_w^T r_w, J_l^T r_l> = r_w^T (J_w J_l^T) r_l     stands for     <r_w, r_l> .

That is exact up to a common factor where J_w J_l^T is a multiple of the identity, hence where the
two Jacobians are alike and J J^T has one eigenvalue n times.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from scipy.linalg import eigh_tridiagonal
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sdpo.lab.audit.gradients import Gradients, Network, derivative, inner
from sdpo.models.forward import NoisedPairs

# Quantiles of the spectrum of J J^T that are kept.
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


@dataclass
class Sample:
    """One sample's output as a function of the parameters."""

    network: Network
    inputs: NoisedPairs

    def __post_init__(self) -> None:
        with sdpa_kernel(SDPBackend.MATH):
            self.output = self.network.predict(self.inputs)
        self.residual = (self.output - self.inputs.target).detach()

    def transposed(self, v: Tensor) -> Gradients:
        """Compute J^T v, `v` shaped like the output, (1, C, h, w)."""
        parameters = list(self.network.parameters.values())
        return list(torch.autograd.grad(self.output, parameters, v, retain_graph=True))

    def applied(self, displacement: Gradients) -> Tensor:
        """Compute J d, shaped like the output."""
        return derivative(
            lambda parameters: self.network.predict_at(parameters, self.inputs),
            self.network.values(),
            self.network.named(displacement),
        )

    def gram(self, v: Tensor) -> Tensor:
        """Compute J J^T v."""
        return self.applied(self.transposed(v))


def branch_alignment(winner: Sample, loser: Sample) -> dict[str, float]:
    """Take inner products and squared norms of one pair's residuals and of its parameter gradients
    J^T r (without the common factor 2/n), from which cosines, norm ratios and scales follow."""
    found = {}
    for space, w, l in (  # noqa: E741
        ("output", [winner.residual], [loser.residual]),
        ("parameter", winner.transposed(winner.residual), loser.transposed(loser.residual)),
    ):
        found[f"{space}_inner"] = inner(w, l)
        found[f"{space}_winner_sq"] = inner(w, w)
        found[f"{space}_loser_sq"] = inner(l, l)
    return found


def spectrum(
    winner: Sample, loser: Sample, probes: int, iterations: int, generator: torch.Generator
) -> dict[str, Any]:
    """Estimate the spectrum of J_w J_w^T and how far J_w and J_l are apart, at random.

    With v standard normal, E |J^T v|^2 is the squared Frobenius norm of J, and the difference's
    likewise (Hutchinson 1989). Quantiles of the eigenvalues come from stochastic Lanczos quadrature
    (Ubaru, Chen & Saad 2017), averaged over the probes.

    Returns: dimension n; mean eigenvalue; coefficient of variation of the eigenvalues (0 for an
    isometry up to a factor); participation (sum of eigenvalues)^2 / (n * sum of squares), between
    1/n and 1; the largest Ritz value and the quantiles, all three over the mean eigenvalue;
    |J_w - J_l| / |J_w| in the Frobenius norm; and their cosine, <J_w, J_l> / (|J_w| |J_l|).
    """
    n = winner.output.numel()
    shape = winner.output.shape
    nodes, weights = [], []
    sums = dict.fromkeys(("ww", "ll", "wl"), 0.0)
    for _ in range(probes):
        v = torch.randn(shape, generator=generator).to(winner.output)
        pulled_w, pulled_l = winner.transposed(v), loser.transposed(v)
        sums["ww"] += inner(pulled_w, pulled_w)
        sums["ll"] += inner(pulled_l, pulled_l)
        sums["wl"] += inner(pulled_w, pulled_l)
        values, mass = lanczos(winner.gram, v, iterations)
        nodes.append(values)
        weights.append(mass / probes)
    values, mass = torch.cat(nodes), torch.cat(weights)
    mean = (mass * values).sum().item()
    square = (mass * values.square()).sum().item()
    order = values.argsort()
    below = mass[order].cumsum(0) - 0.5 * mass[order]
    at = [values[order][int((below < q).sum().clamp(max=len(order) - 1))] for q in QUANTILES]
    difference = sums["ww"] + sums["ll"] - 2 * sums["wl"]
    return {
        "dimension": n,
        "mean_eigenvalue": mean,
        "variation": max(square / mean**2 - 1.0, 0.0) ** 0.5,
        "participation": mean**2 / square,
        "largest": values.max().item() / mean,
        "quantiles": [x.item() / mean for x in at],
        "jacobian_difference": (difference / sums["ww"]) ** 0.5,
        "jacobian_cosine": sums["wl"] / (sums["ww"] * sums["ll"]) ** 0.5,
    }


def lanczos(
    matrix: Callable[[Tensor], Tensor], start: Tensor, iterations: int
) -> tuple[Tensor, Tensor]:
    """Compute the Gauss quadrature of a symmetric matrix' spectrum as `start` sees it.

    Golub & Meurant 2010, chapter 6; the basis is orthogonalised in full, in float64.

    Args:
        matrix: applies it to a tensor shaped like `start`.

    Returns:
        Nodes (Ritz values) and weights that sum to 1, (k,) float64 on the CPU, k <= `iterations`.
    """
    first = start.double().flatten()
    basis = [first / first.norm()]
    diagonal, beside = [], []
    for _ in range(min(iterations, start.numel())):
        v = basis[-1]
        w = matrix(v.reshape(start.shape).to(start.dtype)).double().flatten()
        diagonal.append(torch.dot(w, v).item())
        stacked = torch.stack(basis)
        for _ in range(2):
            w = w - stacked.T @ (stacked @ w)
        length = w.norm().item()
        # Nothing new is left but rounding: the basis spans all that `start` reaches.
        if length <= 1e-6 * max(map(abs, diagonal)):
            break
        beside.append(length)
        basis.append(w / length)
    values, vectors = eigh_tridiagonal(diagonal, beside[: len(diagonal) - 1])
    return torch.from_numpy(values), torch.from_numpy(vectors[0] ** 2)
