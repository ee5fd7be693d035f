"""What is retained: a function of the singular values of all that was learnt.

At the end of a task the adapters of a layer are stacked and decomposed, ``M = U S V^T``. A
retention answers with a gain for each singular value; the best part of fixed rank of ``U (rho S)
V^T`` is retained. Source: docs/method.md (M8) to (M12); DEAL, arXiv 2509.18942, eqs. 7 to 9. The
learned gate of the paper is in :mod:`deal_core.baselines.deal_reference`.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from deal_core.config.experiment import RetentionConfig
from deal_core.errors import choose
from deal_core.lora.adapter import Adapter, Spectrum, refactor, spectrum, strong_part

KERNELS = 16
"""Heat kernels over a layer's spectrum, centred at its quantiles."""
WIDTH = 0.5
"""Of a kernel in units of ``S_1 / KERNELS``: towards 0 each singular value has the gain of its
nearest centre, towards infinity all have the mean gain."""
NEGLIGIBLE = 1e-6
"""Singular values below this part of the largest are rounding of float32 factors: zeros."""


def wavelet(S: Tensor, rank: int) -> Tensor:
    """Return gains in [0, 1] that do not decrease with ``S``: values near the noise floor shrink,
    those far below it vanish.

    Large singular values hold what tasks taught, small ones what is redundant or noise. A few heat
    kernels of one width, centred at quantiles of the spectrum, carry the shrinkage of DEAL's eq. 7,
    whatever the size of a layer.

    Args:
        S: singular values of a layer, descending, zeros included, the first one positive.
        rank: the most that can be signal; the floor is estimated from what lies beyond.
    """
    x = S / S[0]
    quantiles = torch.linspace(0.0, 1.0, KERNELS, dtype=x.dtype)
    centres = torch.quantile(x[x > NEGLIGIBLE], quantiles)
    gains = shrinkage(centres * S[0], noise_floor(S, rank))
    return kernel_mean(x, centres, WIDTH / KERNELS, gains)


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


def shrinkage(levels: Tensor, noise: float) -> Tensor:
    """Return ``max(0, 1 - (sigma_D / level)^2)`` for positive ``levels = c_j S_1``, ``(J,)`` (M11).

    The Wiener shrinkage of the paper's eq. 7; for few directions in a large layer it is also the
    best one in the Frobenius norm (Gavish and Donoho, "Optimal shrinkage of singular values", 2017,
    at aspect ratio 0).
    """
    return (1.0 - (noise / levels) ** 2).clamp(min=0.0)


def noise_floor(S: Tensor, rank: int) -> float:
    """Return the noise floor ``sigma_D`` of a layer: the median of ``S`` beyond ``rank`` (M12).

    Gavish and Donoho ("The optimal hard threshold for singular values is 4/sqrt(3)", 2014) take
    the median of a spectrum for its noise. At most ``rank`` directions are worth keeping, so here
    the others count as noise. 0, hence no shrinkage, where everything learnt fits into ``rank`` or
    where half of the directions beyond it are zero.
    """
    beyond = S[rank:]
    if beyond.numel() == 0:
        return 0.0
    floor = float(beyond.median())
    return floor if floor > NEGLIGIBLE * float(S[0]) else 0.0


Retention = Callable[[Tensor, int], Tensor]
"""Singular values of a layer, descending, the first one positive; how many directions are kept at
most -> gains, of the same shape. Gains that do not decrease with the singular values keep
the leading part the best one."""


def svd(S: Tensor, rank: int) -> Tensor:
    """Return gains of 1: the best part of a matrix is its truncated SVD (Eckart-Young)."""
    return torch.ones_like(S)


RETENTIONS: Mapping[str, Retention] = {"svd": svd, "wavelet": wavelet}
"""``method.retention.filter`` (default ``svd``) to the gains of singular values; called through
:func:`retain` where a task ends and where two components become one (one of one's own:
docs/extending.md)."""


def retain(adapter: Adapter, rank: int, config: RetentionConfig) -> Adapter:
    """Return the best rank-``rank`` part of what a retention leaves of every layer of ``adapter``,
    all that was learnt; scaling 1, padded with zeros. Cost per layer that of one thin SVD.

    Raises:
        UserError: unknown retention.
    """
    gains = choose("method.retention.filter", config.filter, RETENTIONS)
    layers = {}
    for name, factors in adapter.layers.items():
        parts = spectrum(factors, adapter.scaling)
        kept = strong_part(parts, NEGLIGIBLE)
        if number := kept.S.numel():
            rho = gains(parts.S, rank)[:number]
            kept = Spectrum(kept.U, rho * kept.S, kept.Vh)
        layers[name] = refactor(kept, rank)
    return Adapter(layers)
