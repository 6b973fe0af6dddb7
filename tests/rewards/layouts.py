"""Tiny random checkpoints written as the real ones are published, and the names and shapes of the real ones."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from rsaft.testbed.model import build_tokenizer

Shapes = dict[str, tuple[int, ...]]
Weights = dict[str, Tensor]

TOKENIZER = build_tokenizer([])
VOCABULARY, CONTEXT, EMBED, SIDE = len(TOKENIZER), 16, 24, 32
VISION_HEADS, TEXT_HEADS = 2, 1  # of towers that are 128 and 64 wide

HEAD_WIDTHS = (EMBED, 16, 8, 8, 4, 1)


def open_clip_shapes(
    *, embed: int, vision: tuple[int, int], text: tuple[int, int], patch: int, grid: int, words: int, context: int
) -> Shapes:
    """Names and shapes of an open_clip CLIP; `vision` and `text` are (width, layers)."""
    shapes: Shapes = {
        "positional_embedding": (context, text[0]),
        "text_projection": (text[0], embed),
        "logit_scale": (),
        "visual.class_embedding": (vision[0],),
        "visual.positional_embedding": (grid * grid + 1, vision[0]),
        "visual.proj": (vision[0], embed),
        "visual.conv1.weight": (vision[0], 3, patch, patch),
        "token_embedding.weight": (words, text[0]),
    }
    for name, width in (("visual.ln_pre", vision[0]), ("visual.ln_post", vision[0]), ("ln_final", text[0])):
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    for prefix, (width, layers) in (("visual.transformer", vision), ("transformer", text)):
        for i in range(layers):
            block = f"{prefix}.resblocks.{i}"
            shapes |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
            for name, out, inside in (
                ("attn.out_proj", width, width),
                ("mlp.c_fc", 4 * width, width),
                ("mlp.c_proj", width, 4 * width),
            ):
                shapes |= {f"{block}.{name}.weight": (out, inside), f"{block}.{name}.bias": (out,)}
            for name in ("ln_1", "ln_2"):
                shapes |= {f"{block}.{name}.weight": (width,), f"{block}.{name}.bias": (width,)}
    return shapes


VIT_H_14 = open_clip_shapes(embed=1024, vision=(1280, 32), text=(1024, 24), patch=14, grid=16, words=49408, context=77)
VIT_L_14 = open_clip_shapes(embed=768, vision=(1024, 24), text=(768, 12), patch=14, grid=16, words=49408, context=77)
TINY = open_clip_shapes(
    embed=EMBED, vision=(128, 2), text=(64, 2), patch=8, grid=SIDE // 8, words=VOCABULARY, context=CONTEXT
)


def random_weights(shapes: Shapes, seed: int) -> Weights:
    """Values that make all layers matter; exp(logit_scale) is 100, as in trained CLIPs."""
    source = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=source)
        is_scale = name.endswith("weight") and len(shape) == 1
        weights[name] = 1 + 0.2 * noise if is_scale else noise * (0.3 if len(shape) < 2 else 1.5 * shape[-1] ** -0.5)
    if "logit_scale" in weights:
        weights["logit_scale"] = torch.tensor(100.0).log()
    return weights


def tiny_open_clip(seed: int = 0) -> Weights:
    """A tiny CLIP under open_clip's names."""
    return random_weights(TINY, seed)


def tiny_config(activation: str = "gelu", eos: int = 2) -> CLIPConfig:
    """The architecture of `tiny_open_clip`, written out."""
    return CLIPConfig(
        projection_dim=EMBED,
        vision_config={
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 2,
            "num_attention_heads": VISION_HEADS,
            "image_size": SIDE,
            "patch_size": 8,
            "hidden_act": activation,
        },
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": TEXT_HEADS,
            "max_position_embeddings": CONTEXT,
            "hidden_act": activation,
            "bos_token_id": None,
            "eos_token_id": eos,
        },
    )


def tiny_transformers(seed: int = 0, activation: str = "gelu", eos: int = 2) -> CLIPModel:
    """transformers' own tiny CLIP with random weights of a visible size."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = CLIPModel(tiny_config(activation, eos)).eval()
        for p in network.parameters():
            if p.ndim > 1:
                torch.nn.init.normal_(p, std=1.5 * p.shape[-1] ** -0.5)
        torch.nn.init.constant_(network.logit_scale, float(torch.tensor(100.0).log()))
    return network


def save_tokenizer(folder: Path) -> None:
    """tokenizer.json, as it lies beside weights on the hub."""
    TOKENIZER.save_pretrained(folder)


def write_hpsv2(folder: Path, seed: int = 0, version: str = "2.1") -> Path:
    """`HPS_v2.1_compressed.pt`: {'state_dict': fp16 weights under open_clip's names}."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(folder)
    path = folder / {"2.0": "HPS_v2_compressed.pt", "2.1": "HPS_v2.1_compressed.pt"}[version]
    torch.save({"state_dict": {k: v.half() for k, v in tiny_open_clip(seed).items()}}, path)
    return path


def write_transformers(folder: Path, seed: int = 0, activation: str = "gelu", eos: int = 2) -> Path:
    """A folder as `save_pretrained` writes it: PickScore and CLIP."""
    tiny_transformers(seed, activation, eos).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def write_ict(folder: Path, seed: int = 0) -> Path:
    """`pytorch_model.bin` with the names of an old transformers, which stored positions too; no config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(folder)
    positions = {
        "text_model.embeddings.position_ids": torch.arange(CONTEXT)[None],
        "vision_model.embeddings.position_ids": torch.arange((SIDE // 8) ** 2 + 1)[None],
    }
    torch.save(tiny_transformers(seed).state_dict() | positions, folder / "pytorch_model.bin")
    return folder


def head_weights(seed: int = 0, widths: tuple[int, ...] = HEAD_WIDTHS) -> Weights:
    """The five linear layers of the LAION aesthetic predictor and of HP."""
    shapes: Shapes = {}
    for i, a, b in zip((0, 2, 4, 6, 7), widths[:-1], widths[1:], strict=True):
        shapes |= {f"layers.{i}.weight": (b, a), f"layers.{i}.bias": (b,)}
    return random_weights(shapes, seed)


def write_aesthetic(folder: Path, seed: int = 0) -> Path:
    """`sac+logos+ava1-l14-linearMSE.pth`, and the CLIP under it in `clip/`."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(head_weights(seed), folder / "sac+logos+ava1-l14-linearMSE.pth")
    tiny_transformers(seed, "quick_gelu").save_pretrained(folder / "clip")
    return folder


def write_hp(folder: Path, seed: int = 0) -> Path:
    """`hp_backbone/pytorch_model.bin` and `hp_scorer/mlp_pytorch_model.bin`."""
    for name in ("hp_backbone", "hp_scorer"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    torch.save(tiny_transformers(seed).state_dict(), folder / "hp_backbone" / "pytorch_model.bin")
    torch.save(head_weights(seed), folder / "hp_scorer" / "mlp_pytorch_model.bin")
    return folder


def cross_shapes(*, layers: int, dim: int, heads: int, head_width: int) -> Shapes:
    """Names and shapes of MPS's cross-attention."""
    inner, hidden = heads * head_width, 4 * dim
    shapes: Shapes = {}
    for i in range(layers):
        text, image = f"layers.{i}.0.fn", f"layers.{i}.1.fn"
        shapes |= {f"{block}.norm.{kind}": (dim,) for block in (text, image) for kind in ("weight", "bias")}
        shapes |= {
            f"{text}.to_q.weight": (inner, dim),
            f"{text}.to_kv.weight": (2 * head_width, dim),
            f"{text}.to_out.weight": (dim, inner),
            f"{text}.ff.0.weight": (2 * hidden, dim),
            f"{text}.ff.2.weight": (dim, hidden),
            f"{image}.rotary_emb.inv_freq": (head_width // 2,),
            f"{image}.fused_attn_ff_proj.weight": (inner + 2 * head_width + 2 * hidden, dim),
            f"{image}.attn_out.weight": (dim, inner),
            f"{image}.ff_out.1.weight": (dim, hidden),
        }
    return shapes


def write_mps(folder: Path, seed: int = 0, prefix: str = "mps.") -> Path:
    """`model.safetensors` as imscore has it, with the settings of its own that are no CLIP's."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(folder)
    cross = random_weights(cross_shapes(layers=2, dim=EMBED, heads=2, head_width=8), seed)
    weights = {f"{prefix}model.{k}": v.contiguous() for k, v in tiny_transformers(seed).state_dict().items()}
    weights |= {f"{prefix}cross_model.{k}": v for k, v in cross.items()}
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({}))
    return folder
