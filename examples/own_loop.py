"""RSA-FT in a training loop of your own, without `rsaft.Trainer`: python examples/own_loop.py"""

import torch

from rsaft import Sampling, testbed
from rsaft.flatten import RSAFT
from rsaft.rdrl import DRaFT, ImageScore, WeightedSum
from rsaft.types import Batch


def train(steps: int = 20, batch_size: int = 8) -> list[float]:
    """Fine-tune the fashion testbed; the mean reward of each update."""
    world = testbed.load("fashion")  # or rsaft.load_backbone("path-or-hub-id"), with any reward(images, prompts)
    params = world.backbone.parameters()
    optimizer = torch.optim.AdamW(params, lr=5e-5)
    algorithm = DRaFT(k=1, sampling=Sampling(num_steps=10, guidance=1.0))
    score = ImageScore(world.backbone, {"train": world.reward}, WeightedSum({"train": 1.0}))
    step = RSAFT(rho=0.0, rho_w=0.01, mode="weight", eps_share=1 / batch_size)
    history = []
    for update in range(steps):
        prompts = world.prompts_train[update * batch_size % 40 :][:batch_size]
        batch = Batch(prompts, tuple(range(batch_size)), step=update, seed=0)
        output = step([algorithm.rollout(world.backbone, batch)], score, params)  # fills .grad, weights unchanged
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        history.append(float(output.losses[0].rewards.mean()))
    return history


if __name__ == "__main__":
    for update, reward in enumerate(train()):
        print(f"{update:3d}  reward {reward:.3f}")
