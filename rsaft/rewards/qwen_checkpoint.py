"""Loading Qwen2-VL and Qwen2.5-VL, as they are on the hub, or with a reward head as HPSv3 publishes it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rsaft.errors import ConfigError
from rsaft.rewards.checkpoint import Source, load_strictly, read_weights
from rsaft.rewards.qwen_patches import FRAMES, MERGE, PATCH

REWARD_TOKEN = "<|Reward|>"
HEAD = "rm_head."

_MODELS = {"qwen2_vl": "Qwen2VLForConditionalGeneration", "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration"}


def load_qwen(source: Source, dtype: torch.dtype, attention: str) -> Any:
    """The model of a hub id or folder with its language head.

    Raises:
        ConfigError: if it is none, of another family, or lacks a tensor.
    """
    config = qwen_config(source)
    return _network(config, dtype, attention, str(source), str(source), None)


def load_reward_model(
    path: Path, base: Source, rows: int, dtype: torch.dtype, attention: str
) -> tuple[Any, nn.Sequential]:
    """The network and the reward head of a file as HPSv3 publishes it: one state dict, the head under `rm_head.`.

    Args:
        path: the file.
        base: hub id or folder of the Qwen2-VL that it was made from, for `config.json`.
        rows: tokens of the tokenizer with `<|Reward|>`, each of which needs an embedding.
        dtype: of the network; the head is fp32, or float64 for a float64 network.

    Raises:
        ConfigError: names the file and the first key that is missing, of another shape, or unknown.
    """
    weights = read_weights(path, "vlm")
    head = _head({key[len(HEAD) :]: value for key, value in weights.items() if key.startswith(HEAD)}, path)
    rest = {key: value for key, value in weights.items() if not key.startswith(HEAD)}
    embedding = next((value for key, value in rest.items() if key.endswith("embed_tokens.weight")), None)
    if embedding is None or len(embedding) < rows:
        found = "no embed_tokens.weight" if embedding is None else f"embed_tokens.weight of {len(embedding)} rows"
        raise ConfigError(
            f"vlm: '{path}' has {found}, and the tokenizer of '{base}' with {REWARD_TOKEN} has {rows} tokens; give the "
            "base model that the file was made from."
        )
    config = qwen_config(base)
    config.text_config.vocab_size = len(embedding)  # the original cuts the embeddings to the tokenizer's length
    network = _network(config, dtype, attention, str(path), None, rest)
    return network, head.to(torch.promote_types(dtype, torch.float32))


def qwen_config(source: Source) -> Any:
    """The `config.json` of a folder or hub id.

    Raises:
        ConfigError: if it is none, or not of a Qwen2-VL or Qwen2.5-VL with 14 x 14 patches, 2 x 2 to a token.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(source), local_files_only=Path(source).exists())
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ConfigError(
            f"vlm: no config.json of a model was found in '{source}' or on the hub ({reason}); give a hub id such as "
            "Qwen/Qwen2.5-VL-7B-Instruct, or a folder of save_pretrained."
        ) from error
    if config.model_type not in _MODELS:
        raise ConfigError(
            f"vlm: '{source}' is a {config.model_type}, and supported are {', '.join(_MODELS)}; for another model, "
            "write a function (images, prompts) -> (b,), which is a reward as it is."
        )
    vision = config.vision_config
    patches = (vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)
    if patches != (PATCH, MERGE, FRAMES):
        raise ConfigError(
            f"vlm: '{source}' has patches, merging and frames of {patches}; supported are {(PATCH, MERGE, FRAMES)}."
        )
    return config


def _network(
    config: Any, dtype: torch.dtype, attention: str, name: str, source: str | None, weights: Mapping[str, Tensor] | None
) -> Any:
    """The network with all its weights; `weights`, if given, may bear the names of transformers 4 or 5."""
    import transformers
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        network, report = getattr(transformers, _MODELS[config.model_type]).from_pretrained(
            source,
            config=config,
            state_dict=None if weights is None else dict(weights),
            dtype=dtype,
            attn_implementation=attention,
            local_files_only=source is not None and Path(source).exists(),
            ignore_mismatched_sizes=True,  # reported, and refused below by name
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"vlm: '{name}' cannot be loaded: {' '.join(str(error).split())[:200]}.") from error
    finally:
        if shown:
            logging.enable_progress_bar()
    _refuse(report, name)
    return network


def _refuse(report: Mapping[str, Any], name: str) -> None:
    """Raises: ConfigError if the checkpoint and the network differ: transformers would go on with random values."""
    for kind, text in (("missing_keys", "lacks the key"), ("unexpected_keys", "holds the unknown key")):
        if report[kind]:
            raise ConfigError(f"vlm: '{name}' {text} '{sorted(report[kind])[0]}' ({len(report[kind])} such keys).")
    if report["mismatched_keys"]:
        key, found, needed = sorted(report["mismatched_keys"])[0]
        raise ConfigError(
            f"vlm: '{name}', key '{key}' has the shape {tuple(found)}, and its config needs {tuple(needed)}."
        )


def _head(weights: Mapping[str, Tensor], path: Path) -> nn.Sequential:
    """HPSv3's head: hidden - 1024 - 16 - 2 with ReLU, for the mean mu and the spread sigma of the score.

    Raises:
        ConfigError: if it has another layout.
    """
    for key in ("0.weight", "3.weight", "5.weight"):
        if key not in weights or weights[key].ndim != 2:
            raise ConfigError(
                f"vlm: '{path}' lacks the matrix '{HEAD}{key}'; a file with a reward head as HPSv3's has {HEAD}0, 3 "
                "and 5: give that, or use the readout yes_no or digit."
            )
    (first, hidden), (second, _), (out, _) = (weights[f"{i}.weight"].shape for i in (0, 3, 5))
    with torch.device("meta"):
        # Identity stands where the published head has dropout.
        layers = (nn.Linear(hidden, first), nn.ReLU(), nn.Identity(), nn.Linear(first, second), nn.ReLU())
        head = nn.Sequential(*layers, nn.Linear(second, out))
    prefixed = nn.ModuleDict({HEAD.rstrip("."): head})  # so that errors name the file's keys
    load_strictly(prefixed, {f"{HEAD}{key}": value for key, value in weights.items()}, path, "vlm")
    return head
