"""Retention: a filter on the singular spectrum of all that was learnt, then its best part.

Large singular values hold what tasks taught, small ones what is redundant or noise. The filter
is a sum of heat kernels over the spectrum, each with a gain: few numbers, whatever the size of
a layer. Source: docs/method.md (M8) to (M12); DEAL, arXiv 2509.18942, eqs. 7
to 9.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from deal_core.config.method import RetentionConfig
from deal_core.lora.adapter import Adapter, Spectrum, refactor, spectrum, strong_part

NEGLIGIBLE = 1e-6
"""Singular values below this part of the largest are rounding of float32 factors: zeros."""


def retain(adapter: Adapter, rank: int, config: RetentionConfig) -> Adapter:
    """Return the best rank-``rank`` part of the filtered update of every layer, scaling 1.

    Cost per layer that of one thin SVD through the factors; the size of the result depends on
    ``rank`` alone. An adapter of zeros stays zero.

    Args:
        adapter: the stack of everything learnt.
        rank: of the result; smaller spectra are padded with zeros.
        config: the filter, its kernels and its noise floor (0: estimated for each layer, see
            :func:`bulk_noise`).
    """
    layers = {}
    for name, factors in adapter.layers.items():
        parts = spectrum(factors, adapter.scaling)
        kept = filtered(parts, config.noise or bulk_noise(parts.S, rank), config)
        layers[name] = refactor(kept, rank)
    return Adapter(layers)


def filtered(parts: Spectrum, noise: float, config: RetentionConfig) -> Spectrum:
    """Return the spectrum with ``S'_k = rho_k S_k`` (M9).

    ``rho`` does not decrease with ``S``, so ``S'`` still descends and its leading part is the
    best. Directions that are numerically zero are dropped.

    Args:
        parts: of one layer.
        noise: ``sigma_D``, in the unit of ``S``; 0: the Wiener gains are the identity; from
            ``S_1`` on: they remove everything.
        config: names the gains; the number and width of the kernels.
    """
    kept = strong_part(parts, NEGLIGIBLE)
    if kept.S.numel() == 0:
        return kept
    x = kept.S / kept.S[0]
    centres = torch.quantile(x, torch.linspace(0.0, 1.0, config.kernels, dtype=x.dtype))
    gains = GAINS[config.filter](centres * kept.S[0], noise)
    rho = kernel_mean(x, centres, config.width / config.kernels, gains)
    return Spectrum(kept.U, rho * kept.S, kept.Vh)


def kernel_mean(x: Tensor, centres: Tensor, tau: float, gains: Tensor) -> Tensor:
    """Return ``rho_k = sum_j phi_j(x_k) g_j / sum_j phi_j(x_k)``, ``(k,)`` (M10).

    ``phi_j(x) = exp(-(x - c_j)^2 / 2 tau^2)``. All kernels have one width: then the share of
    the larger centres grows with ``x``, and ``rho`` does not decrease where ``g`` does not
    (kernels of different widths would break this: in the tails the widest one wins). As ``tau``
    goes to 0, ``rho_k`` goes to the gain of the nearest centre; as it grows, to the mean gain.

    Args:
        x: singular values in units of ``S_1``, ``(k,)``.
        centres: of the kernels, ``(J,)``.
        tau: their width, positive.
        gains: of the kernels, ``(J,)``.
    """
    exponents = -((x[:, None] - centres) ** 2) / (2.0 * tau**2)
    # Each row up to a factor: its largest kernel counts as 1, so far from all nothing is 0 / 0.
    phi = (exponents - exponents.amax(dim=1, keepdim=True)).exp()
    return (phi * gains).sum(dim=1) / phi.sum(dim=1)


def bulk_noise(S: Tensor, rank: int) -> float:
    """Return the noise floor ``sigma_D`` of a layer: the median of ``S`` beyond ``rank`` (M12).

    Gavish and Donoho ("The optimal hard threshold for singular values is 4/sqrt(3)", 2014) take
    the median of all singular values, most of which are noise, and divide it by the median of
    the Marchenko-Pastur law. A stack of few factors has no such
    bulk: its rank is small beside the layer. But at most ``rank`` directions are worth keeping
    by configuration, so the others are the noise; and because they are few beside the inputs
    and outputs, noise alone would give them all nearly one value (the law narrows to its
    median, 1), the paper's ``D^T D = sigma_D^2 I``.

    0, hence no shrinkage, where everything learnt fits into ``rank`` or where half of the
    directions beyond it are zero.

    Args:
        S: all singular values, descending, zeros included.
        rank: the most that can be signal.
    """
    beyond = S[rank:]
    if beyond.numel() == 0:
        return 0.0
    floor = float(beyond.median())
    return floor if floor > NEGLIGIBLE * float(S[0]) else 0.0


def identity_gains(levels: Tensor, noise: float) -> Tensor:
    """Return gains of 1 everywhere, ``(J,)``: plain truncation."""
    return torch.ones_like(levels)


def wiener_gains(levels: Tensor, noise: float) -> Tensor:
    """Return ``max(0, 1 - (sigma_D / level)^2)`` for positive ``levels = c_j S_1``, ``(J,)`` (M11).

    The shrinkage of the paper's eq. 7; for few directions in a large layer it is also the best
    one in the Frobenius norm (Gavish and Donoho, "Optimal shrinkage of singular values", 2017,
    at aspect ratio 0).
    """
    return (1.0 - (noise / levels) ** 2).clamp(min=0.0)


GAINS: Mapping[str, Callable[[Tensor, float], Tensor]] = {
    "identity": identity_gains,
    "wiener": wiener_gains,
}
"""Name to gains."""
