"""What a training log shows: loss by noise level, and the magnitudes that EDM2 is about."""

import math

import torch
from torch import Tensor, nn

# Edges of the noise-level intervals, half a decade each.
SIGMA_EDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


class LossMeter:
    """Sums of losses between two log lines, on the device, so that counting never waits for it.

    `sums` (float64) holds, in this order: steps, gradient norms, non-finite gradient elements, samples, u, and then the
    samples and the losses of each noise-level interval. Adding the `sums` of several processes combines them.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self.intervals = len(SIGMA_EDGES) + 1
        self.edges = torch.tensor(SIGMA_EDGES, device=device)
        dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64  # MPS has no float64
        self.sums = torch.zeros(5 + 2 * self.intervals, dtype=dtype, device=device)

    def add_samples(self, loss_per_sample: Tensor, logvar: Tensor, sigma: Tensor) -> None:
        """Count a micro-batch; all arguments [B]."""
        interval = torch.bucketize(sigma, self.edges)
        ones = torch.ones_like(self.sums[:1]).expand(len(sigma))
        self.sums[3] += len(sigma)
        self.sums[4] += logvar.to(self.sums).sum()
        self.sums[5 : 5 + self.intervals].index_add_(0, interval, ones)
        self.sums[5 + self.intervals :].index_add_(0, interval, loss_per_sample.to(self.sums))

    def add_step(self, grad_norm: Tensor, nonfinite: Tensor) -> None:
        """Count an optimizer step."""
        self.sums[:3] += torch.stack([torch.ones_like(grad_norm), grad_norm, nonfinite.to(grad_norm)]).to(self.sums)

    def means(self, sums: Tensor | None = None) -> dict[str, float]:
        """The averages of a log line, from `sums` (of all processes) or our own; empty intervals are left out.

        grad_norm and nonfinite_gradients (elements) are means over the steps, which every process counts alike.
        loss is the mean over samples, channels and pixels; loss/sigma_A-B that of the samples with A < σ <= B.
        """
        values = (self.sums if sums is None else sums).tolist()
        steps, norms, nonfinite, samples, u = values[:5]
        counts, losses = values[5 : 5 + self.intervals], values[5 + self.intervals :]
        means = {
            "loss": sum(losses) / samples,
            "logvar": u / samples,
            "grad_norm": norms / steps,
            "nonfinite_gradients": nonfinite / steps,
        }
        edges = (0.0, *SIGMA_EDGES, math.inf)
        for low, high, count, loss in zip(edges, edges[1:], counts, losses, strict=False):
            if count:
                means[f"loss/sigma_{low:g}-{high:g}"] = loss / count
        return means

    def restore(self, sums: Tensor, rank: int, world: int) -> None:
        """Go on from the `sums` of all processes, stacked: each from its own, or the first from all of them.

        Args:
            sums: float64 [processes then, ...]
            rank, world: this process and how many there are now; the averages are the same for any number.
        """
        if len(sums) == world:
            self.sums.copy_(sums[rank])
        elif rank == 0:
            self.sums.copy_(sums.sum(0))
            self.sums[:3] *= world / len(sums)  # steps are counted by every process

    def reset(self) -> None:
        self.sums.zero_()


@torch.no_grad()
def weight_magnitudes(unet: nn.Module) -> dict[str, float]:
    """Root mean square of the weights, by side and resolution ("weights/enc_64x64"); 1 right after normalisation."""
    groups: dict[str, list[Tensor]] = {}
    for name, parameter in unet.named_parameters():
        side, _, rest = name.partition(".")
        if side in ("enc", "dec") and parameter.ndim > 1:
            groups.setdefault(f"weights/{side}_{rest.split('_')[0]}", []).append(parameter)
    return {
        name: math.sqrt(sum(float(p.float().square().sum()) for p in parameters) / sum(p.numel() for p in parameters))
        for name, parameters in groups.items()
    }


@torch.no_grad()
def activation_magnitudes(unet: nn.Module, *inputs: Tensor | None) -> dict[str, float]:
    """Root mean square of the blocks' outputs, averaged by side and resolution ("activations/dec_8x8").

    Runs `unet(*inputs)` once in evaluation mode; the network is left as it was.
    """
    found: dict[str, list[Tensor]] = {}

    def record(group: str):
        return lambda module, args, output: found.setdefault(group, []).append(output.float().square().mean().sqrt())

    hooks = [
        block.register_forward_hook(record(f"activations/{side}_{name.split('_')[0]}"))
        for side in ("enc", "dec")
        for name, block in unet.get_submodule(side).named_children()
    ]
    training = unet.training
    unet.eval()
    try:
        unet(*inputs)
    finally:
        unet.train(training)
        for hook in hooks:
            hook.remove()
    return {group: float(torch.stack(values).mean()) for group, values in found.items()}
