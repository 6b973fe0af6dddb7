"""The testbed's text-to-image model: Stable Diffusion 1.5's classes at 2.5 M parameters, and how they are trained."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

Log = Callable[[str], None]
Module = TypeVar("Module", bound=nn.Module)
Prediction = Literal["epsilon", "v_prediction"]
MAX_TOKENS = 24


@dataclass(frozen=True)
class AutoencoderRecipe:
    """How the autoencoder is trained; one step of 16 images costs about 0.16 s on one CPU core."""

    steps: int = 3000
    batch: int = 16
    lr: float = 1.5e-3
    edges: float = 1.0  # weight of the L1 error of pixel differences: keeps edges, where plain L1 blurs them
    squares: float = (
        0.0  # weight of the squared error of pixels and their differences: sees small shapes, as L1 does not
    )
    kl: float = 1e-5
    jitter: float = 0.05  # noise on the latents, in their own standard deviations, so that near latents decode alike


@dataclass(frozen=True)
class DiffusionRecipe:
    """How the text encoder and the UNet are trained; one step of 32 latents costs about 0.22 s on one CPU core."""

    steps: int = 3600
    batch: int = 32
    lr: float = 1e-3
    drop: float = 0.1  # share of captions replaced by the empty one, for classifier-free guidance
    ema: float = 0.998
    lean: float = 1.0  # t / 1000 is uniform to this power: below 1, more of the noisy steps, where the caption decides
    ages: tuple[int, ...] = (500, 1000, 2000)  # steps whose EMA weights are kept for the preference pool
    prediction: Prediction = "epsilon"  # v weighs the noisy steps, which place things, up to 200 times more


def build_tokenizer(captions: Sequence[str]) -> CLIPTokenizer:
    """A CLIP tokenizer over all bytes that also holds each word of `captions` as one token; needs no file."""
    symbols = list(bytes_to_unicode().values())
    pieces = symbols + [s + "</w>" for s in symbols]
    merges: dict[tuple[str, str], None] = {}
    for word in sorted({w for caption in captions for w in caption.lower().replace("-", " ").split()}):
        characters = [*word[:-1], word[-1] + "</w>"]
        head = characters[0]
        for tail in characters[1:]:
            merges[(head, tail)] = None
            head += tail
    vocab = dict.fromkeys([*pieces, *("".join(m) for m in merges), "<|startoftext|>", "<|endoftext|>"])
    ids = {piece: index for index, piece in enumerate(vocab)}
    return CLIPTokenizer(vocab=ids, merges=list(merges), model_max_length=MAX_TOKENS)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """CLIP text transformer, 64 wide, 2 layers, 4 heads."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            projection_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet() -> UNet2DConditionModel:
    """UNet for 4x8x8 latents: two levels of 48 and 96 channels, cross-attention on the upper one and in the middle."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(48, 96),
        layers_per_block=1,
        cross_attention_dim=64,
        norm_num_groups=8,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def build_autoencoder() -> AutoencoderKL:
    """Autoencoder between 3x32x32 images and 4x8x8 latents."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        sample_size=32,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )


def build_scheduler(prediction: Prediction = "epsilon") -> DDIMScheduler:
    """DDIM on Stable Diffusion 1.5's noise schedule."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction,
    )


def build_pipeline(
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    unet: UNet2DConditionModel,
    tokenizer: CLIPTokenizer,
    prediction: Prediction = "epsilon",
) -> StableDiffusionPipeline:
    """The parts as one diffusers pipeline, without safety checker, in eval mode."""
    pipeline = StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        unet=unet.eval(),
        tokenizer=tokenizer,
        scheduler=build_scheduler(prediction),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_pipeline(folder: Path) -> StableDiffusionPipeline:
    """The pipeline saved in `folder`, computing in fp32."""
    pipeline = StableDiffusionPipeline.from_pretrained(
        folder, torch_dtype=torch.float32, safety_checker=None, local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def sample(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    *,
    generator: torch.Generator,
    steps: int = 10,
    guidance: float = 1.0,
    chunk: int = 120,
) -> Float[Tensor, "b 3 h w"]:
    """DDIM samples of `pipeline` in [0, 1], one per prompt; all noise is drawn from `generator`."""
    channels, size = pipeline.unet.config.in_channels, pipeline.unet.config.sample_size
    noise = torch.randn(len(prompts), channels, size, size, generator=generator)
    images = [
        pipeline(
            list(prompts[i : i + chunk]),
            latents=noise[i : i + chunk],
            num_inference_steps=steps,
            guidance_scale=guidance,
            output_type="pt",
        ).images
        for i in range(0, len(prompts), chunk)
    ]
    return torch.cat(images)


def train_autoencoder(
    images: UInt8[Tensor, "n 3 32 32"], *, seed: int, recipe: AutoencoderRecipe, log: Log
) -> AutoencoderKL:
    """An autoencoder trained on `images`, its latents standardised per channel over them."""
    vae = _seeded(build_autoencoder, seed)
    vae.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=recipe.lr, weight_decay=1e-4)
    generator = torch.Generator().manual_seed(seed)
    for step, lr in enumerate(_warm_cosine(recipe.lr, recipe.steps)):
        pick = torch.randint(len(images), (recipe.batch,), generator=generator)
        x = _to_model_range(images[pick]).to(memory_format=torch.channels_last)
        latents = vae.encode(x).latent_dist
        noise = torch.randn(latents.mean.shape, generator=generator)
        spread = latents.mean.detach().std(dim=(0, 2, 3), keepdim=True)
        y = vae.decode(latents.mean + recipe.jitter * spread * noise).sample
        loss = F.l1_loss(y, x) + recipe.edges * _edge_error(y, x) + recipe.squares * _squared_error(y, x)
        loss = loss + recipe.kl * latents.mean.square().mean()
        _update(optimizer, loss, lr)
        if step % 250 == 0 or step == recipe.steps - 1:
            log(f"autoencoder step {step} loss {loss.item():.4f} mse {F.mse_loss(y, x).item() / 4:.5f}")
    vae.to(memory_format=torch.contiguous_format).eval()
    _standardise_latents(vae, images[:4096])
    return vae


def train_diffusion(
    latents: Float[Tensor, "n 4 8 8"],
    captions: Sequence[str],
    tokenizer: CLIPTokenizer,
    *,
    seed: int,
    recipe: DiffusionRecipe,
    log: Log,
) -> Iterator[tuple[int, CLIPTextModel, UNet2DConditionModel]]:
    """(step, text encoder, UNet) with EMA weights at each of the recipe's ages and at the end."""
    model = _seeded(lambda: nn.ModuleList([build_text_encoder(tokenizer), build_unet()]), seed).train()
    text_encoder, unet = model
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=1e-2)
    generator = torch.Generator().manual_seed(seed)
    tokens = tokenizer([*captions, ""], padding="max_length", truncation=True, return_tensors="pt").input_ids
    alphas = build_scheduler().alphas_cumprod
    for step, lr in enumerate(_warm_cosine(recipe.lr, recipe.steps), start=1):
        pick = torch.randint(len(latents), (recipe.batch,), generator=generator)
        x_0 = latents[pick]
        dropped = torch.rand(recipe.batch, generator=generator) < recipe.drop
        ids = tokens[torch.where(dropped, len(captions), pick)]
        t = _leaning(torch.randint(len(alphas), (recipe.batch,), generator=generator), len(alphas), recipe.lean)
        eps = torch.randn(x_0.shape, generator=generator)
        alpha_bar = alphas[t].view(-1, 1, 1, 1)
        x_t = alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * eps
        target = prediction_target(recipe.prediction, x_0, eps, alpha_bar)
        loss = F.mse_loss(unet(x_t, t, text_encoder(ids).last_hidden_state).sample, target)
        _update(optimizer, loss, lr)
        # A young average would still hold the random start, so its memory grows with the steps.
        decay = min(recipe.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(average.parameters()), [p.data for p in model.parameters()], 1 - decay)
        if step % 250 == 0:
            log(f"diffusion step {step} loss {loss.item():.4f}")
        if step in recipe.ages or step == recipe.steps:
            yield step, copy.deepcopy(average[0]), copy.deepcopy(average[1])


def prediction_target(
    prediction: Prediction,
    x_0: Float[Tensor, "b c h w"],
    eps: Float[Tensor, "b c h w"],
    alpha_bar: Float[Tensor, "b 1 1 1"],
) -> Float[Tensor, "b c h w"]:
    """What the network learns to say: eps, or v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0."""
    return eps if prediction == "epsilon" else alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x_0


@torch.no_grad()
def encode(vae: AutoencoderKL, images: UInt8[Tensor, "n 3 32 32"], chunk: int = 256) -> Float[Tensor, "n 4 8 8"]:
    """Mean latents of `images`."""
    return torch.cat([vae.encode(_to_model_range(part)).latent_dist.mean for part in images.split(chunk)])


@torch.no_grad()
def _standardise_latents(vae: AutoencoderKL, images: Tensor) -> None:
    """Fold the latents' mean and deviation into the convolutions beside them: mean 0, deviation 1, images unchanged."""
    latents = encode(vae, images)
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    out, into = vae.quant_conv, vae.post_quant_conv
    into.bias += into.weight.flatten(1) @ mean
    into.weight *= std.view(1, -1, 1, 1)
    out.weight[:4] /= std.view(-1, 1, 1, 1)
    out.bias[:4] = (out.bias[:4] - mean) / std
    out.weight[4:] = 0.0
    # The encoder's own variance is untrained (the latents are used by their means): keep it negligible.
    out.bias[4:] = -8.0


def _seeded(make: Callable[[], Module], seed: int) -> Module:
    """`make()` with initial weights fixed by `seed`; torch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def _warm_cosine(lr: float, steps: int) -> Iterator[float]:
    """Learning rates: 100 steps of warm-up, then half a cosine to zero."""
    for step in range(steps):
        yield lr * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _update(optimizer: torch.optim.Optimizer, loss: Tensor, lr: float) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.param_groups[0]["lr"] = lr
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def _edge_error(y: Tensor, x: Tensor) -> Tensor:
    return F.l1_loss(y.diff(dim=-1), x.diff(dim=-1)) + F.l1_loss(y.diff(dim=-2), x.diff(dim=-2))


def _leaning(t: Tensor, n: int, lean: float) -> Tensor:
    """n (t / n)^lean, whole and below n; exactly t where `lean` is 1."""
    return (n * (t.double() / n) ** lean).round().long().clamp(max=n - 1)


def _squared_error(y: Tensor, x: Tensor) -> Tensor:
    error = y - x
    return error.square().mean() + 0.5 * (error.diff(dim=-1).square().mean() + error.diff(dim=-2).square().mean())


def _to_model_range(images: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1.0
