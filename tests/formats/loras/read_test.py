"""LoRA files of others: what PyTorch predicts with them, we predict."""

import shutil

import chex
import jax
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from safetydpo_jax import load_lora, lora
from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.base_model.weights import torch_name
from safetydpo_jax.formats.loras.write import torch_factors
from tests.support import twins
from tests.support.twins import EVERY_KIND


def write_kohya(file, tree, alphas, shapes, **more):
  """A file as kohya's trainer writes it: alphas differ from ranks and each other."""
  tensors = {}
  for n, (path, down, up) in enumerate(torch_factors(tree, shapes)):
    name = "lora_unet_" + torch_name(path).replace(".", "_")
    tensors[f"{name}.lora_down.weight"] = np.ascontiguousarray(down)
    tensors[f"{name}.lora_up.weight"] = np.ascontiguousarray(up)
    tensors[f"{name}.alpha"] = np.array(alphas[n % len(alphas)], np.float32)
  save_file(tensors | more, file)
  return file


@pytest.mark.parametrize("alphas", [(1.5,), (1.5, 2, 6)], ids=["one alpha", "alphas"])
def test_a_kohya_file_with_alpha_unlike_its_rank_predicts_the_same_here(
  alphas, pipeline, tree, inputs, tiny_checkpoint, tmp_path
):
  """The reference is PyTorch's arithmetic: W + alpha / r · up down in every layer."""
  shapes = pipeline.unet_shapes()
  wide = twins.random_lora(pipeline.params["unet"], 3, EVERY_KIND)
  file = write_kohya(tmp_path / "kohya.safetensors", wide, alphas, shapes)
  unet = UNet2DConditionModel.from_pretrained(tiny_checkpoint / "unet").eval()
  tensors = {name: torch.from_numpy(t) for name, t in load_file(file).items()}
  for name, module in unet.named_modules():
    flat = "lora_unet_" + name.replace(".", "_")
    if f"{flat}.alpha" in tensors:
      down, up = (tensors[f"{flat}.lora_{part}.weight"] for part in ("down", "up"))
      delta = up.flatten(1) @ down.flatten(1) * (tensors[f"{flat}.alpha"] / 3)
      with torch.no_grad():
        module.weight += delta.reshape(module.weight.shape)
  twins.assert_same_predictions(pipeline, file, unet, inputs)


def test_a_kohya_file_of_one_alpha_is_to_diffusers_what_it_is_here(
  pipeline, tree, inputs, tiny_checkpoint, tmp_path
):
  file = write_kohya(tmp_path / "x.safetensors", tree, (1.5,), pipeline.unet_shapes())
  theirs = StableDiffusionPipeline.from_pretrained(tiny_checkpoint)
  theirs.load_lora_weights(tmp_path, weight_name=file.name)
  twins.assert_same_predictions(pipeline, file, theirs.unet, inputs)


def test_sgm_s_names_give_the_same_lora_as_diffusers_names(tmp_path):
  """As kohya's trainer names SDXL's layers."""
  rng = np.random.default_rng(0)
  names = {
    "input_blocks_4_1_transformer_blocks_0_attn1_to_q": (
      "down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    ),
    "middle_block_1_transformer_blocks_9_attn2_to_out_0": (
      "mid_block_attentions_0_transformer_blocks_9_attn2_to_out_0"
    ),
    "output_blocks_5_2_conv": "up_blocks_1_upsamplers_0_conv",
    "output_blocks_3_0_skip_connection": "up_blocks_1_resnets_0_conv_shortcut",
    "label_emb_0_0": "add_embedding_linear_1",
  }
  trees = []
  factors = [
    (np.float32(rng.standard_normal((3, 8))), np.float32(rng.standard_normal((6, 3))))
    for _ in names
  ]
  for spelling in (names.keys(), names.values()):
    tensors = {}
    for name, (down, up) in zip(spelling, factors):
      tensors[f"lora_unet_{name}.lora_down.weight"] = down
      tensors[f"lora_unet_{name}.lora_up.weight"] = up
      tensors[f"lora_unet_{name}.alpha"] = np.float32([1.0]).reshape(())
    save_file(tensors, tmp_path / "x.safetensors")
    trees.append(load_lora(str(tmp_path / "x.safetensors")))
  chex.assert_trees_all_equal(*trees)
  paths = {"_".join(path[:-1]) for path in flatten_dict(trees[0])}
  assert paths == set(names.values())


def test_diffusers_old_attention_names_are_read(tree, exported, tmp_path):
  old = {}
  for name, tensor in load_file(exported).items():
    name = name.replace("to_out.0.lora", "to_out.lora")
    for part in ("to_q", "to_k", "to_v", "to_out"):
      name = name.replace(f".{part}.lora.", f".processor.{part}_lora.")
    old[name] = tensor
  assert not set(old) & set(load_file(exported))
  save_file(old, tmp_path / "old.safetensors")
  chex.assert_trees_all_equal(load_lora(str(tmp_path / "old.safetensors")), tree)


def test_tensors_of_text_encoders_are_left_out_and_counted(
  pipeline, tree, tmp_path, capsys, monkeypatch
):
  layer = "lora_te_text_model_encoder_layers_0_mlp_fc1"
  more = {
    f"{layer}.lora_down.weight": np.ones((3, 8), np.float32),
    f"{layer}.lora_up.weight": np.ones((8, 3), np.float32),
    f"{layer}.alpha": np.array(3, np.float32),
  }
  file = write_kohya(
    tmp_path / "x.safetensors", tree, (3,), pipeline.unet_shapes(), **more
  )
  chex.assert_trees_all_equal(load_lora(str(file)), tree)
  assert "3 tensors of text encoders left out;" in capsys.readouterr().err
  again = shutil.copy(file, tmp_path / "again.safetensors")
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  load_lora(str(again))
  assert capsys.readouterr().err == ""
  save_file(more, tmp_path / "text.safetensors")
  with pytest.raises(InputError, match="no tensors of a UNet LoRA"):
    load_lora(str(tmp_path / "text.safetensors"))


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


def test_the_tree_is_plain_float32_numpy(exported):
  for leaf in jax.tree.leaves(load_lora(str(exported))):
    assert type(leaf) is np.ndarray
    assert leaf.dtype == np.float32
    assert leaf.flags.c_contiguous
