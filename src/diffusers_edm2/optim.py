"""The learning rate as a function of images seen, and the guard against non-finite gradients."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def learning_rate(nimg: int, batch: int, ref_lr: float, ref_batches: float, rampup_images: float) -> float:
    """Learning rate of the step that starts after `nimg` images (EDM2 eq. 67).

        ref_lr * min(nimg / rampup_images, 1) / sqrt(max(nimg / (ref_batches * batch), 1))

    Args:
        nimg (`int`): images seen before the step, so the very first step has rate 0 under a ramp.
        batch (`int`): images per step.
        ref_lr (`float`): α_ref.
        ref_batches (`float`): t_ref, the steps after which the rate decays as 1/sqrt(steps); 0: no decay.
        rampup_images (`float`): length of the linear ramp; 0: no ramp.
    """
    ramp = min(nimg / rampup_images, 1) if rampup_images > 0 else 1.0
    decay = math.sqrt(max(nimg / (ref_batches * batch), 1)) if ref_batches > 0 else 1.0
    return ref_lr * ramp / decay


@torch.no_grad()
def guard_gradients(parameters: Iterable[nn.Parameter]) -> tuple[Tensor, Tensor]:
    """Set every non-finite element of the gradients to 0, in place (EDM2 Appendix B).

    There is no loss scaling and no skipped step: each step counts for the optimizer, the EMA and the clock.

    Returns the L2 norm of the guarded gradients, and the number of elements that were set to 0; both stay on the
    device, so that looking at them is the caller's choice.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        raise ValueError("no parameter has a gradient; call guard_gradients between backward() and optimizer.step().")
    bad = torch.stack([g.numel() - g.isfinite().sum() for g in grads]).sum()
    for g in grads:
        torch.nan_to_num(g, nan=0.0, posinf=0.0, neginf=0.0, out=g)
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    return norm, bad
