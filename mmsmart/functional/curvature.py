"""Running mean of squared gradients, the diagonal of Fisher's matrix, held as logarithms.

Source: Molchanov et al., arXiv 1906.10771, who judge by the square of a gate's gradient what the
network loses without what is behind the gate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .threshold import parts

# What has no effect on the loss counts as this share of the mean.
_LEAST = 1e-8


@torch.no_grad()
def blend_log_squares(logs: Tensor, grad: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """Blend squares into their running mean q in place: log q becomes log((1 - r) q + r g²).

    Blocks without any effect count as 1e-8 of the mean of g². A gradient that is NaN or infinite
    somewhere, as after an overflow of a loss scaler, changes nothing. Never waits for a GPU.

    Args:
        logs: log q, float32 `(num_blocks,)`, changed; whatever it holds if the rate is 1.
        grad: g = ∂L/∂f, shape of logs, floating point.
        rate: r in (0, 1].

    Returns:
        Mean and standard deviation of the new logs, 0-dim float32, the latter infinity where all
        are the same: what is divided by it is 0.

    Example:
        >>> logs = torch.zeros(2)
        >>> mean, spread = blend_log_squares(logs, torch.tensor([1.0, -10.0]), rate=1.0)
        >>> logs.exp(), (logs - mean) / spread
        (tensor([  1.0000, 100.0000]), tensor([-1.,  1.]))
    """
    average = torch.dot(grad, grad) / len(grad)
    whole = average.isfinite()
    least = (_LEAST * average).clamp_min(torch.finfo(torch.float32).tiny).log()
    first = second = torch.zeros((), dtype=torch.float64, device=logs.device)
    for old, g in parts(logs, grad):
        share = torch.where(whole, rate, 0.0).to(old.dtype)
        new = torch.lerp(old.exp(), g.to(old.dtype).square(), share).log_()
        new = torch.where(whole, new.clamp_min_(least), old)
        old.copy_(new)
        x = new.double()
        first = first + x.sum()
        second = second + torch.dot(x, x)
    mean = first / len(logs)
    spread = (second / len(logs) - mean * mean).clamp_min(0).sqrt()
    # A smaller spread is the rounding of what is all the same.
    return mean.float(), torch.where(spread > 1e-4, spread, torch.inf).float()
