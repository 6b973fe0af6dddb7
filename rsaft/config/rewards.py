"""Settings of the built-in reward models: the names and defaults of their constructors, and no code.

A run file is validated without loading gigabytes; `rsaft.config.assemble` then makes `rsaft.rewards.NAME` of each.
Paths count from the working directory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rsaft.config.sections import Precision

Backend = Literal["transformers", "open_clip"]


@dataclass(frozen=True)
class HPSv2:
    """Human preference score v2, a cosine; 1.97 GB, Apache-2.0."""

    path_or_id: str | None = None  # hub id, folder or file; null is xswu/HPSv2, the file of `version`
    version: Literal["2.0", "2.1"] = "2.1"  # in quotes; the two cannot be compared
    device: str | None = None  # null is this process's GPU, if there is one
    dtype: Precision = "fp32"  # of the network; norms and dot product are fp32 all the same
    tokenizer: str | None = None  # folder or hub id; null looks beside the weights, then at LAION's ViT-H
    antialias: bool = True  # as today's torchvision resizes; false for numbers of older installations
    backend: Backend = "transformers"  # open_clip runs the same weights in open_clip_torch


@dataclass(frozen=True)
class PickScore:
    """PickScore v1, about 100 times a cosine; 3.94 GB, code MIT, of the weights no licence seen."""

    path_or_id: str = "yuvalkirstain/PickScore_v1"  # hub id, folder or file
    device: str | None = None  # null is this process's GPU, if there is one
    dtype: Precision = "fp32"  # of the network; norms and dot product are fp32 all the same
    tokenizer: str | None = None  # folder or hub id; null looks beside the weights, then at LAION's ViT-H
    exact: bool = False  # round pixels as PIL does, for numbers that are compared with published ones


@dataclass(frozen=True)
class CLIPScore:
    """The cosine of image and prompt under an untuned CLIP; 1.7 GB, code MIT."""

    path_or_id: str = "openai/clip-vit-large-patch14"  # hub id, folder or file of any CLIP
    scale: Literal["cosine", "torchmetrics", "hessel"] = "cosine"  # max(100 cos, 0); 2.5 max(cos, 0)
    device: str | None = None  # null is this process's GPU, if there is one
    dtype: Precision = "fp32"  # of the network; norms and dot product are fp32 all the same
    tokenizer: str | None = None  # folder or hub id; null looks beside the weights, then at path_or_id
    activation: Literal["gelu", "quick_gelu"] = "gelu"  # of a file without config.json; OpenAI's are quick_gelu
    exact: bool = False  # round pixels as PIL does, for numbers that are compared with published ones
    backend: Backend = "transformers"  # open_clip runs the same weights in open_clip_torch


@dataclass(frozen=True)
class AestheticScore:
    """The LAION aesthetic predictor, affine in a CLIP feature; 1.7 GB, Apache-2.0. Reads no prompt."""

    path_or_id: str = "trl-lib/ddpo-aesthetic-predictor"  # of the five layers: hub id, folder or file
    clip: str = "openai/clip-vit-large-patch14"  # hub id, folder or file
    device: str | None = None  # null is this process's GPU, if there is one
    dtype: Precision = "fp32"  # of CLIP; norm and layers are fp32 all the same
    exact: bool = False  # round pixels as PIL does, for numbers that are compared with published ones


@dataclass(frozen=True)
class ICT:
    """Image-contained text, a cosine of a tuned ViT-H/14; 986 M values, code MIT."""

    path_or_id: str = "8y/ICT"  # hub id, folder or file
    device: str | None = None  # null is this process's GPU, if there is one
    dtype: Precision = "fp32"  # of the network; norms and dot product are fp32 all the same
    tokenizer: str | None = None  # folder or hub id; null looks beside the weights, then at LAION's ViT-H
    exact: bool = False  # round pixels as PIL does, for numbers that are compared with published ones


@dataclass(frozen=True)
class HP:
    """High preference, 0 to 1, of a tuned ViT-H/14; 633 M values, code MIT. Reads no prompt."""

    path_or_id: str = "8y/HP"  # hub id or folder with hp_backbone/ and hp_scorer/
    device: str | None = None  # null is this process's GPU, if there is one
    dtype: Precision = "fp32"  # of CLIP; the layers are fp32 all the same
    exact: bool = False  # round pixels as PIL does, for numbers that are compared with published ones


@dataclass(frozen=True)
class MPS:
    """Multi-dimensional preference score, of ViT-H/14 tokens under cross-attention; 1.1 G values, code MIT."""

    path_or_id: str = "RE-N-Y/mpsv1"  # hub id, folder or file
    # The words that a prompt's words are compared with; these select the overall score.
    condition: str = (
        "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, "
        "texture, quantity, attributes, position, number, location, word, things."
    )
    threshold: float = 0.3  # how near to the condition a word must be; 0.01 in imscore
    device: str | None = None  # null is this process's GPU, if there is one
    dtype: Precision = "fp32"  # of the network; norms and dot product are fp32 all the same
    tokenizer: str | None = None  # folder or hub id; null looks beside the weights, then at LAION's ViT-H
    exact: bool = False  # round pixels as PIL does, for numbers that are compared with published ones


@dataclass(frozen=True)
class ImageReward:
    """ImageReward, about -2 to 2; 1.79 GB, Apache-2.0."""

    path_or_id: str = "THUDM/ImageReward"  # hub id, folder or file
    device: str | None = None  # null is this process's GPU, if there is one
    dtype: Precision = "fp32"  # of the networks; the last layers are fp32 all the same
    tokenizer: str = "google-bert/bert-base-uncased"  # hub id or folder, or its vocab.txt
    exact: bool = False  # round pixels as PIL does, for numbers that are compared with published ones


@dataclass(frozen=True)
class VLMReward:
    """A reward read off a Qwen2-VL or 2.5-VL: P(yes), a grade, or HPSv3's head; 16.6 GB, Apache-2.0 (HPSv3: MIT)."""

    path_or_id: str = "Qwen/Qwen2.5-VL-7B-Instruct"  # hub id or folder; of reward_token a file, too
    readout: Literal["yes_no", "digit", "reward_token"] = "yes_no"  # what is read
    template: str | None = None  # the question, with {prompt} in it; reward_token needs one
    answers: tuple[str, str] | None = None  # of yes_no: the wished one and the other; null is Yes, No
    log_odds: bool = False  # yes_no as log P(first) / P(second)
    base: str = "Qwen/Qwen2-VL-7B-Instruct"  # of reward_token: where config and tokenizer are
    weights: str = "HPSv3.safetensors"  # of reward_token: the file's name in a folder or on the hub
    device: str | None = None  # null is this process's GPU, if there is one
    dtype: Precision = "bf16"  # of the network; the last product is fp32 all the same
    min_pixels: int | None = None  # of the resized image
    max_pixels: int | None = None  # of the resized image
    positions: Literal["grid", "sequence"] | None = None  # of image tokens; null is the readout's own
    exact: bool = False  # round pixels as PIL does
    attention: Literal["sdpa", "eager"] = "sdpa"  # eager has second derivatives


@dataclass(frozen=True)
class RemoteReward:
    """Scores from a server over HTTP, such as examples/reward_server.py. No gradient."""

    url: str  # http:// or https://
    encoding: Literal["png", "raw"] = "png"  # raw: fp32 values, larger and exact
    timeout: float = 60.0  # seconds that one request may take
    retries: int = 3  # tries after the first, when the server is busy, broken or away
    backoff: float = 1.0  # seconds before the first retry; doubles with each
    max_mib: float = 64.0  # largest request; more images go in several


MODELS = (HPSv2, PickScore, CLIPScore, AestheticScore, ICT, HP, MPS, ImageReward, VLMReward, RemoteReward)
