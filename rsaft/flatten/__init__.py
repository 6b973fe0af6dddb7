"""RSA-FT (Reward Sharpness-Aware Fine-Tuning): gradients of a flattened reward."""

from rsaft.flatten.input import InputFlattened, worst_case_delta
from rsaft.flatten.rsa_ft import RSAFT
from rsaft.flatten.weight import perturbed, worst_case_eps

__all__ = ["RSAFT", "InputFlattened", "perturbed", "worst_case_delta", "worst_case_eps"]
