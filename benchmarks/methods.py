"""What the names of the study's methods stand for."""

from __future__ import annotations

import re

from benchmarks.controls import CoarseFirstPass, FriendlySAM, LookSAM, ProductMetric, RandomPerturbation
from rsaft.flatten import RSAFT
from rsaft.rdrl import plain_step
from rsaft.types import Step


def method(name: str) -> tuple[Step, float]:
    """The step and the factor of the learning rate that a method's name stands for.

    Names: plain, half-lr, weight-RHO, input-RHO, both-RHO-RHO_W, random-RHO_W, cached-RHO_W, lastM-RHO_W,
    shareN-RHO_W (one of N samples), everyN-RHO_W, shareNeveryM-RHO_W; input flattening as linf-RHO, rms-RHO, pgdN-RHO
    (N steps), gaussian-RHO, latent-RHO (in latents); perturbed-RHO-RHO_W (both, delta at theta + eps); looksamN-RHO_W,
    fsam-RHO_W, coarseN-RHO_W, with --lora product-RHO_W (benchmarks/controls.py); kl-WEIGHT, gated-WEIGHT (a KL term to
    the base model, on all samples or on over-rated ones); annealed-POWER (plain's weights of that seed, sampled between
    the base and them).
    """
    kind, *numbers = re.split(r"(?<!\de)-", name)  # 1e-3 is one number
    radii = [float(n) for n in numbers if n != "lr"]
    if name == "plain" or kind in ("kl", "gated", "annealed"):
        return plain_step, 1.0
    if name == "half-lr":
        return plain_step, 0.5
    if kind == "weight":
        return RSAFT(0.0, radii[0], mode="weight"), 1.0
    if kind == "input":
        return RSAFT(radii[0], 0.0, mode="input"), 1.0
    if kind == "both":
        return RSAFT(radii[0], radii[1], mode="both"), 1.0
    if kind == "perturbed":
        return RSAFT(radii[0], radii[1], mode="both", delta_from="perturbed"), 1.0
    if variant := _input_variant(kind, radii):
        return variant, 1.0
    if kind == "random":
        return RandomPerturbation(radii[0]), 1.0
    if kind == "product":
        return ProductMetric(radii[0]), 1.0
    if kind == "fsam":
        return FriendlySAM(radii[0]), 1.0
    if kind.startswith("looksam"):
        return LookSAM(radii[0], every=int(kind[7:])), 1.0
    if kind.startswith("coarse"):
        return CoarseFirstPass(radii[0], num_steps=int(kind[6:])), 1.0
    if kind == "cached":
        return RSAFT(0.0, radii[0], mode="weight", reuse="cached"), 1.0
    if kind.startswith("last"):
        return RSAFT(0.0, radii[0], mode="weight", reuse=int(kind[4:])), 1.0
    if both := re.fullmatch(r"share(\d+)every(\d+)", kind):
        return RSAFT(0.0, radii[0], mode="weight", eps_share=1 / int(both[1]), eps_every=int(both[2])), 1.0
    if kind.startswith("share"):
        return RSAFT(0.0, radii[0], mode="weight", eps_share=1 / int(kind[5:])), 1.0
    if kind.startswith("every"):
        return RSAFT(0.0, radii[0], mode="weight", eps_every=int(kind[5:])), 1.0
    raise SystemExit(f"there is no method '{name}'; {method.__doc__}")


def number_of(name: str, kind: str) -> float | None:
    """0.1 of `kl-0.1` if the kind is kl; None for a method of another kind."""
    return float(name.removeprefix(f"{kind}-")) if name.startswith(f"{kind}-") else None


def _input_variant(kind: str, radii: list[float]) -> RSAFT | None:
    """Input flattening with one option changed; None if the name stands for something else."""
    if kind == "linf":
        return RSAFT(radii[0], 0.0, mode="input", norm="linf")
    if kind == "rms":
        return RSAFT(radii[0], 0.0, mode="input", norm="rms")
    if kind == "gaussian":
        return RSAFT(radii[0], 0.0, mode="input", smoothing="gaussian")
    if kind == "latent":
        return RSAFT(radii[0], 0.0, mode="input", space="latent")
    if kind.startswith("pgd"):
        return RSAFT(radii[0], 0.0, mode="input", delta_steps=int(kind[3:]))
    return None
