"""What the originals say when they are used as their pages say, in the environment that runs this; one JSON.

python attempts.py FILE
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

SHIM = "import shim; "
ATTEMPTS = {
    "open_clip, without the shim": "import open_clip",
    "hpsv2, as installed": SHIM + "from hpsv2.src import open_clip",
    "image-reward, as installed": SHIM + "import ImageReward",
    "image-reward's model alone": SHIM
    + "import importlib.util, theirs_image_reward as t; from pathlib import Path; "
    + "r = Path(importlib.util.find_spec('ImageReward').origin).parent; "
    + "t.bare_package('ImageReward', r); t.bare_package('ImageReward.models', r / 'models'); "
    + "import ImageReward.ImageReward",
    "imscore ImageReward": SHIM + "from imscore.imreward.model import ImageReward; ImageReward()",
    "imscore PickScorer": SHIM
    + "from imscore.pickscore.model import PickScorer; import torch; "
    + "m = PickScorer('laion/CLIP-ViT-H-14-laion2B-s32B-b79K'); m.score(torch.rand(1, 3, 224, 224), ['a'])",
    "imscore HPSv2": SHIM + "from imscore.hps.model import HPSv2; HPSv2()",
}


def last_line(code: str, place: Path) -> str:
    """The error of a program, or "runs"."""
    here = Path(__file__).parent
    program = f"import sys; sys.path.insert(0, {str(here)!r}); {code}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=place)
    said = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return "runs" if done.returncode == 0 else said.replace(sysconfig.get_path("purelib"), "site-packages")


if __name__ == "__main__":
    target = Path(sys.argv[1])
    said = {name: last_line(code, target.parent / "hub") for name, code in ATTEMPTS.items()}
    target.write_text(json.dumps(said, indent=1) + "\n")
    print(json.dumps(said, indent=1))
