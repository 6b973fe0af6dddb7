"""hpsv3 1.0.0's own reward model on a tiny Qwen2-VL of transformers 4.45.2; run in the environment `hpsv3` of run.sh.

The module of the model also holds its trainer, whose libraries are not needed here: they are empty modules. The class
and its forward pass are unchanged. Token ids are hpsv3_ids.py's, pixels those of transformers' own processor.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from pathlib import Path
from unittest.mock import MagicMock

import problem
import shim  # noqa: F401 (before torchvision)
import torch

TRAINING = ("matplotlib", "matplotlib.pyplot", "matplotlib.patches", "torch.utils.tensorboard", "pandas", "datasets")


def reward_model():
    """The class of hpsv3/model/qwen2vl_trainer.py."""
    root = Path(importlib.util.find_spec("hpsv3").origin).parent
    package = types.ModuleType("hpsv3")
    package.__path__ = [str(root)]
    sys.modules["hpsv3"] = package
    for name in TRAINING:
        sys.modules[name] = MagicMock(__spec__=None)
    for name, parent in (("trl", "RewardTrainer"), ("peft", "PeftModel")):
        sys.modules[name] = types.ModuleType(name)
        setattr(sys.modules[name], parent, type(parent, (), {}))
    from hpsv3.model.qwen2vl_trainer import Qwen2VLRewardModelBT

    return Qwen2VLRewardModelBT


def image_gradient(gradient: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """From patches (n, 3 * 2 * 14 * 14) back to an image (3, h, w) in [0, 1]; both frames are the image."""
    g = gradient.view(rows // 2, columns // 2, 2, 2, 3, 2, 14, 14).sum(dim=5)
    g = g.permute(4, 0, 2, 5, 1, 3, 6).reshape(3, rows * 14, columns * 14)
    return g / torch.tensor(problem.STD).view(3, 1, 1)


def main(folder: Path) -> None:
    from importlib.metadata import version

    from safetensors.torch import save_file
    from transformers import Qwen2VLConfig
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    facts = json.loads((folder / "hpsv3" / "facts.json").read_text())
    config = Qwen2VLConfig(
        **facts["text"],
        vocab_size=facts["rows"],
        rope_theta=1e6,
        rope_scaling={"type": "mrope", "mrope_section": facts["sections"]},
        vision_config=facts["vision"],
        image_token_id=facts["image"],
        video_token_id=facts["image"] + 100000,
    )
    # As its train.py with HPSv3_7B.yaml.
    options = {"output_dim": 2, "special_token_ids": [facts["reward"]], "rm_head_type": "ranknet"}
    model = reward_model()(config, reward_token="special", **options).eval()
    state = problem.fill(model.state_dict())
    model.load_state_dict(state)
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "hpsv3" / "HPSv3.safetensors")
    processor = Qwen2VLImageProcessor(min_pixels=448 * 448, max_pixels=448 * 448)
    values: dict[str, torch.Tensor] = {}
    for name, size in (("square", (448, 448)), ("photo", problem.PHOTO)):
        found, gradients = [], []
        for ids, image in zip(facts["ids"], problem.pictures(size), strict=True):
            seen = processor(images=[image], return_tensors="pt")
            pixels = seen["pixel_values"].requires_grad_()
            ids = torch.tensor([ids])
            if name == "photo":  # a photo is not 448 x 448, so it has another number of tokens
                ids = resized(ids, facts["image"], int(seen["image_grid_thw"].prod()) // 4)
            mu = model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=pixels,
                image_grid_thw=seen["image_grid_thw"],
                return_dict=True,
            )["logits"][:, 0]
            _, rows, columns = seen["image_grid_thw"][0].tolist()
            gradients.append(image_gradient(torch.autograd.grad(mu.sum(), pixels)[0], rows, columns))
            found.append(mu)
        values[f"score_{name}"] = torch.cat(found)
        if name == "square":
            values["gradient"] = torch.stack(gradients)
    versions = {n: version(n) for n in ("hpsv3", "transformers", "torch")}
    problem.save(folder, "hpsv3", "theirs", values, versions)


def resized(ids: torch.Tensor, image: int, count: int) -> torch.Tensor:
    """The text with `count` places for the image."""
    kept = ids[0].tolist()
    first = kept.index(image)
    rest = [token for token in kept[first:] if token != image]
    return torch.tensor([kept[:first] + [image] * count + rest])


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(problem.arguments(__doc__).folder)
