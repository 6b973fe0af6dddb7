"""backend="open_clip" gives the same scores where open_clip_torch works, and says what is wrong where it does not."""

import importlib.util
import inspect
import sys

import pytest
import torch

from rsaft.errors import ConfigError, MissingExtraError
from rsaft.rewards import CLIPScore, HPSv2
from rsaft.rewards.open_clip_backend import check_backend, import_open_clip

INSTALLED = importlib.util.find_spec("open_clip") is not None
if INSTALLED:
    import_open_clip("tests")  # before transformers, which a torchvision without its library would break


@pytest.mark.skipif(INSTALLED, reason="open_clip_torch is installed")
@pytest.mark.parametrize("reward", [HPSv2, CLIPScore])
def test_without_the_extra_its_install_line_is_named(reward):
    with pytest.raises(MissingExtraError) as caught:
        reward(backend="open_clip")
    assert str(caught.value) == (
        f'{reward.__name__}: backend="open_clip" needs open_clip_torch: pip install "rsaft[openclip]".'
    )


@pytest.mark.skipif(INSTALLED, reason="open_clip_torch is installed")
def test_an_open_clip_that_cannot_be_imported_is_explained(tmp_path, monkeypatch):
    (tmp_path / "open_clip.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingExtraError) as caught:
        HPSv2(backend="open_clip")
    sys.modules.pop("open_clip", None)
    assert "is installed and cannot be imported (operator torchvision::nms does not exist); install" in str(
        caught.value
    )
    assert "\n" not in str(caught.value)


def test_an_unknown_backend_is_refused():
    with pytest.raises(ConfigError, match="HPSv2: backend is 'transformers' or 'open_clip'; got 'clip'"):
        inspect.unwrap(check_backend)("clip", "HPSv2")


@pytest.mark.skipif(not INSTALLED, reason="open_clip_torch is not installed")
@pytest.mark.parametrize("reward", [HPSv2, CLIPScore])
def test_both_backends_give_the_same_scores_and_gradients(tmp_path, reward):
    from tests.rewards import layouts

    write = layouts.write_hpsv2 if reward is HPSv2 else layouts.write_transformers
    path, prompts = write(tmp_path), ["a cat", "two “dogs”"]
    results = []
    for backend in ("transformers", "open_clip"):
        x = torch.rand(2, 3, 40, 56, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
        scores = reward(path, backend=backend, device="cpu", dtype="fp64")(x, prompts)
        (g,) = torch.autograd.grad(scores.sum(), x)
        results.append((scores.detach(), g))
    torch.testing.assert_close(results[0], results[1], rtol=1e-7, atol=1e-9)
