"""A diffusers directory becomes modules, weights, tokenizers and a schedule."""

import json
import shutil
import subprocess
import sys

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.base_model import pipeline as pipelines
from safetydpo_jax.formats.base_model.pipeline import load_pipeline
from safetydpo_jax.models import clip
from tests.support.checkpoints import save_tiny_checkpoint, save_tiny_sdxl_checkpoint
from tests.support.edits import edited_copy
from tests.support.parity import NETWORK, array, draw, tensor

PROMPTS = ["A red circle on the  Left", "", "é~ 'quoted', 12 " + "and on " * 90]


@pytest.fixture(scope="module")
def theirs(tiny_checkpoint):
  return diffusers.StableDiffusionPipeline.from_pretrained(tiny_checkpoint)


def test_describes_the_checkpoint(tiny_checkpoint):
  pipeline = load_pipeline(tiny_checkpoint)
  assert pipeline.path == tiny_checkpoint
  assert pipeline.name == str(tiny_checkpoint)
  assert set(pipeline.params) == {"unet", "vae", "text_encoder"}
  assert (pipeline.latent_channels, pipeline.vae_scale) == (4, 2)
  assert (pipeline.scaling_factor, pipeline.resolution) == (0.18215, 16)
  assert pipeline.schedule.prediction_type == "epsilon"
  assert pipeline.schedule.alphas_cumprod.shape == (1000,)
  leaves = jax.tree.leaves(pipeline.params)
  assert all(isinstance(leaf, np.ndarray) for leaf in leaves)
  assert {leaf.dtype for leaf in leaves} == {np.dtype(np.float32)}
  for module in pipeline.modules().values():
    hash(module)  # modules are static arguments of jitted functions


def test_from_words_to_prediction_equals_diffusers(tiny_checkpoint, theirs):
  pipeline = load_pipeline(tiny_checkpoint)
  ids = pipeline.tokenize(PROMPTS)
  latents, timesteps = draw(3, 8, 8, 4), np.array([1, 500, 999])

  @jax.jit
  def ours(params, latents, timesteps):
    context, _ = clip.encode_text(pipeline.text_encoders, params, ids)
    return pipeline.unet.apply({"params": params["unet"]}, latents, timesteps, context)

  with torch.no_grad():
    context, _ = theirs.encode_prompt(PROMPTS, "cpu", 1, False)
    expected = theirs.unet(tensor(latents), tensor(timesteps), context).sample
  np.testing.assert_allclose(
    ours(pipeline.params, latents, timesteps), array(expected), rtol=0, atol=NETWORK
  )


def test_tokens_equal_transformers(tiny_checkpoint, theirs):
  (ids,) = load_pipeline(tiny_checkpoint, components=()).tokenize(PROMPTS)
  assert ids.shape == (3, 77)
  assert ids.dtype == np.int32
  expected = theirs.tokenizer(
    PROMPTS, padding="max_length", truncation=True, max_length=77
  )
  np.testing.assert_array_equal(ids, expected["input_ids"])
  end = theirs.tokenizer.eos_token_id
  assert (ids[:, -1] == end).all()
  assert (ids[2] == end).sum() == 1  # truncated, and still ended


@pytest.mark.parametrize(
  ("file", "changes", "length", "pad"),
  [
    ("tokenizer_config.json", {"model_max_length": 20}, 20, None),
    ("tokenizer_config.json", {"model_max_length": None}, 77, None),
    ("special_tokens_map.json", {"pad_token": "!"}, 77, "!"),  # as in SD 2
  ],
)
def test_tokens_are_padded_as_the_tokenizers_files_say(
  tiny_checkpoint, tmp_path, file, changes, length, pad
):
  copy = tmp_path / "copy"
  edited_copy(tiny_checkpoint, copy, f"tokenizer/{file}", **changes)
  (ids,) = load_pipeline(copy, components=()).tokenize(PROMPTS)
  their = diffusers.StableDiffusionPipeline.from_pretrained(copy).tokenizer
  # The pipeline pads to the tokenizer's length, and fails if it has none.
  assert their.model_max_length == length or their.model_max_length > 10**20
  expected = their(PROMPTS, padding="max_length", truncation=True, max_length=length)
  np.testing.assert_array_equal(ids, expected["input_ids"])
  assert ids[1, -1] == their.convert_tokens_to_ids(pad or their.eos_token)


def test_tokens_are_counted_before_they_are_cut(tiny_checkpoint, theirs, caplog):
  pipeline = load_pipeline(tiny_checkpoint, components=())
  caplog.clear()
  expected = [len(theirs.tokenizer(text)["input_ids"]) for text in PROMPTS]
  assert pipeline.count_tokens(PROMPTS).tolist() == [expected]
  assert expected[2] > pipeline.token_limits[0] == 77


def test_only_the_components_asked_for_are_read(tiny_checkpoint):
  pipeline = load_pipeline(tiny_checkpoint, components=("vae",))
  assert set(pipeline.params) == {"vae"}
  none = load_pipeline(tiny_checkpoint, components=())
  assert none.params == {}
  assert none.fingerprint == pipeline.fingerprint
  full = load_pipeline(tiny_checkpoint, components=["unet"])
  shapes = jax.tree.map(lambda leaf: leaf.shape, none.unet_shapes())
  assert shapes == jax.tree.map(lambda leaf: leaf.shape, full.params["unet"])
  with pytest.raises(InputError, match=r"\['safety_checker'\] are unknown"):
    load_pipeline(tiny_checkpoint, components=["unet", "safety_checker"])


def test_bfloat16_halves_the_weights(tiny_checkpoint):
  pipeline = load_pipeline(tiny_checkpoint, dtype=jnp.bfloat16, remat="full")
  assert {x.dtype for x in jax.tree.leaves(pipeline.params)} == {np.dtype(jnp.bfloat16)}
  assert pipeline.unet.dtype == pipeline.vae.dtype == jnp.bfloat16
  assert pipeline.unet.remat == "full"


def test_half_precision_files_have_the_same_fingerprint(tiny_checkpoint, tmp_path):
  copy = tmp_path / "copy"
  shutil.copytree(tiny_checkpoint, copy)
  pipe = diffusers.StableDiffusionPipeline.from_pretrained(copy)
  pipe.to(torch.float16).save_pretrained(copy, variant="fp16")
  full = load_pipeline(copy)
  half = load_pipeline(copy, variant="fp16")
  assert half.fingerprint == full.fingerprint
  kernels = (p.params["unet"]["conv_in"]["kernel"] for p in (half, full))
  assert 0 < np.abs(np.subtract(*kernels)).max() < 1e-3
  with pytest.raises(InputError, match="no weights of variant 'ema'"):
    load_pipeline(copy, variant="ema")


def test_another_unet_has_another_fingerprint(tiny_checkpoint, tmp_path):
  other = save_tiny_checkpoint(tmp_path / "other", seed=1)
  fingerprints = {
    load_pipeline(path, components=()).fingerprint for path in (tiny_checkpoint, other)
  }
  assert len(fingerprints) == 2


def test_sdxl_layout_has_two_encoders(tmp_path):
  path = save_tiny_sdxl_checkpoint(tmp_path / "sdxl")
  pipeline = load_pipeline(path)
  assert set(pipeline.params) == set(pipelines.COMPONENTS)
  first, second = ids = pipeline.tokenize(["a red circle"])
  assert first[0, -1] == pipeline.tokenizers[0].eos_token_id
  assert second[0, -1] == 0  # "!", SDXL's second pad token
  np.testing.assert_array_equal(first[0, :5], second[0, :5])
  context, pooled = clip.encode_text(pipeline.text_encoders, pipeline.params, ids)
  assert context.shape == (1, 77, 40)
  theirs = diffusers.StableDiffusionXLPipeline.from_pretrained(path)
  with torch.no_grad():
    expected, _, expected_pooled, _ = theirs.encode_prompt(
      "a red circle", device="cpu", do_classifier_free_guidance=False
    )
  np.testing.assert_allclose(context, expected, rtol=0, atol=NETWORK)
  np.testing.assert_allclose(pooled, expected_pooled, rtol=0, atol=NETWORK)


@pytest.mark.parametrize(
  ("file", "changes", "message"),
  [
    ("unet/config.json", {"class_embed_type": "timestep"}, "class_embed_type"),
    ("unet/config.json", {"in_channels": 9}, r"inpainting.*not supported"),
    ("unet/config.json", {"cross_attention_dim": 32}, "different models"),
    ("unet/config.json", {"layers_per_block": 2}, r"unet.*lacks \d+ tensors"),
    ("vae/config.json", {"mid_block_add_attention": False}, r"vae.*no place"),
    ("vae/config.json", {"act_fn": "relu"}, "act_fn"),
    ("text_encoder/config.json", {"hidden_act": "relu"}, "hidden_act"),
    ("text_encoder/config.json", {"vocab_size": 9}, "token_embedding"),
    ("model_index.json", {"vae": ["diffusers", "AutoencoderTiny"]}, "AutoencoderTiny"),
    ("model_index.json", {"unet": None}, "unet is None"),
    (
      "model_index.json",
      {"text_encoder": [None, None]},
      "text_encoder is None",
    ),
    ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, "'flow'"),
    ("unet/config.json", {"sample_size": [8, 8, 8]}, "sample_size"),
    ("unet/config.json", {"sample_size": "64"}, "sample_size"),
    ("unet/config.json", {"sample_size": 10**9}, "at most 16,384 pixels"),
    ("unet/config.json", {"_x": json.loads("[" * 400 + "]" * 400)}, "deeper than 20"),
    ("vae/config.json", {"out_channels": 4}, "takes 3 channels and gives 4.*RGB"),
    ("text_encoder/config.json", {"architectures": [["x"]], "hidden_size": 7}, "size"),
    ("scheduler/scheduler_config.json", {"beta_start": "x"}, "beta_start"),
    ("model_index.json", {"_class_name": "StableDiffusionUpscalePipeline"}, "Upscale"),
  ],
)
def test_a_checkpoint_we_cannot_run_is_refused(
  tiny_checkpoint, tmp_path, file, changes, message
):
  copy = edited_copy(tiny_checkpoint, tmp_path / "copy", file, **changes)
  with pytest.raises(InputError, match=message):
    load_pipeline(copy)


@pytest.mark.parametrize(
  ("gone", "message"),
  [
    ("model_index.json", r"diffusers directory.*model_index\.json"),
    ("unet/config.json", r"unet.*config\.json"),
    ("unet/diffusion_pytorch_model.safetensors", "has no weights"),
    ("tokenizer", "needs its tokenizer"),
    ("tokenizer/vocab.json", "tokenizer as a CLIP tokenizer"),
    ("scheduler/scheduler_config.json", "scheduler_config"),
  ],
)
def test_an_incomplete_checkpoint_is_refused(tiny_checkpoint, tmp_path, gone, message):
  copy = tmp_path / "copy"
  shutil.copytree(tiny_checkpoint, copy)
  if (copy / gone).is_dir():
    shutil.rmtree(copy / gone)
  else:
    (copy / gone).unlink()
  with pytest.raises(InputError, match=message):
    load_pipeline(copy)


def test_what_the_json_files_say_is_checked_before_weights_are_read(
  tiny_checkpoint, tmp_path
):
  changes = {"prediction_type": "flow"}
  file = "scheduler/scheduler_config.json"
  copy = edited_copy(tiny_checkpoint, tmp_path / "copy", file, **changes)
  (copy / "unet/diffusion_pytorch_model.safetensors").unlink()
  with pytest.raises(InputError, match="'flow'"):
    load_pipeline(copy)


def test_runs_without_pytorch(tiny_checkpoint):
  """PyTorch is for tests; importing it here would make it a requirement."""
  code = f"""
import sys
sys.modules["torch"] = sys.modules["diffusers"] = None
import safetydpo_jax
pipeline = safetydpo_jax.load_pipeline({str(tiny_checkpoint)!r})
assert pipeline.tokenize(["a red circle"])[0].shape == (1, 77)
"""
  subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
