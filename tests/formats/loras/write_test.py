"""LoRA files we write: diffusers loads them unchanged and predicts what we predict."""

import json
import logging

import chex
import jax
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from flax.core import freeze
from flax.traverse_util import flatten_dict
from safetensors import safe_open
from safetensors.torch import load_file

from safetydpo_jax import load_lora, lora
from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.base_model.pipeline import parameter_shapes
from safetydpo_jax.formats.base_model.weights import torch_name
from safetydpo_jax.formats.loras import kohya
from safetydpo_jax.formats.loras.write import (
  DTYPES,
  target_modules,
  write_diffusers,
  write_kohya,
)
from safetydpo_jax.models import published
from safetydpo_jax.models.unet import UNet2DCondition
from tests.support import twins
from tests.support.twins import ATTENTION, EVERY_KIND

# Largest difference of predictions of order one, for what the numbers were rounded to.
TOLERANCE = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 5e-2}


@pytest.fixture(scope="module")
def wide(pipeline):
  """Linear layers and convolutions, of unequal ranks."""
  params = pipeline.params["unet"]
  more = twins.random_lora(params, 2, ("to_q", "conv1"), seed=7)
  return jax.device_get(lora.add([twins.random_lora(params, 3, EVERY_KIND), more]))


@pytest.fixture
def theirs(tiny_checkpoint):
  return StableDiffusionPipeline.from_pretrained(tiny_checkpoint)


def write(naming, folder, tree, pipeline, dtype="float32"):
  options = {"shapes": pipeline.unet_shapes(), "dtype": DTYPES[dtype]}
  if naming == "kohya":
    header = kohya.header({}, "epsilon", 64, lora.rank_of(tree), "test")
    return write_kohya(folder, tree, header, **options)
  targets = target_modules(tree, pipeline.unet_shapes())
  return write_diffusers(folder, tree, targets, **options)


@pytest.mark.parametrize("naming", ["diffusers", "kohya"])
@pytest.mark.parametrize(
  ("kinds", "dtype"),
  [*(("attention", dtype) for dtype in DTYPES), ("every kind", "float32")],
)
def test_diffusers_loads_the_file_unchanged_and_predicts_the_same(
  kinds, naming, dtype, pipeline, tree, wide, inputs, theirs, tmp_path, caplog
):
  tree = tree if kinds == "attention" else wide
  file = write(naming, tmp_path, tree, pipeline, dtype)
  before = twins.predict_torch(theirs.unet, inputs)
  with caplog.at_level(logging.WARNING, "diffusers"):
    theirs.load_lora_weights(tmp_path, weight_name=file.name)
  assert "state_dict led to" not in caplog.text, "a layer was missed or made up"
  rank = lora.rank_of(tree)
  config = next(iter(theirs.unet.peft_config.values()))
  assert (config.r, config.lora_alpha) == (rank, rank)
  after = twins.predict_torch(theirs.unet, inputs)
  ours = twins.predict_ours(pipeline, tree, inputs)
  assert np.abs(after - before).max() > 0.3
  np.testing.assert_allclose(ours, after, rtol=0, atol=TOLERANCE[dtype])
  number = DTYPES[dtype]
  rounded = jax.tree.map(lambda leaf: leaf.astype(number).astype(np.float32), tree)
  params = pipeline.params["unet"]
  chex.assert_trees_all_close(
    lora.fuse(params, load_lora(str(file))), lora.fuse(params, rounded), atol=1e-6
  )


def test_ours_to_file_to_ours_is_exact(tree, exported, pipeline, tmp_path):
  chex.assert_trees_all_equal(load_lora(str(exported.parent)), tree)
  chex.assert_trees_all_equal(load_lora(str(exported)), tree)
  file = write("kohya", tmp_path / "kohya", tree, pipeline)
  chex.assert_trees_all_equal(load_lora(str(file.parent)), tree)


def test_transposed_arrays_are_written_in_their_new_order(tree, exported):
  """A writer that ignores strides writes the bytes of a view's base, silently."""
  tensors = load_file(exported)
  for path, leaf in flatten_dict(tree).items():
    part = {"a": "down", "b": "up"}[path[-1]]
    name = f"unet.{torch_name(path[:-1])}.lora.{part}.weight"
    np.testing.assert_array_equal(tensors[name].numpy(), leaf.T)


def test_names_and_header_are_diffusers_own(tree, exported):
  with safe_open(exported, "numpy") as file:
    header, names = file.metadata(), set(file.keys())
  assert header["format"] == "pt"
  assert json.loads(header["lora_adapter_metadata"]) == {
    "unet.r": 3,
    "unet.lora_alpha": 3,
    "unet.target_modules": list(ATTENTION),
  }
  assert len(names) == len(jax.tree.leaves(tree))
  layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
  assert {f"{layer}.lora.down.weight", f"{layer}.lora.up.weight"} <= names


def test_names_header_and_alphas_are_kohya_s(tree, pipeline, tmp_path):
  file = write("kohya", tmp_path, tree, pipeline, "bfloat16")
  with safe_open(file, "pt") as content:
    header = content.metadata()
  tensors = load_file(file)
  assert header["ss_network_dim"] == "3"
  assert header["ss_network_alpha"] == "3.0"
  assert header["ss_network_module"] == "networks.lora"
  assert header["modelspec.architecture"] == "stable-diffusion-v1/lora"
  layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"
  assert tensors[f"{layer}.lora_down.weight"].dtype == torch.bfloat16
  assert tensors[f"{layer}.lora_up.weight"].shape == (32, 3)
  assert tensors[f"{layer}.alpha"].shape == ()
  assert tensors[f"{layer}.alpha"].item() == 3.0
  assert len(tensors) == 3 * len(jax.tree.leaves(tree)) // 2


@pytest.mark.parametrize(
  ("config", "prediction", "version", "v2", "architecture"),
  [
    (published.SD15_UNET, "epsilon", "sd_v1", "False", "stable-diffusion-v1"),
    (published.SD21_UNET, "epsilon", "sd_v2", "True", "stable-diffusion-v2-512"),
    (published.SD21_UNET, "v_prediction", "sd_v2", "True", "stable-diffusion-v2-768-v"),
    (
      published.SDXL_UNET,
      "epsilon",
      "sdxl_base_v1-0",
      "False",
      "stable-diffusion-xl-v1-base",
    ),
  ],
)
def test_the_header_says_which_family_a_lora_is_for(
  config, prediction, version, v2, architecture
):
  """A1111 hides LoRAs of another family, by these two entries."""
  header = kohya.header(config, prediction, 512, 4, "x")
  assert (header["ss_base_model_version"], header["ss_v2"]) == (version, v2)
  assert header["modelspec.architecture"] == f"{architecture}/lora"
  assert header["modelspec.prediction_type"] == prediction.removesuffix("_prediction")


def test_a_lora_of_some_layers_of_a_kind_names_each(pipeline, inputs, theirs, tmp_path):
  """Else PEFT would adapt the others too, with random factors."""
  shapes = pipeline.unet_shapes()
  some = twins.random_lora(pipeline.params["unet"], targets=("attn2.to_q",))
  targets = target_modules(some, shapes)
  assert all(name.endswith("attn2.to_q") and "." in name for name in targets)
  write_diffusers(tmp_path, some, targets, shapes=shapes)
  theirs.load_lora_weights(tmp_path)
  adapted = [name for name, _ in theirs.unet.named_modules() if name.endswith("lora_A")]
  assert len(adapted) == len(targets)
  np.testing.assert_allclose(
    twins.predict_ours(pipeline, some, inputs),
    twins.predict_torch(theirs.unet, inputs),
    atol=1e-4,
  )


def test_a_number_that_float16_cannot_hold_is_named(tree, pipeline, tmp_path):
  big = lora.scale(tree, 1e6)
  with pytest.raises(
    InputError, match=r"unet\..*up.weight holds .*float16; use --dtype"
  ):
    write("diffusers", tmp_path, big, pipeline, "float16")
  assert not list(tmp_path.iterdir())
  write("diffusers", tmp_path, big, pipeline, "bfloat16")


def test_nothing_that_is_not_finite_is_written(tree, pipeline, tmp_path):
  with pytest.raises(InputError, match="NaN or infinity"):
    write("kohya", tmp_path, lora.scale(tree, np.nan), pipeline)
  assert not list(tmp_path.iterdir())


FULL_SIZE = {
  "sd15": (published.SD15_UNET, 128, 797_184),
  "sd21": (published.SD21_UNET, 128, 829_952),
  "sdxl": (published.SDXL_UNET, 560, 5_806_080),
}


@pytest.mark.parametrize(
  ("config", "modules", "parameters"), FULL_SIZE.values(), ids=FULL_SIZE
)
def test_files_of_the_published_models_have_their_tensors_and_names(
  config, modules, parameters, tmp_path
):
  """At full size and rank 4, from shapes alone: no weight of the model is made."""
  shapes = parameter_shapes(UNet2DCondition(freeze(config)))
  fresh = jax.eval_shape(lambda key: lora.init_lora(key, shapes, 4), jax.random.key(0))
  tree = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), fresh)
  lora.check_shapes(shapes, tree)
  targets = target_modules(tree, shapes)
  assert targets == sorted(ATTENTION)
  file = write_diffusers(tmp_path, tree, targets, shapes=shapes)
  tensors = load_file(file)
  assert len(tensors) == 2 * modules
  assert sum(tensor.numel() for tensor in tensors.values()) == parameters
  layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora"
  width = config["cross_attention_dim"]
  assert tensors[f"{layer}.down.weight"].shape == (4, width)
  assert tensors[f"{layer}.up.weight"].shape == (1280, 4)
  with torch.device("meta"):
    theirs = set(dict(UNet2DConditionModel(**config).named_modules()))
  assert {name.removeprefix("unet.").split(".lora.")[0] for name in tensors} <= theirs
  file = write_kohya(tmp_path, tree, {}, shapes=shapes)
  assert len(load_file(file)) == 3 * modules
  chex.assert_trees_all_equal_structs(load_lora(str(file)), tree)
