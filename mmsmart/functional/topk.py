"""Soft and hard top-k masks under a budget.

Source: SMART pruner, arXiv 2403.19969. Notation: m importance, c cost, B budget, τ temperature,
θ threshold, f soft mask, h hard mask.

    f_i = σ((m_i - θ)/τ)   with θ such that   Σ c_i f_i = B

As τ falls to 0, f turns into h (Theorem 3.1), and L(w ⊙ f) into the loss of the pruned network
(Theorem 3.3).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._checks import check_importance, check_temperature, checked_budget, flat_cost, on_host
from .threshold import parts, solve_threshold


def soft_topk(
    importance: Tensor,
    budget: float | Tensor,
    temperature: float,
    cost: Tensor | None = None,
) -> Tensor:
    """Spread the budget over the blocks by importance, differentiably: a mask f with Σ c_i f_i = B.

    The budget is met to 1e-6 of itself before the mask is rounded to its dtype. A budget of 0 gives
    exactly zeros and one equal to the total cost exactly ones, both with gradient zero. The
    gradient flows to importance alone, in closed form (see `soft_topk_vjp`).

    On a GPU nothing here waits for the device; the values of importance, cost and budget are not
    checked there, and a NaN in them gives NaN.

    Args:
        importance: m, any shape, floating point; the sums are float64 whatever its dtype.
        budget: B, in [0, total cost]; a float or a 0-dim tensor.
        temperature: τ > 0. Small τ gives masks near 0 and 1, large τ masks near B / total cost.
        cost: c > 0, shape of importance; None means 1 for every block.

    Returns:
        f in [0, 1], shape and dtype of importance.

    Raises:
        ValueError: an argument is outside what is said above, or on a CPU importance is not finite.

    Example:
        >>> m = torch.tensor([2.0, 1.0, 0.0, -1.0])
        >>> soft_topk(m, budget=2.0, temperature=1.0)
        tensor([0.8176, 0.6225, 0.3775, 0.1824])
        >>> soft_topk(m, budget=2.0, temperature=0.01)
        tensor([1.0000e+00, 1.0000e+00, 1.9287e-22, 0.0000e+00])
    """
    return _SoftTopK.apply(importance, budget, temperature, cost)


class _SoftTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx, importance, budget, temperature, cost):
        threshold = solve_threshold(importance, budget, temperature, cost)
        ctx.save_for_backward(importance, threshold, cost)
        ctx.temperature = temperature
        return soft_mask(importance, threshold, temperature)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_mask):
        importance, threshold, cost = ctx.saved_tensors
        # All but the gradient was checked on the way forward.
        price = None if cost is None else cost.reshape(-1)
        grad = _vjp(importance, threshold, ctx.temperature, grad_mask, price)
        return grad, None, None, None


def soft_mask(importance: Tensor, threshold: float | Tensor, temperature: float) -> Tensor:
    """Evaluate the soft mask at a known threshold: σ((m_i - θ)/τ).

    Autograd through this function holds θ fixed and is therefore not the gradient of `soft_topk`.

    Args:
        importance: m, any shape, floating point.
        threshold: θ, a float or 0-dim tensor; ±inf gives exactly 0 and 1.
        temperature: τ > 0.

    Returns:
        f in [0, 1], shape and dtype of importance.

    Raises:
        ValueError: importance is empty or not floating point, or τ is not > 0 and finite.

    Example:
        >>> soft_mask(torch.tensor([1.0, 0.0]), threshold=0.0, temperature=1.0)
        tensor([0.7311, 0.5000])
    """
    check_importance(importance)
    check_temperature(temperature)
    m = importance.reshape(-1)
    own = threshold.reshape(-1) if isinstance(threshold, Tensor) and threshold.ndim else None
    if m.requires_grad and torch.is_grad_enabled():
        wide = m.to(torch.float64) - (threshold if own is None else own)
        return (wide / temperature).sigmoid().to(m.dtype).view(importance.shape)
    mask = torch.empty_like(m)
    cut = list(parts(m, mask, own))
    scratch = torch.empty_like(cut[0][0], dtype=torch.float64)
    for part, out, theta in cut:
        # At small τ the difference needs every digit.
        x = scratch[: len(part)].copy_(part).sub_(threshold if theta is None else theta)
        out.copy_(x.mul_(1 / temperature).sigmoid_())
    return mask.view(importance.shape)


@torch.no_grad()
def soft_topk_vjp(
    importance: Tensor,
    threshold: float | Tensor,
    temperature: float,
    grad_mask: Tensor,
    cost: Tensor | None = None,
) -> Tensor:
    """Turn ∂L/∂f into ∂L/∂m, θ moving with m so that the budget stays met.

    With v_i = f_i (1 - f_i)/τ and g_i = ∂L/∂f_i:

        ∂L/∂m_j = v_j (g_j - c_j ḡ),   ḡ = Σ_i v_i g_i / Σ_i c_i v_i

    Where every v underflows to 0 (the mask is hard to the last bit), the gradient is zero.

    Args:
        importance: m, any shape, floating point.
        threshold: θ of `solve_threshold` for this importance; ±inf gives zeros.
        temperature: τ > 0.
        grad_mask: ∂L/∂f, shape of importance.
        cost: c > 0, shape of importance; None means 1 for every block.

    Returns:
        ∂L/∂m, shape and dtype of importance.

    Raises:
        ValueError: an argument is outside what is said above.

    Example:
        >>> m, grad = torch.tensor([1.0, 0.0, -1.0]), torch.tensor([0.0, 1.0, 0.0])
        >>> theta = solve_threshold(m, 1.5, temperature=1.0)
        >>> soft_topk_vjp(m, theta, 1.0, grad)
        tensor([-0.0764,  0.1528, -0.0764])
    """
    check_importance(importance)
    check_temperature(temperature)
    price = flat_cost(cost, importance)
    if grad_mask.shape != importance.shape:
        raise ValueError(
            f'grad_mask and importance must have the same shape:\n'
            f'  grad_mask:  {tuple(grad_mask.shape)}\n'
            f'  importance: {tuple(importance.shape)}\n'
            f'Give the gradient of the loss by each entry of the mask'
        )
    return _vjp(importance, threshold, temperature, grad_mask, price)


def _vjp(
    importance: Tensor,
    threshold: float | Tensor,
    temperature: float,
    grad_mask: Tensor,
    price: Tensor | None,
) -> Tensor:
    m, g = importance.reshape(-1), grad_mask.reshape(-1)
    # The result holds τ v, then ∂L/∂m; a half precision would round the former too coarsely.
    result = torch.empty_like(m, dtype=torch.promote_types(m.dtype, torch.float32))
    cut = list(parts(m, g, result, price))
    scratch = [torch.empty_like(cut[0][0], dtype=torch.float64) for _ in range(2)]
    weight = moved = 0.0
    for part, grad, out, cost in cut:
        v, pull = (room[: len(part)] for room in scratch)
        # f (1 - f) from the one of both that is at most 1/2: near 1 the difference would cancel.
        v.copy_(part).sub_(threshold).abs_().mul_(-1 / temperature).sigmoid_()
        v.addcmul_(v, v, value=-1)
        weight = weight + (v.sum() if cost is None else torch.dot(cost.double(), v))
        moved = moved + torch.dot(v, pull.copy_(grad))
        if len(cut) > 1:
            out.copy_(v)
    mean = moved / weight.clamp_min(math.ulp(0.0))  # where the weight is 0, so is what it divides
    for part, grad, out, cost in cut:
        v, pull = (room[: len(part)] for room in scratch)
        if len(cut) > 1:
            v.copy_(out)
            pull.copy_(grad)
        if cost is None:
            pull.sub_(mean)
        else:
            pull.addcmul_(cost.double(), mean, value=-1)
        out.copy_(pull.mul_(v).mul_(1 / temperature))
    return result.view(importance.shape).to(importance.dtype)


@torch.no_grad()
def hard_topk(importance: Tensor, budget: float | Tensor, cost: Tensor | None = None) -> Tensor:
    """Keep the most important blocks whose cost fits the budget: a mask of 0 and 1.

    Blocks are taken in order of falling importance, ties by lower index, each if it still fits in
    what is left of the budget. Hence Σ c_i h_i ≤ B, and no pruned block could be added without
    going over B. Costs are summed in float64: exact for whole numbers, and else to rounding. The
    budget is taken as it is: where (1 - s) * total comes out a rounding error below a whole number,
    round it before.

    Runs on any device, but waits for it: meant for the end of the search, not for every step.

    Args:
        importance: m, any shape, floating point, no NaN.
        budget: B, in [0, total cost]; a float or a 0-dim tensor.
        cost: c > 0, shape of importance; None means 1 for every block.

    Returns:
        h, shape and dtype of importance.

    Raises:
        ValueError: an argument is outside what is said above.

    Example:
        >>> m, cost = torch.tensor([4.0, 3.0, 2.0, 1.0]), torch.tensor([4, 4, 2, 1])
        >>> hard_topk(m, budget=6.0, cost=cost)
        tensor([1., 0., 1., 0.])
    """
    check_importance(importance)
    price = flat_cost(cost, importance)
    total = float(importance.numel()) if price is None else price.sum().item()
    left = checked_budget(budget, total)
    m = importance.detach().reshape(-1)
    if on_host(m) and m.isnan().any():
        raise ValueError(
            f'importance has {int(m.isnan().sum())} NaN of {m.numel()} entries, which have no '
            f'place in an order. NaN usually means that training diverged'
        )
    order = torch.argsort(m, descending=True, stable=True)
    mask = torch.zeros_like(m)
    if price is None:
        mask[order[: int(left)]] = 1
        return mask.view(importance.shape)

    price = price[order]
    while order.numel():
        # Take blocks until one does not fit; it and all that cost as much never will again.
        spent = price.cumsum(0)
        run = int(torch.searchsorted(spent, left, right=True))
        mask[order[:run]] = 1
        if run:
            left -= spent[run - 1].item()
        fits = price[run:] <= left
        order, price = order[run:][fits], price[run:][fits]
    return mask.view(importance.shape)
