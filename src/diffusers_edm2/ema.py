"""Power-function exponential moving averages of model weights (EDM2, arXiv 2312.02696, Section 3 and Appendix C)."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn


def sigma_rel_to_gamma(sigma_rel: float) -> float:
    """Exponent γ of the profile whose standard deviation is `sigma_rel` of the training time (EDM2 eq. 126).

    The largest real root of γ³ + 7γ² + (16 - σ⁻²)γ + (12 - σ⁻²) = 0.

    Raises:
        ValueError: `sigma_rel` is not in (0, 12^-½ ≈ 0.2887), the range that power functions with γ > 0 can have.
    """
    if not 0 < sigma_rel < 12**-0.5:
        raise ValueError(
            f"sigma_rel={sigma_rel} is not in (0, 0.2886]; it is the EMA's length as a fraction of the training, "
            "typically 0.05 to 0.20."
        )
    t = sigma_rel**-2
    roots = np.roots([1, 7, 16 - t, 12 - t])
    return float(roots[np.isreal(roots)].real.max())


def gamma_to_sigma_rel(gamma: float) -> float:
    """σ_rel = sqrt(γ+1) / ((γ+2) sqrt(γ+3)), the inverse of `sigma_rel_to_gamma` (EDM2 eq. 123)."""
    return math.sqrt(gamma + 1) / ((gamma + 2) * math.sqrt(gamma + 3))


def ema_beta(gamma: float, nimg: int, batch: int) -> float:
    """Decay for the step from `nimg - batch` to `nimg` images (EDM2 eq. 127)."""
    return (1 - batch / nimg) ** (gamma + 1)


class PowerFunctionEMA:
    """Several power-function averages of one module, kept in float32 (EDM2 eq. 121, 127).

        ema <- β ema + (1 - β) weights,  β = (1 - Δ/nimg)^(γ+1),  Δ = images since the last update

    Δ is measured from call to call, so that any interval between updates gives the right profile. Frozen parameters
    and buffers, such as random Fourier features, are copied: what does not train has no average.

    Args:
        module (`nn.Module`): its parameters and buffers are tracked, under their `state_dict` names; on its final
            device, and not a compiled or distributed wrapper, which has other names.
        sigma_rel (`Sequence[float]`): the lengths to track, each in (0, 0.2886]; two or more allow other lengths to be
            reconstructed after training.
    """

    def __init__(self, module: nn.Module, sigma_rel: Sequence[float] = (0.05, 0.10)):
        if not sigma_rel or len(set(sigma_rel)) < len(sigma_rel):
            raise ValueError(f"sigma_rel={list(sigma_rel)} must be one or more different lengths.")
        self.module = module
        self.sigma_rel = tuple(sigma_rel)
        self.gamma = tuple(sigma_rel_to_gamma(s) for s in sigma_rel)
        self.nimg = 0
        self.tracks = {s: {name: _average_of(t).clone() for name, t in self._sources().items()} for s in sigma_rel}

    def _sources(self) -> dict[str, Tensor]:
        """The module's persistent tensors; parameters as themselves, to know which of them train."""
        return self.module.state_dict(keep_vars=True)

    @torch.no_grad()
    def update(self, nimg: int) -> None:
        """Take in the weights as they are after `nimg` images.

        Raises:
            ValueError: `nimg` is not above that of the last update.
        """
        if nimg <= self.nimg:
            raise ValueError(f"update(nimg={nimg}) after nimg={self.nimg}: the number of images seen has to grow.")
        sources = self._sources()
        trained = [name for name, t in sources.items() if t.requires_grad]
        weights = [_average_of(sources[name]) for name in trained]
        for sigma_rel, gamma in zip(self.sigma_rel, self.gamma, strict=True):
            track = self.tracks[sigma_rel]
            beta = ema_beta(gamma, nimg, nimg - self.nimg)
            torch._foreach_lerp_([track[name] for name in trained], weights, 1 - beta)
            for name in sources.keys() - set(trained):
                track[name].copy_(sources[name])
        self.nimg = nimg

    def averaged(self, sigma_rel: float) -> dict[str, Tensor]:
        """The averaged `state_dict` of one track (the tensors themselves, not copies)."""
        if sigma_rel not in self.tracks:
            raise ValueError(f"sigma_rel={sigma_rel} is not tracked; the tracks are {list(self.sigma_rel)}.")
        return self.tracks[sigma_rel]

    def copy_to(self, module: nn.Module, sigma_rel: float) -> None:
        """Write one track's weights into `module`, a network of the same shape, in the types that it has."""
        module.load_state_dict(self.averaged(sigma_rel))

    def state_dict(self) -> dict:
        """Everything that `load_state_dict` needs: {"nimg", "sigma_rel", "tracks": {σ_rel: {name: tensor}}}."""
        return {"nimg": self.nimg, "sigma_rel": list(self.sigma_rel), "tracks": self.tracks}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Continue from `state_dict()`.

        Raises:
            ValueError: the state has other tracks, or tensors of other names or shapes.
        """
        if tuple(state["sigma_rel"]) != self.sigma_rel:
            raise ValueError(f"the state tracks sigma_rel {list(state['sigma_rel'])}, this EMA {list(self.sigma_rel)}.")
        for sigma_rel, track in self.tracks.items():
            loaded = state["tracks"][sigma_rel]
            different = sorted(
                {n for n in track.keys() & loaded.keys() if track[n].shape != loaded[n].shape}
                | (track.keys() ^ loaded.keys())
            )
            if different:
                raise ValueError(
                    f"the state belongs to another network: {different[0]} and {len(different) - 1} others differ."
                )
            for name, tensor in track.items():
                tensor.copy_(loaded[name])
        self.nimg = state["nimg"]


def _average_of(t: Tensor) -> Tensor:
    """Where an average of `t` is kept: float32 or better for numbers with a fraction, the same type for others."""
    t = t.detach()
    return t.to(torch.promote_types(t.dtype, torch.float32)) if t.is_floating_point() else t
