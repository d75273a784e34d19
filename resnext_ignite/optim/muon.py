"""Defines the optimizer Muon. It orthogonalises the update of a convolution for each channel group separately.

All other parameters are updated with SGD.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd

# Coefficients from K. Jordan, 'Muon: An optimizer for hidden layers in neural networks'
# (kellerjordan.github.io/posts/muon): a quintic polynomial with a slope at 0 as large as possible. Five iterations map
# singular values from [0.002, 1] into [0.68, 1.21].
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5


def orthogonalised(matrices: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return matrices with the same singular vectors as the input, but with all singular values near 1.

    Use Newton-Schulz iterations: (B, rows, columns) -> (B, rows, columns). A matrix of zeros stays a matrix of zeros.

    Args:
        dtype: precision of the products; None: the dtype of the matrices.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    # The Frobenius norm bounds the largest singular value. Tall matrices are transposed, so that `square` is the
    # smaller of the two Gram matrices.
    x = matrices / torch.linalg.matrix_norm(matrices, keepdim=True).clamp(min=1e-7)
    x = (x.mT if tall else x).to(dtype or x.dtype)
    for _ in range(_ITERATIONS):
        square = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=_B, alpha=_C), x, beta=_A)
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Muon for convolutions and SGD for all other weights; `conv_groups` of a parameter group selects the method.

    `conv_groups` = 0 selects SGD, where `weight_decay` is an L2 penalty.

    `conv_groups` = g > 0 selects Muon, for weights (out, in / g, k, k) of convolutions with g groups. Muon splits the
    update of a weight into g matrices (out / g, in / g * k * k), one for each group, and orthogonalises each matrix
    alone. With one matrix for all groups, the rows of different groups would become orthogonal to each other, although
    these groups have different inputs. The step is the orthogonalised matrix times `lr` * sqrt(max(1, rows / columns)).
    `weight_decay` is decoupled from the gradient: each step multiplies the weights by 1 - `lr` * `weight_decay`.
    Momentum and Nesterov momentum are computed as in `torch.optim.Muon`. `torch.optim.Muon` itself is not used, because
    it supports only single matrices and only bf16.

    With a GradScaler (fp16), the host waits in each iteration for the overflow check, which decides whether to skip the
    update.

    Args:
        groups: parameter groups.
        lr: learning rate of each parameter group that does not set `lr`.
        momentum: momentum of each parameter group that does not set `momentum`.
        nesterov: use Nesterov momentum, for both methods.
        exact: on a GPU, orthogonalise in the precision of the weights (float32), not in bf16. A CPU always does so.
    """

    def __init__(
        self, groups: list[dict[str, Any]], *, lr: float, momentum: float, nesterov: bool, exact: bool = False
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": 0.0, "conv_groups": 0}
        super().__init__(groups, defaults)
        self.exact = exact

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                (self._step_of_muon if group["conv_groups"] else self._step_of_sgd)(parameters, group)
        return loss

    def _momenta(self, parameters: list[Tensor]) -> list[Tensor]:
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return [self.state[parameter]["momentum_buffer"] for parameter in parameters]

    def _step_of_sgd(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        sgd(
            parameters,
            _gradients(parameters),
            list(self._momenta(parameters)),
            fused=True,
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=0.0,
            nesterov=group["nesterov"],
            maximize=False,
        )

    def _step_of_muon(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        lr, momentum, conv_groups = group["lr"], group["momentum"], group["conv_groups"]
        gradients, momenta = _gradients(parameters), self._momenta(parameters)
        torch._foreach_lerp_(momenta, gradients, 1 - momentum)
        updates = torch._foreach_lerp(gradients, momenta, momentum) if group["nesterov"] else momenta
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
        alike: defaultdict[torch.Size, list[int]] = defaultdict(list)
        for index, parameter in enumerate(parameters):
            alike[parameter.shape].append(index)
        for shape, indices in alike.items():
            # L updates (out, in / g, k, k) -> (L * g, out / g, in / g * k * k)
            matrices = torch.cat([updates[k].reshape(conv_groups, shape[0] // conv_groups, -1) for k in indices])
            steps = orthogonalised(matrices, torch.bfloat16 if matrices.is_cuda and not self.exact else None)
            scale = math.sqrt(max(1, matrices.shape[1] / matrices.shape[2]))
            torch._foreach_add_(
                [parameters[k] for k in indices],
                [step.reshape(shape) for step in steps.split(conv_groups)],
                alpha=-lr * scale,
            )


def _gradients(parameters: list[Tensor]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]
