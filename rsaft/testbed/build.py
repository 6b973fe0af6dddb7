"""Build a testbed world from nothing: `python -m rsaft.testbed.build fashion|shapes [--set B]`.

Autoencoder, diffusion model, preference images, reward models: each stage leaves a file under OUT/stages and is skipped
when that file is there, so a stopped build goes on where it was. What the package ships lies in OUT/package.
"""

import argparse
import copy
import functools
import importlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel

from rsaft.testbed import model
from rsaft.testbed.preferences import (
    Pool,
    PreferenceRecipe,
    disjoint_sets,
    draw_pairs,
    evaluate_reward,
    learn_reward,
    standardise,
)
from rsaft.testbed.rewards import caption_words, load_reward, save_reward

WORLDS = ("fashion", "shapes")
REWARDS = {"train": "cnn", "cnn2": "cnn", "vit": "vit", "mixer": "mixer"}  # file name -> architecture
SETS = {"A": 0, "B": 1}  # a set is a base and its rewards; they differ in every seed


@dataclass(frozen=True)
class World:
    """What a build needs to know of a world module."""

    name: str
    prompts: tuple[str, ...]
    prompts_train: tuple[str, ...]
    real: Callable[..., tuple[Tensor, list[str]]]  # (n, seed=, split=)
    real_for: Callable[..., Tensor]  # (prompts, seed=, split=)
    near_miss: Callable[[str, torch.Generator], str]
    gold: Callable[[], Callable[[Tensor, Sequence[str]], Tensor]]


@dataclass(frozen=True)
class Recipe:
    """Every size and length of a build."""

    images: int = 40_000  # training images of autoencoder and diffusion model
    autoencoder: model.AutoencoderRecipe = field(default_factory=model.AutoencoderRecipe)
    diffusion: model.DiffusionRecipe = field(default_factory=model.DiffusionRecipe)
    preferences: PreferenceRecipe = field(default_factory=PreferenceRecipe)


RECIPES = {
    "fashion": Recipe(),
    "shapes": Recipe(
        autoencoder=model.AutoencoderRecipe(steps=1500, edges=0.0, squares=10.0),
        diffusion=model.DiffusionRecipe(prediction="v_prediction"),
    ),
}


def open_world(name: str, out: Path, data: Path | None) -> World:
    """The world module `name`, bound to its data; fashion's judge gets its bank in `out`/package.

    Raises:
        ValueError: if there is no such world.
    """
    if name not in WORLDS:
        raise ValueError(f"testbed.build: there is no world {name!r}; allowed: {', '.join(WORLDS)}.")
    module = importlib.import_module(f"rsaft.testbed.{name}")
    world = World(
        name=name,
        prompts=module.PROMPTS,
        prompts_train=module.PROMPTS_TRAIN,
        real=module.real,
        real_for=module.real_for,
        near_miss=module.near_miss,
        gold=module.gold,
    )
    if name != "fashion":
        return world
    source = data or module.DATA
    bank = out / "package" / "bank.npz"
    if not bank.is_file():
        module.write_bank(bank, data=source)
    return replace(
        world,
        real=functools.partial(module.real, data=source),
        real_for=functools.partial(module.real_for, data=source),
        gold=functools.partial(module.gold, bank=bank),
    )


def build(name: str, out: Path, *, seed: int = 0, recipe: Recipe | None = None, data: Path | None = None) -> Path:
    """Build world `name` into `out` and return the folder to ship, `out`/package; about 40 CPU-minutes.

    Args:
        name: one of WORLDS.
        out: any folder; a stage whose file is already there is not run again.
        seed: the set's seed; every stage draws from its own multiple of it.
        recipe: sizes and lengths; RECIPES[name] by default, which is what is shipped.
        data: folder of the IDX files (fashion only).
    """
    torch.set_num_threads(1)
    recipe = recipe or RECIPES[name]
    stages, package = out / "stages", out / "package"
    stages.mkdir(parents=True, exist_ok=True)
    package.mkdir(exist_ok=True)
    world = open_world(name, out, data)
    note = Notebook(out / "build.json")
    note.write("recipe", {"world": name, "seed": seed, **asdict(recipe)})
    build_base(world, out, seed=seed, recipe=recipe, note=note)
    build_rewards(world, out, seed=seed, recipe=recipe, note=note)
    (package / "build.json").write_text((out / "build.json").read_text())
    return package


def build_base(world: World, out: Path, *, seed: int, recipe: Recipe, note: "Notebook") -> None:
    """Autoencoder, text encoder and UNet: writes one pipeline per age under stages, the last one under package."""
    ages = [*recipe.diffusion.ages, recipe.diffusion.steps]
    if all(age_folder(out, age).is_dir() for age in ages) and (out / "package" / "pipeline").is_dir():
        return
    images, captions = world.real(recipe.images, seed=1000 * seed + 1, split="train")
    images = (images * 255).round().to(torch.uint8)
    vae = _autoencoder(out / "stages" / "autoencoder.safetensors", images, seed=seed, recipe=recipe, note=note)
    tokenizer = model.build_tokenizer(world.prompts)
    with note.timed("diffusion"):
        latents = model.encode(vae, images)
        for step, text_encoder, unet in model.train_diffusion(
            latents, captions, tokenizer, seed=1000 * seed + 3, recipe=recipe.diffusion, log=_say
        ):
            pipeline = model.build_pipeline(vae, text_encoder, unet, tokenizer, recipe.diffusion.prediction)
            _save_half(pipeline, age_folder(out, step))
    pipeline = model.load_pipeline(age_folder(out, recipe.diffusion.steps))
    _save_half(pipeline, out / "package" / "pipeline")


def build_rewards(world: World, out: Path, *, seed: int, recipe: Recipe, note: "Notebook") -> None:
    """Preference images and the reward models learned from them, each on its own images."""
    folder = out / "package" / "rewards"
    if all((folder / f"{name}.safetensors").is_file() for name in REWARDS):
        return
    pool = _pool(world, out, seed=seed, recipe=recipe, note=note)
    base = model.load_pipeline(out / "package" / "pipeline")
    prompts = _spread(world.prompts_train, 480)
    images = model.sample(base, prompts, generator=torch.Generator().manual_seed(1000 * seed + 50))
    preferences = recipe.preferences
    sets, held = disjoint_sets(pool, len(REWARDS), validation=preferences.validation, seed=1000 * seed + 60)
    validation = draw_pairs(pool, held, 2000, slope=preferences.slope, seed=1000 * seed + 61)
    note.write("label_ceiling", round(validation.ceiling, 4))
    for number, (name, architecture) in enumerate(REWARDS.items()):
        path = folder / f"{name}.safetensors"
        if path.is_file():
            continue
        with note.timed(f"reward {name}"):
            own = 1000 * seed + 70 + 5 * number
            train = draw_pairs(pool, sets[number], preferences.pairs, slope=preferences.slope, seed=own)
            reward = learn_reward(
                architecture,
                caption_words(world.prompts),
                pool,
                train,
                validation,
                seed=own,
                recipe=preferences,
                log=_say,
            )
            save_reward(reward, path)
            reward = load_reward(path)  # standardise what is shipped: the rounded weights
            standardise(reward, images, prompts)
            save_reward(reward, path)
        note.write(f"accuracy.{name}", round(evaluate_reward(reward, pool, validation)[1], 4))


def _pool(world: World, out: Path, *, seed: int, recipe: Recipe, note: "Notebook") -> Pool:
    """Images of the base at all its ages and guidances, and real images, right and near misses; judged by gold."""
    path = out / "stages" / "pool.safetensors"
    ages = [*recipe.diffusion.ages, recipe.diffusion.steps]
    cells = [(age, guidance) for age in ages for guidance in recipe.preferences.guidances]
    each, real = recipe.preferences.generated // len(cells), recipe.preferences.real // 2
    generator = torch.Generator().manual_seed(1000 * seed + 10)
    generated = _spread(world.prompts, each)
    asked = _spread(world.prompts, real)
    prompts = (*generated * len(cells), *asked, *asked)
    if path.is_file():
        stored = load_file(path)
        return Pool(stored["images"], prompts, stored["gold"])
    with note.timed("pool"):
        images = []
        for age, guidance in cells:
            pipeline = model.load_pipeline(age_folder(out, age))
            images.append(model.sample(pipeline, generated, generator=generator, guidance=guidance))
            _say(f"pool: base of {age} steps at guidance {guidance}")
        missed = [world.near_miss(prompt, generator) for prompt in asked]
        images.append(world.real_for(asked, seed=1000 * seed + 11, split="train"))
        images.append(world.real_for(missed, seed=1000 * seed + 12, split="train"))
        everything = torch.cat(images)
        judge = world.gold()
        gold = torch.cat([judge(everything[i : i + 240], prompts[i : i + 240]) for i in range(0, len(prompts), 240)])
        for number, (age, guidance) in enumerate(cells):
            mean = gold[number * each : (number + 1) * each].mean().item()
            note.write(f"gold.base-{age}-guidance-{guidance}", round(mean, 4))
    pool = Pool((everything * 255).round().to(torch.uint8), prompts, gold)
    save_file({"images": pool.images, "gold": pool.gold}, path)
    return pool


def _spread(prompts: Sequence[str], n: int) -> tuple[str, ...]:
    """`n` of `prompts`, in turn."""
    return tuple(prompts[i % len(prompts)] for i in range(n))


def age_folder(out: Path, step: int) -> Path:
    """Where the pipeline of that training step lies."""
    return out / "stages" / f"base-{step:05d}"


class Notebook:
    """build.json: CPU minutes of each stage and whatever the stages report; kept on disk after every change."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notes: dict[str, object] = json.loads(path.read_text()) if path.is_file() else {}

    def write(self, key: str, value: object) -> None:
        self.notes[key] = value
        self.path.write_text(json.dumps(self.notes, indent=1, default=str) + "\n")

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Note the CPU minutes that the body took, as `minutes.STAGE`."""
        start = time.process_time()
        yield
        minutes = (time.process_time() - start) / 60
        self.write(f"minutes.{stage}", round(minutes, 2))
        _say(f"{stage}: {minutes:.1f} CPU minutes")


def _autoencoder(path: Path, images: Tensor, *, seed: int, recipe: Recipe, note: Notebook) -> AutoencoderKL:
    if path.is_file():
        vae = model.build_autoencoder()
        vae.load_state_dict(load_file(path))
        return vae.eval()
    with note.timed("autoencoder"):
        vae = model.train_autoencoder(images, seed=1000 * seed + 2, recipe=recipe.autoencoder, log=_say)
    save_file({k: v.contiguous() for k, v in vae.state_dict().items()}, path)
    return vae


def _save_half(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Save in fp16; the pipeline itself is not changed."""
    parts = (AutoencoderKL, CLIPTextModel, UNet2DConditionModel)
    half = {k: copy.deepcopy(v).half() if isinstance(v, parts) else v for k, v in pipeline.components.items()}
    twin = StableDiffusionPipeline(**half, requires_safety_checker=False)
    twin.save_pretrained(folder, safe_serialization=True)
    for path in folder.glob("*/config.json"):  # diffusers notes where a part was loaded from, a path of this machine
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _say(line: str) -> None:
    print(time.strftime("%H:%M:%S"), line, flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m rsaft.testbed.build", description=__doc__)
    parser.add_argument("world", choices=WORLDS)
    parser.add_argument("--set", choices=SETS, default="A", help="A is shipped; B is a second base and reward set")
    parser.add_argument("--out", type=Path, help="default: build/testbed/WORLD-SET")
    parser.add_argument("--data", type=Path, help="folder of the Fashion-MNIST IDX files")
    args = parser.parse_args()
    out = args.out or Path("build/testbed") / f"{args.world}-{args.set}"
    package = build(args.world, out, seed=SETS[args.set], data=args.data)
    _say(f"built {package}")


if __name__ == "__main__":
    main()
