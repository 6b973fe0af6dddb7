"""The benchmark of real weights: its reward on a small network, and its page."""

import torch

from benchmarks.real_weights import RADII, ClassLikeness, page, photographs, row
from rsaft.testbed import fashion


class Pooled(torch.nn.Module):
    """Features by hand: brightness of the four quarters."""

    def extract_features(self, x):
        return torch.nn.functional.adaptive_avg_pool2d(x.mean(1, keepdim=True), 4).flatten(1)[..., None, None]


def test_photographs_of_a_class_are_like_their_class_and_the_page_says_so():
    images, classes = photographs(8)
    assert images.shape == (80, 3, 32, 32)
    reward = ClassLikeness(Pooled(), images[::2], classes[::2])
    right = [fashion.caption("white", fashion.CLASSES[c]) for c in classes[1::2].tolist()]
    wrong = [fashion.caption("white", fashion.CLASSES[(c + 1) % 10]) for c in classes[1::2].tolist()]
    assert reward(images[1::2], right).mean() > reward(images[1::2], wrong).mean() + 0.3
    found = row("pooled", reward, images[1::2], right)
    assert list(found["s1"]) == [f"{rho:g}" for rho in RADII]
    assert 0 < found["gradient"][0] <= found["gradient"][1] <= found["gradient"][2]
    text = page([found | {"right above wrong": 0.9}], "here")
    assert "| pooled | 40 |" in text
    assert "90.0% of the images" in text
