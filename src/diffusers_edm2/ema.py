"""Power-function exponential moving averages of model weights (EDM2, arXiv 2312.02696, Section 3 and Appendix C)."""

import math
import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

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


# ---- The tracker --------------------------------------------------------------------------------


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
        state = self.module.state_dict(keep_vars=True)
        return {
            name: value for name, value in state.items() if isinstance(value, Tensor)
        }  # extra state may be anything

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
            if trained:
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
        module.load_state_dict({**module.state_dict(), **self.averaged(sigma_rel)})

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


# ---- The name of a snapshot -----------------------------------------------------------------------


def snapshot_name(nimg: int, sigma_rel: float) -> str:
    """The name of a track's folder, "unet-000524288-0.050": at least 3 decimals, and all that `sigma_rel` has."""
    return f"unet-{nimg:09d}-{np.format_float_positional(sigma_rel, min_digits=3)}"


def parse_snapshot_name(name: str) -> tuple[int, float] | None:
    """(nimg, sigma_rel) of a `snapshot_name`, exactly; None for any other name."""
    match = re.fullmatch(r"unet-([0-9]{9,})-([0-9]+\.[0-9]+)", name)
    return (int(match[1]), float(match[2])) if match else None


def parse_sigma_rel(text: str) -> tuple[float, ...]:
    """Lengths from text: "0.05,0.10" or "0.03,0.05,...,0.20".

    The `...` goes on from the two numbers before it, in even steps, as long as they stay below the number after it:
    0.03, 0.05, 0.07, ..., 0.19, and then 0.20.

    Raises:
        ValueError: not such a list, a length twice or out of range.
    """
    parts = [part.strip() for part in text.split(",")]
    try:
        numbers: list[Decimal] = []  # exact: in binary, 0.03 + 8 * 0.02 is not 0.19
        for i, part in enumerate(parts):
            if part != "...":
                numbers.append(Decimal(part))
                continue
            first, second, end = Decimal(parts[i - 2]), Decimal(parts[i - 1]), Decimal(parts[i + 1])
            if i < 2 or not first < second < end < 1:
                raise ValueError
            while (following := numbers[-1] + second - first) < end:
                numbers.append(following)
    except (ValueError, InvalidOperation, IndexError):
        raise ValueError(
            f'"{text}" is not a list of lengths; write numbers with commas between them, such as 0.05,0.10, or '
            "two rising ones, ... and a last one, such as 0.03,0.05,...,0.20."
        ) from None
    lengths = tuple(float(number) for number in numbers)
    if len(set(lengths)) < len(lengths):
        raise ValueError(f'"{text}" has a length twice; give each once.')
    for length in lengths:
        sigma_rel_to_gamma(length)
    return lengths


# ---- Post-hoc EMA: any profile from those that were tracked ----------------------------------------


def profile_density(sigma_rel: float, nimg: int, times: np.ndarray) -> np.ndarray:
    """Weight per image that the average after `nimg` images gives to the weights at `times` (EDM2 eq. 121).

    (γ+1) t^γ / nimg^(γ+1) for 0 <= t <= nimg, with integral 1; afterwards 0.
    """
    gamma, relative = sigma_rel_to_gamma(sigma_rel), np.asarray(times) / nimg
    return np.where(relative <= 1, (gamma + 1) / nimg * relative**gamma, 0.0)


def posthoc_coefficients(
    snapshots: Sequence[tuple[float, int]], targets: Sequence[tuple[float, int]]
) -> tuple[np.ndarray, np.ndarray]:
    """How to add up averages so that the sum comes as close as can be to other averages (EDM2 eq. 151, Alg. 3).

    Args:
        snapshots: (sigma_rel, nimg) of each average that there is.
        targets: (sigma_rel, nimg) of each wanted one. Snapshots after its `nimg` have no part in it; a target that is
            itself a snapshot has 1 for this one and 0 for all others.

    Returns:
        The coefficients, float64 [snapshots, targets], each column with the sum 1, and for each target the distance
        between the wanted profile and the one built, ||built - wanted|| / ||wanted|| (L2 over the training time).

    Raises:
        ValueError: a length is out of range, or a target comes before all snapshots.
    """
    gamma, nimg = _gammas_and_times(snapshots)
    coefficients, errors = np.zeros((len(snapshots), len(targets))), np.zeros(len(targets))
    for column, (sigma_rel, end) in enumerate(targets):
        gamma_target, end_target = _gammas_and_times([(sigma_rel, end)])
        if (sigma_rel, end) in snapshots:
            coefficients[list(snapshots).index((sigma_rel, end)), column] = 1
            continue
        used = nimg <= end
        if not used.any():
            raise ValueError(f"nimg={end}: the first snapshot comes after it, at {int(nimg.min())} images.")
        gamma_used, nimg_used = gamma[used], nimg[used]
        products = _inner_products(gamma_used, nimg_used, gamma_used, nimg_used)
        wanted = _inner_products(gamma_used, nimg_used, gamma_target, end_target)[:, 0]
        norm = _inner_products(gamma_target, end_target, gamma_target, end_target)[0, 0]
        # Profiles scaled to norm 1. Many tracks are nearly dependent: directions of which float64 knows nothing more
        # than rounding are left out, as they would add huge coefficients of opposite signs, and no accuracy.
        scale = np.diag(products) ** -0.5
        solution = scale * (
            np.linalg.pinv(products * scale[:, None] * scale, rcond=1e-12, hermitian=True) @ (wanted * scale)
        )
        solution /= solution.sum()
        coefficients[used, column] = solution
        squares = solution @ products @ solution - 2 * solution @ wanted + norm
        errors[column] = math.sqrt(max(squares, 0) / norm)  # below 1e-7 it is all rounding, of either sign
    return coefficients, errors


def posthoc_profiles(
    snapshots: Sequence[tuple[float, int]], targets: Sequence[tuple[float, int]], points: int = 1000
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For a plot: `points` times up to the last target's [points], the wanted and the built profiles [targets, points].

    Built are those of `posthoc_coefficients`. A profile is the weight per image, as in `profile_density`.
    """
    coefficients, _ = posthoc_coefficients(snapshots, targets)
    end = max(nimg for _, nimg in targets)
    times = np.linspace(0, end, points)
    basis, wanted = (np.stack([profile_density(*average, times) for average in a]) for a in (snapshots, targets))
    return times, wanted, coefficients.T @ basis


def _gammas_and_times(averages: Sequence[tuple[float, int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([sigma_rel_to_gamma(s) for s, _ in averages]), np.array([n for _, n in averages], np.float64)


def _inner_products(gamma_a: np.ndarray, t_a: np.ndarray, gamma_b: np.ndarray, t_b: np.ndarray) -> np.ndarray:
    """Integrals over time of the products of two lists of profiles, [a, b] (EDM2 eq. 151)."""
    gamma_a, t_a = gamma_a[:, None], t_a[:, None]
    power = np.where(t_a < t_b, gamma_b, -gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) * (t_a / t_b) ** power / ((gamma_a + gamma_b + 1) * np.maximum(t_a, t_b))
