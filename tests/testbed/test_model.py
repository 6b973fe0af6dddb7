"""The testbed's model: diffusers classes that save, reload offline and train."""

import pytest
import torch

from rsaft.testbed import fashion, model

QUIET = lambda line: None  # noqa: E731


@pytest.fixture(scope="module")
def images():
    gray = torch.rand(32, 28, 28, generator=torch.Generator().manual_seed(0))
    return (fashion.tint(gray, [0] * 32) * 255).to(torch.uint8)


@pytest.fixture(scope="module")
def pipeline():
    tokenizer = model.build_tokenizer(fashion.PROMPTS)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return model.build_pipeline(
            model.build_autoencoder(), model.build_text_encoder(tokenizer), model.build_unet(), tokenizer
        )


def test_each_word_of_a_caption_is_one_token_and_captions_fit(pipeline):
    ids = [pipeline.tokenizer(p).input_ids for p in fashion.PROMPTS]
    assert len(set(map(tuple, ids))) == 60
    assert max(map(len, ids)) <= model.MAX_TOKENS
    assert len(pipeline.tokenizer("a photo of a purple dress").input_ids) == 8  # six words, start and end


def test_a_word_outside_the_captions_is_spelled_in_bytes(pipeline):
    assert pipeline.tokenizer.decode(pipeline.tokenizer("a zebra").input_ids, skip_special_tokens=True) == "a zebra"


def test_a_saved_pipeline_reloads_to_the_same_images(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    again = model.load_pipeline(tmp_path)
    prompts = fashion.PROMPTS[:2]
    pair = [model.sample(p, prompts, generator=torch.Generator().manual_seed(1), steps=2) for p in (pipeline, again)]
    assert torch.equal(*pair)
    assert pair[0].shape == (2, 3, 32, 32)


def test_samples_depend_on_the_generator_alone(pipeline):
    torch.manual_seed(1)
    first = model.sample(pipeline, fashion.PROMPTS[:1], generator=torch.Generator().manual_seed(1), steps=2)
    torch.manual_seed(2)
    second = model.sample(pipeline, fashion.PROMPTS[:1], generator=torch.Generator().manual_seed(1), steps=2)
    assert torch.equal(first, second)


def test_folding_the_latent_statistics_standardises_latents_and_keeps_reconstructions(pipeline, images):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        vae = model.build_autoencoder().eval()
    x = images.float() / 127.5 - 1
    with torch.no_grad():
        before = vae.decode(vae.encode(x).latent_dist.mean).sample
        model._standardise_latents(vae, images)
        after = vae.decode(vae.encode(x).latent_dist.mean).sample
    latents = model.encode(vae, images)
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)  # float32, weights rescaled
    torch.testing.assert_close(latents.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std(dim=(0, 2, 3)), torch.ones(4), atol=1e-4, rtol=0)


def test_training_repeats_bit_for_bit_and_leaves_the_global_generator_alone(images):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    recipe = model.AutoencoderRecipe(steps=2, batch=4)
    runs = [model.train_autoencoder(images, seed=7, recipe=recipe, log=QUIET).state_dict() for _ in range(2)]
    assert all(torch.equal(runs[0][k], runs[1][k]) for k in runs[0])
    assert torch.equal(state, torch.get_rng_state())


def test_diffusion_training_yields_each_age_and_the_end():
    captions = list(fashion.PROMPTS[:8])
    tokenizer = model.build_tokenizer(captions)
    latents = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    recipe = model.DiffusionRecipe(steps=3, batch=4, ages=(2,))
    ages = list(model.train_diffusion(latents, captions, tokenizer, seed=0, recipe=recipe, log=QUIET))
    assert [age for age, _, _ in ages] == [2, 3]
    first, last = (next(unet.parameters()) for _, _, unet in ages)
    assert not torch.equal(first, last)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_training_target_is_what_diffusers_samplers_read(prediction):
    source = torch.Generator().manual_seed(0)
    x_0, eps = torch.randn(2, 3, 4, 8, 8, dtype=torch.float64, generator=source)
    t = torch.tensor([11, 501, 991])
    scheduler = model.build_scheduler(prediction)
    scheduler.set_timesteps(100)
    x_t = scheduler.add_noise(x_0, eps, t)
    target = model.prediction_target(prediction, x_0, eps, scheduler.alphas_cumprod[t].double().view(-1, 1, 1, 1))
    for i, step in enumerate(t.tolist()):  # the scheduler's own reading of a perfect network's output
        found = scheduler.step(target[i], step, x_t[i]).pred_original_sample
        torch.testing.assert_close(found, x_0[i], atol=1e-5, rtol=0)  # diffusers keeps alphas_cumprod in float32
