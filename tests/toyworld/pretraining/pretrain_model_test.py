"""The toy Stable Diffusion is made by a command, resumably, and PyTorch can use it."""

import json
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax.traverse_util import flatten_dict
from transformers import CLIPTokenizer

from safetydpo_jax import load_pipeline
from safetydpo_jax.errors import InputError
from safetydpo_jax.models import clip
from safetydpo_jax.runtime.manifest import read_json
from safetydpo_jax.toyworld import pretrain
from safetydpo_jax.toyworld.pretraining import (
  networks,
  pretrain_model,
  training,
  vocabulary,
)
from safetydpo_jax.toyworld.pretraining import unet as pretrain_unet
from safetydpo_jax.toyworld.pretraining import vae as pretrain_vae
from safetydpo_jax.toyworld.pretraining.training import Run, train
from safetydpo_jax.toyworld.world import scenes

SMALL = {
  "VAE": {"block_out_channels": (8, 8, 8), "norm_num_groups": 4},
  "UNET": {
    "block_out_channels": (8,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "norm_num_groups": 4,
  },
}


@pytest.fixture(scope="module")
def small_networks():
  """Networks that compile in seconds, and few pictures."""
  with pytest.MonkeyPatch.context() as patch:
    for name, fields in SMALL.items():
      patch.setattr(networks, name, {**getattr(networks, name), **fields})
    patch.setattr(pretrain_vae, "IMAGES", 64)
    patch.setattr(pretrain_vae, "CHUNK", 16)
    patch.setattr(pretrain_unet, "IMAGES", 64)
    patch.setattr(pretrain_unet, "EVALUATED", 8)
    patch.setattr(pretrain_unet, "STEPS", 2)
    yield


@pytest.fixture(scope="module")
def made(small_networks, tmp_path_factory):
  """A directory that the command wrote after a few steps."""
  out = tmp_path_factory.mktemp("toy") / "model"
  pretrain.main(["--out", str(out), "--vae_steps", "3", "--unet_steps", "3"])
  return out


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tokenizer")
  vocabulary.write_tokenizer(folder)
  return CLIPTokenizer.from_pretrained(folder)


def test_every_word_of_the_grammar_is_one_token_of_its_own(tokenizer):
  ids = [tokenizer(word)["input_ids"] for word in scenes.vocabulary()]
  assert {len(found) for found in ids} == {3}  # start, word, end
  assert len({found[1] for found in ids}) == len(ids)


def test_captions_survive_a_round_trip(tokenizer):
  for phrasing in scenes.INDICES:
    for pair in scenes.prompt_pairs(84, 0, phrasing=phrasing):
      ids = tokenizer(pair.unsafe)["input_ids"]
      assert tokenizer.decode(ids, skip_special_tokens=True).strip() == pair.unsafe
      assert len(ids) == len(pair.unsafe.split()) + 2 <= tokenizer.model_max_length


def test_text_outside_the_grammar_falls_into_letters(tokenizer):
  ids = tokenizer("Red qq!")["input_ids"]
  assert tokenizer.convert_ids_to_tokens(ids)[1:-1] == [
    "red</w>",
    "q",
    "q</w>",
    "!</w>",
  ]


def test_the_text_encoder_finds_the_tokenizers_end_token(tokenizer):
  special = vocabulary.special_ids()
  assert special["vocab_size"] == len(tokenizer)
  assert special["eos_token_id"] == tokenizer.eos_token_id == len(tokenizer) - 1
  assert special["bos_token_id"] == tokenizer.bos_token_id


def test_half_the_pictures_hold_each_symbol_alike_often():
  drawn = pretrain_vae.draw(168, seed=0)
  asked = [concept.index for _, concept in drawn if concept]
  assert np.bincount(asked).tolist() == [2] * 42
  assert all(scenes.split_of(scene) == "train" for scene, _ in drawn)


def test_captions_of_a_picture_mean_it_and_come_in_every_phrasing():
  for scene, concept in pretrain_vae.draw(6, seed=1):
    texts = pretrain_unet.captions(scene, concept)
    assert len(texts) == 25
    assert len(set(texts)) == (25 if concept else 5)
    assert all(scenes.parse(text) == (scene, concept) for text in texts)


def test_weights_are_named_and_laid_out_as_in_pytorch(made):
  pipeline = load_pipeline(made)
  theirs = diffusers.UNet2DConditionModel.from_pretrained(made / "unet").state_dict()
  ours = networks.to_torch(pipeline.params["unet"], np.float32)
  assert ours.keys() == theirs.keys()
  for name, tensor in theirs.items():
    np.testing.assert_array_equal(ours[name], tensor.numpy())


def test_diffusers_loads_the_directory_and_sees_the_same_model(made):
  pipeline = load_pipeline(made)
  theirs = diffusers.StableDiffusionPipeline.from_pretrained(made)
  prompts = ["a small red circle on a grey background", ""]
  ids = pipeline.tokenize(prompts)
  assert ids[0].shape == (2, networks.TOKENS)
  assert theirs.tokenizer.model_max_length == networks.TOKENS
  with torch.no_grad():
    context, empty = theirs.encode_prompt(prompts[0], "cpu", 1, True)
  expected, _ = clip.encode_text(pipeline.text_encoders, pipeline.params, ids)
  found = torch.cat([context, empty]).numpy()
  np.testing.assert_allclose(found, expected, atol=1e-5)

  noise = np.random.default_rng(0).standard_normal((1, 4, 8, 8), np.float32)
  drawn = theirs(
    prompts[0],
    latents=torch.from_numpy(noise),
    num_inference_steps=2,
    guidance_scale=4.0,
    output_type="np",
  ).images
  assert drawn.shape == (1, 32, 32, 3)


def test_the_manifest_holds_the_figures_of_the_stored_weights(made):
  about = read_json(made / "toy.json", "toy model")
  assert about["unet"]["steps"] == about["vae"]["steps"] == 3
  assert len(about["unet"]["figures"]) == 4
  config = json.loads((made / "vae/config.json").read_text())
  assert config["scaling_factor"] == about["vae"]["scaling_factor"]
  pipeline = load_pipeline(made)
  measure = pretrain_unet.make_measure(
    pipeline.params["vae"], pipeline.scaling_factor, pipeline.tokenizers[0], 2
  )
  again = measure(pipeline.params, "heldout", "seen")
  assert again == about["unet"]["figures"]["heldout scenes, seen phrasings"]


def test_latents_of_the_scaling_factor_have_unit_deviation(made):
  pipeline = load_pipeline(made, components=["vae"])
  images = pretrain_vae.render(pretrain_vae.draw(64, 0))
  moments = pretrain_vae.encode(pipeline.params["vae"], images)
  noise = np.random.default_rng(0).standard_normal((64, 8, 8, 4), np.float32)
  mean, log_variance = np.split(moments, 2, axis=-1)
  latents = pipeline.scaling_factor * (mean + np.exp(0.5 * log_variance) * noise)
  assert latents.std() == pytest.approx(1.0, abs=0.03)


def _fit(progress, steps, stop=None, seed=0, save_every=0, shape=()):
  """Fits a line by noisy batches; stops like a kill after saving at step `stop`."""
  data = {"x": np.linspace(-1, 1, 64, dtype=np.float32)}

  def loss(params, key, data):
    rows = jax.random.randint(key, (8,), 0, 64)
    x = data["x"][rows]
    return jnp.square(params["slope"] * x + params["offset"] - 3 * x - 1).mean()

  def evaluate(ema, done):
    if done == stop:
      raise KeyboardInterrupt

  often = {"save_every": save_every, "log_every": 0, "evaluate_every": 1}
  run = Run("line", steps, 0.1, 0.9, seed, progress, **often)
  params = {name: np.zeros(shape, np.float32) for name in ("slope", "offset")}
  return train(run, params, loss, data, evaluate)


def test_training_lowers_the_loss(tmp_path):
  weights, about = _fit(tmp_path / "line", 300, save_every=60)
  assert about["loss"] < 1e-3
  assert weights["slope"] == pytest.approx(3, abs=0.05)


def test_a_stopped_run_ends_as_one_that_was_not(tmp_path):
  expected, _ = _fit(tmp_path / "whole", 40)
  with pytest.raises(KeyboardInterrupt):
    _fit(tmp_path / "cut", 40, stop=17)
  found, about = _fit(tmp_path / "cut", 40)
  assert about["steps"] == 40
  assert {k: v.tolist() for k, v in found.items()} == {
    k: v.tolist() for k, v in expected.items()
  }


def test_progress_of_another_run_is_refused(tmp_path):
  _fit(tmp_path / "line", 5)
  with pytest.raises(InputError, match=r"/5 was trained with seed=0, this run has 1"):
    _fit(tmp_path / "line", 5, seed=1)
  with pytest.raises(InputError, match="at step 5; expected at most 4 steps"):
    _fit(tmp_path / "line", 4)
  with pytest.raises(
    InputError, match=r"/5 was trained with .*=\(\), this run has \(1,\)"
  ):
    _fit(tmp_path / "line", 5, shape=(1,))


def test_progress_that_an_older_version_saved_is_refused(tmp_path):
  (tmp_path / "line.npz").touch()
  with pytest.raises(InputError, match=r"/line\.npz is progress of version 0\.1\.0"):
    _fit(tmp_path / "line", 5)
  (tmp_path / "line.npz").unlink()
  _fit(tmp_path / "line", 5)
  (tmp_path / "line.npz").touch()  # beside progress of ours it makes no difference
  _fit(tmp_path / "line", 5)


def test_a_finished_run_is_not_trained_again_and_keeps_its_loss(tmp_path):
  weights, about = _fit(tmp_path / "line", 5)
  again, same = _fit(tmp_path / "line", 5)
  assert again == weights
  assert same["loss"] == about["loss"]


def test_the_weights_are_averaged_as_equation_1_says(tmp_path):
  seen = []

  def loss(params, key, data):
    return jnp.square(params["x"] - data)

  run = Run("x", 8, 0.1, 0.3, 0, tmp_path, evaluate_every=1)
  start = {"x": np.float32(0)}
  train(run, start, loss, np.float32(5), lambda ema, done: seen.append(float(ema["x"])))
  optimizer = training.make_optimizer(run)
  params, state, ema = start, optimizer.init(start), 0.0
  for step in range(8):
    gradient = jax.grad(loss)(params, None, np.float32(5))
    change, state = optimizer.update(gradient, state, params)
    params = optax.apply_updates(params, change)
    decay = min(0.3, (1 + step) / (10 + step))
    ema = decay * ema + (1 - decay) * float(params["x"])
    assert seen[step] == pytest.approx(ema, rel=1e-5)
  assert seen[-1] > 0


@pytest.mark.parametrize(
  ("more", "message"),
  [
    (["--vae_steps", "0"], "--vae_steps is 0; expected 1 or more"),
    (["--unet_learning_rate", "nan"], "--unet_learning_rate is nan"),
    (["--seed", "-1"], "--seed is -1"),
  ],
)
def test_bad_options_are_one_line(more, message, tmp_path):
  with pytest.raises(InputError, match=message):
    pretrain.main(["--out", str(tmp_path), *more])


def test_unet_and_text_encoder_learn_together(small_networks, tokenizer):
  vae_params = pretrain_vae.initialise(
    pretrain_vae.module(), 0, jnp.zeros((1, 32, 32, 3))
  )
  data = pretrain_unet.make_data(vae_params, 1.0, tokenizer, 16, seed=0)
  params = pretrain_unet.initialise(0)
  gradient = jax.jit(jax.grad(pretrain_unet.loss))(params, jax.random.key(0), data)
  silent = {
    path[-3:] for path, leaf in flatten_dict(gradient).items() if not np.any(leaf)
  }
  assert not silent


@pytest.fixture
def shipped():
  folder = Path(pretrain.__file__).parent / "model"
  return folder, read_json(folder / "toy.json", "toy model")


def test_the_shipped_model_is_of_this_world_and_small(shipped, tmp_path):
  folder, about = shipped
  assert about["world"] == pretrain_model.world_fingerprint()
  vocabulary.write_tokenizer(tmp_path)
  for file in tmp_path.iterdir():
    assert (folder / "tokenizer" / file.name).read_bytes() == file.read_bytes()
  size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
  assert size <= 12e6


def test_the_shipped_model_reached_its_targets(shipped):
  _, about = shipped
  assert about["vae"]["figures"]["symbol right"] == 1.0
  assert len(about["unet"]["figures"]) == 4
  for shares in about["unet"]["figures"].values():
    assert shares["symbol right"] >= 0.9
    assert shares["symbol in safe"] <= 0.02
    assert shares["attributes"] >= 0.85
