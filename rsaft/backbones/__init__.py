"""Diffusers pipelines behind one Protocol: `load_backbone`, LoRA or full fine-tuning, exact export."""

from rsaft.backbones.distance import weight_distance
from rsaft.backbones.export import export_weights
from rsaft.backbones.load import load_backbone
from rsaft.backbones.lora import LoRA

__all__ = ["LoRA", "export_weights", "load_backbone", "weight_distance"]
