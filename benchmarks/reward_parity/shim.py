"""Lets torchvision be imported beside the CPU build of torch: its operators exist there by name only.

torchvision 0.28.0's library is linked to CUDA, so it cannot be loaded, and `import torchvision` then fails where it
registers a rule for `torchvision::nms`. Declaring the operators first is enough; calling them raises. Call before the
first import of torchvision, open_clip, timm or hpsv2.
"""

from __future__ import annotations

import torch

_KEPT = torch.library.Library("torchvision", "DEF")
_KEPT.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
_KEPT.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
