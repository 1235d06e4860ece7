"""LoRA files: what we write, diffusers and peft load; what they write, we read."""

import json
import os

import chex
import jax
import numpy as np
import peft
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from flax.traverse_util import flatten_dict
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from safetydpo_jax import load_lora, load_pipeline, lora
from safetydpo_jax.errors import InputError
from safetydpo_jax.formats import lora_files
from safetydpo_jax.formats.weights import torch_name

TARGETS = lora.ATTENTION_TARGETS


@pytest.fixture(scope="module")
def pipeline(tiny_checkpoint):
  return load_pipeline(str(tiny_checkpoint), components=("unet",))


@pytest.fixture(scope="module")
def tree(pipeline):
  """A LoRA with every factor far from 0, rank 3: no axis has the size of another."""
  fresh = lora.init_lora(jax.random.key(0), pipeline.params["unet"], 3, TARGETS)
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32) * 0.3, fresh
  )


@pytest.fixture
def exported(tree, tmp_path):
  return lora_files.write_diffusers(tmp_path, tree, TARGETS)


@pytest.fixture(scope="module")
def inputs():
  rng = np.random.default_rng(1)
  return (
    rng.standard_normal((1, 6, 8, 4)).astype(np.float32),
    np.array([300]),
    rng.standard_normal((1, 5, 24)).astype(np.float32),
  )


def predict_ours(pipeline, tree, inputs):
  variables = {"params": pipeline.params["unet"], "lora": tree}
  return np.asarray(jax.jit(pipeline.unet.apply)(variables, *inputs))


def predict_torch(unet, inputs):
  latents, timesteps, context = map(torch.from_numpy, inputs)
  with torch.no_grad():
    out = unet(latents.permute(0, 3, 1, 2), timesteps, context).sample
  return out.permute(0, 2, 3, 1).numpy()


def test_diffusers_loads_the_file_unchanged_and_predicts_the_same(
  pipeline, tree, exported, inputs, tiny_checkpoint
):
  theirs = StableDiffusionPipeline.from_pretrained(tiny_checkpoint)
  before = predict_torch(theirs.unet, inputs)
  theirs.load_lora_weights(exported.parent)
  config = next(iter(theirs.unet.peft_config.values()))
  assert (config.r, config.lora_alpha) == (3, 3)
  after = predict_torch(theirs.unet, inputs)
  assert np.abs(after - before).max() > 0.1
  np.testing.assert_allclose(predict_ours(pipeline, tree, inputs), after, atol=1e-4)


def test_ours_to_file_to_ours_is_exact(tree, exported):
  chex.assert_trees_all_equal(load_lora(str(exported.parent)), tree)
  chex.assert_trees_all_equal(load_lora(str(exported)), tree)


def test_transposed_arrays_are_written_in_their_new_order(tree, exported):
  """safetensors.numpy.save_file writes the bytes of a view's base, silently."""
  tensors = load_file(exported)
  for path, leaf in flatten_dict(tree).items():
    part = {"a": "down", "b": "up"}[path[-1]]
    name = f"unet.{torch_name(path[:-1])}.lora.{part}.weight"
    np.testing.assert_array_equal(tensors[name], leaf.T)


def test_names_and_header_are_diffusers_own(tree, exported):
  with safe_open(exported, "numpy") as file:
    header, names = file.metadata(), set(file.keys())
  assert header["format"] == "pt"
  assert json.loads(header["lora_adapter_metadata"]) == {
    "unet.r": 3,
    "unet.lora_alpha": 3,
    "unet.target_modules": list(TARGETS),
  }
  assert len(names) == len(jax.tree.leaves(tree))
  layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
  assert {f"{layer}.lora.down.weight", f"{layer}.lora.up.weight"} <= names


@pytest.mark.parametrize("naming", ["diffusers", "peft"])
def test_a_lora_trained_by_peft_predicts_the_same_here(
  naming, pipeline, inputs, tiny_checkpoint, tmp_path
):
  unet = UNet2DConditionModel.from_pretrained(tiny_checkpoint / "unet").eval()
  torch.manual_seed(0)
  unet.add_adapter(
    peft.LoraConfig(
      r=3, lora_alpha=6, target_modules=list(TARGETS), init_lora_weights=False
    )
  )
  state = peft.get_peft_model_state_dict(unet)
  metadata = {}
  if naming == "diffusers":
    state = convert_state_dict_to_diffusers(state)
    StableDiffusionPipeline.save_lora_weights(
      tmp_path,
      unet_lora_layers=state,
      unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
    )
  else:
    metadata["lora_adapter_metadata"] = json.dumps({"unet.lora_alpha": 6})
    file = tmp_path / lora_files.FILE_NAME
    save_file({name: t.numpy() for name, t in state.items()}, file, metadata=metadata)
  np.testing.assert_allclose(
    predict_ours(pipeline, load_lora(str(tmp_path)), inputs),
    predict_torch(unet, inputs),
    atol=1e-4,
  )


def test_layers_of_unequal_rank_are_padded_to_one_that_diffusers_loads(
  pipeline, tree, inputs, tiny_checkpoint, tmp_path
):
  smaller = lora.init_lora(jax.random.key(1), pipeline.params["unet"], 2, ("to_q",))
  mixed = jax.device_get(lora.add([tree, jax.tree.map(lambda x: x + 0.1, smaller)]))
  lora_files.write_diffusers(tmp_path, mixed, TARGETS)
  theirs = StableDiffusionPipeline.from_pretrained(tiny_checkpoint)
  theirs.load_lora_weights(tmp_path)
  np.testing.assert_allclose(
    predict_ours(pipeline, mixed, inputs), predict_torch(theirs.unet, inputs), atol=1e-4
  )


SETTINGS = {
  "rslora": ('{"unet.use_rslora": true}', "use_rslora, which is not supported"),
  "pattern": ('{"unet.rank_pattern": {"to_q": 8}}', "rank_pattern, which is not"),
  "alpha": ('{"unet.lora_alpha": "four"}', "unet.lora_alpha is 'four'"),
  "list": ("[]", "no JSON object"),
  "cut": ('{"unet.r"', "no JSON"),
}


@pytest.mark.parametrize(("metadata", "message"), SETTINGS.values(), ids=SETTINGS)
def test_settings_that_would_change_the_product_are_refused(
  metadata, message, exported, tmp_path
):
  file = tmp_path / "other.safetensors"
  save_file(load_file(exported), file, metadata={"lora_adapter_metadata": metadata})
  with pytest.raises(InputError, match=message):
    load_lora(str(file))


def test_alpha_tensors_scale_the_product(tree, exported, tmp_path):
  tensors = load_file(exported)
  for name in list(tensors):
    if name.endswith("down.weight"):
      alpha = name.replace(".lora.down.weight", ".alpha")
      tensors[alpha] = np.array(1.5, np.float32)
  save_file(tensors, tmp_path / "alpha.safetensors")
  chex.assert_trees_all_close(
    load_lora(str(tmp_path / "alpha.safetensors")), lora.scale(tree, 0.5), rtol=1e-6
  )


LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
A, B = np.ones((3, 8), np.float32), np.ones((8, 3), np.float32)
BROKEN = {
  "no LoRA": ({"unet.conv_in.weight": A}, "is no UNet LoRA tensor"),
  "one factor": ({f"{LAYER}.lora.down.weight": A}, "only one of its two factors"),
  "ranks": (
    {f"{LAYER}.lora.down.weight": A, f"{LAYER}.lora.up.weight": np.ones((8, 2))},
    "expected one rank",
  ),
  "NaN": (
    {f"{LAYER}.lora.down.weight": A * np.nan, f"{LAYER}.lora.up.weight": B},
    "NaN or infinity",
  ),
  "text encoder": ({"text_encoder.x.lora.down.weight": A}, "is no UNet LoRA tensor"),
}


@pytest.mark.parametrize(("tensors", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_named(tensors, message, tmp_path):
  file = tmp_path / "broken.safetensors"
  save_file({name: np.asarray(t, np.float32) for name, t in tensors.items()}, file)
  with pytest.raises(InputError, match=message) as error:
    load_lora(str(file))
  assert str(file) in str(error.value)


def test_a_truncated_file_is_named(exported):
  os.truncate(exported, exported.stat().st_size // 2)
  with pytest.raises(InputError, match="no readable"):
    load_lora(str(exported))


def test_something_that_is_no_lora_is_named(tmp_path):
  with pytest.raises(InputError, match="no LoRA at"):
    load_lora(str(tmp_path / "nothing"))
  with pytest.raises(InputError, match="no finished expert"):
    load_lora(str(tmp_path))
