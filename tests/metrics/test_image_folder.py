"""Folders of images: where prompts come from, how images are told apart, what is left out; and how they are scored."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rsaft.errors import ConfigError
from rsaft.metrics.image_folder import load_picture, matched_ids, read_image_folder
from rsaft.metrics.scoring import Item, sampled, score_images
from rsaft.sampling import Sampling, sample
from tests.helpers import PROMPTS, TinyFlow, toy_reward


def images(folder: Path, *names: str) -> Path:
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 6), (i, 2 * i, 3 * i)).save(folder / name)
    return folder


def listed(folder: Path) -> list[tuple[str, int, str, int]]:
    found = read_image_folder(folder).items
    return [(item.file.name, item.prompt_id, item.prompt, item.seed) for item in found if item.file is not None]


def test_a_jsonl_table_gives_prompts_seeds_and_categories(tmp_path: Path):
    images(tmp_path, "a.png", "b.jpg", "sub/c.webp")
    rows = [
        {"file_name": "b.jpg", "prompt": "boot", "seed": 7, "category": "Shoes"},
        {"file_name": "a.png", "prompt": "coat", "seed": 7},
        {"file_name": "sub/c.webp", "prompt": "boot", "seed": 8},
    ]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert listed(tmp_path) == [("b.jpg", 0, "boot", 7), ("a.png", 1, "coat", 7), ("c.webp", 0, "boot", 8)]
    found = read_image_folder(tmp_path)
    assert (found.source, found.note, found.categories) == ("metadata.jsonl", None, {0: "Shoes"})


@pytest.mark.parametrize("column", ["prompt", "Prompts", "text", "caption"])
def test_a_csv_table_of_any_name_will_do_if_it_is_the_only_one(tmp_path: Path, column: str):
    images(tmp_path, "a.png", "b.png")
    (tmp_path / "mine.csv").write_text(f'file_name,{column}\na.png,"boot, red"\nb.png,coat\n')
    assert listed(tmp_path) == [("a.png", 0, "boot, red", 0), ("b.png", 1, "coat", 0)]


def test_without_a_table_each_image_has_a_text_file(tmp_path: Path):
    images(tmp_path, "b.png", "a.png")
    (tmp_path / "a.txt").write_text("a red\n boot\n")
    (tmp_path / "b.txt").write_text("a coat")
    found = read_image_folder(tmp_path)
    assert listed(tmp_path) == [("a.png", 0, "a red boot", 0), ("b.png", 1, "a coat", 0)]
    assert found.source == "one text file an image"


def test_images_of_one_prompt_are_numbered_where_seeds_do_not_tell_them_apart(tmp_path: Path):
    images(tmp_path, "a.png", "b.png", "c.png")
    rows = [
        {"file_name": f"{name}.png", "prompt": "boot", "seed": seed} for name, seed in (("a", 3), ("b", 3), ("c", 5))
    ]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [seed for _, _, _, seed in listed(tmp_path)] == [0, 1, 2]


def test_images_without_a_prompt_and_rows_without_an_image_are_reported(tmp_path: Path):
    images(tmp_path / "in", "a.png", "b.png", "c.png")
    images(tmp_path, "outside.png")
    rows = [
        {"file_name": "a.png", "prompt": "boot"},
        {"file_name": "none.png", "prompt": "coat"},
        {"file_name": "../outside.png", "prompt": "coat"},
        {"file_name": "b.png", "prompt": " "},
    ]
    (tmp_path / "in" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_image_folder(tmp_path / "in")
    assert len(found.items) == 1
    assert found.note is not None
    assert "2 images without a usable prompt (b.png, c.png), left out" in found.note
    assert "2 rows that name no image there (lines 2, 3), left out" in found.note


def test_a_folder_without_prompts_or_with_two_tables_is_refused(tmp_path: Path):
    images(tmp_path, "a.png")
    with pytest.raises(ConfigError, match=r"no image .* with a prompt was found in it"):
        read_image_folder(tmp_path)
    (tmp_path / "x.csv").write_text("file_name,prompt\na.png,boot\n")
    (tmp_path / "y.csv").write_text("file_name,prompt\na.png,coat\n")
    with pytest.raises(ConfigError, match=r"which table holds the prompts, x\.csv or y\.csv\?"):
        read_image_folder(tmp_path)


def test_two_folders_agree_on_the_ids_of_their_prompts():
    mine = [Item(0, "boot", 0), Item(1, "hat", 0)]
    other = [Item(0, "coat", 0), Item(1, "boot", 0)]
    assert [(item.prompt_id, item.prompt) for item in matched_ids(mine, other)] == [(1, "boot"), (2, "hat")]


def test_a_picture_is_its_pixels_over_255_without_transparency(tmp_path: Path):
    pixels = np.arange(4 * 6 * 4, dtype=np.uint8).reshape(6, 4, 4)
    Image.fromarray(pixels, "RGBA").save(tmp_path / "a.png")
    found = load_picture(tmp_path / "a.png")
    assert found is not None
    assert torch.equal(found, torch.from_numpy(pixels[..., :3]).permute(2, 0, 1).float() / 255)


def test_what_is_no_image_of_8_bits_is_none(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(b"no image")
    Image.fromarray(np.full((4, 4), 40_000, dtype=np.uint16)).save(tmp_path / "b.png")
    assert load_picture(tmp_path / "a.png") is None
    assert load_picture(tmp_path / "b.png") is None


def test_images_of_several_sizes_score_as_they_do_alone():
    source = torch.Generator().manual_seed(0)
    pictures = [torch.rand(3, 4 + i % 2, 6, generator=source) for i in range(5)]
    pictures[3] = pictures[3] * torch.nan
    texts = ["a", "bb", "ccc", "dddd", "e"]
    found = score_images([*pictures, None], [*texts, "f"], {"toy": toy_reward}, device=torch.device("cpu"))
    alone = [float(toy_reward(p[None], [t])) for p, t in zip(pictures, texts, strict=True)]
    torch.testing.assert_close(
        found.scores["toy"], torch.tensor([*alone, torch.nan], dtype=torch.float64), rtol=0, atol=1e-6, equal_nan=True
    )
    assert found.scores["toy"].isnan().tolist() == [False] * 3 + [True, False, True]
    assert found.seconds["toy"] > 0


def test_an_items_image_depends_on_its_prompt_id_and_seed_alone():
    backbone, sampling = TinyFlow(), Sampling(num_steps=2, guidance=1.0)
    items = [Item(i, prompt, seed=4) for i, prompt in enumerate(PROMPTS)]
    assert torch.equal(sampled(backbone, items, sampling), sample(backbone, PROMPTS, sampling, seed=4))
    mixed = [items[2], Item(2, PROMPTS[2], seed=5), items[0]]
    found = sampled(backbone, mixed, sampling)
    torch.testing.assert_close(found[0], sample(backbone, PROMPTS, sampling, seed=4)[2], rtol=0, atol=1e-6)
    torch.testing.assert_close(found[1], sample(backbone, PROMPTS, sampling, seed=5)[2], rtol=0, atol=1e-6)
    assert not torch.allclose(found[0], found[1])
