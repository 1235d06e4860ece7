"""Kohya's names: every layer of the published UNets, both spellings, and no other."""

import types

import diffusers
import pytest
import torch
from diffusers.loaders.lora_conversion_utils import (
  _convert_unet_lora_key,
  _maybe_map_sgm_blocks_to_diffusers,
)
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from flax.core import freeze
from flax.traverse_util import flatten_dict

from safetydpo_jax.formats.base_model.pipeline import parameter_shapes
from safetydpo_jax.formats.base_model.weights import torch_name
from safetydpo_jax.formats.loras import kohya
from safetydpo_jax.models import published
from safetydpo_jax.models.unet import UNet2DCondition
from tests.support import distilled, webuis

UNETS = {
  "sd15": published.SD15_UNET,
  "sd21": published.SD21_UNET,
  "sdxl": published.SDXL_UNET,
}


def layers(config):
  shapes = flatten_dict(parameter_shapes(UNet2DCondition(freeze(config))))
  return {path[:-1] for path in shapes if path[-1] == "kernel"}


@pytest.mark.parametrize("config", UNETS.values(), ids=UNETS)
def test_every_layer_is_found_under_the_name_pytorch_gives_it(config):
  with torch.device("meta"):
    unet = diffusers.UNet2DConditionModel(**config)
  kinds = torch.nn.Linear, torch.nn.Conv2d
  names = {name for name, module in unet.named_modules() if isinstance(module, kinds)}
  found = {kohya.module_path("lora_unet_" + name.replace(".", "_")) for name in names}
  assert found == layers(config)
  assert {torch_name(path) for path in found} == names


@pytest.mark.parametrize("config", UNETS.values(), ids=UNETS)
def test_every_reader_finds_every_layer_that_is_written(config):
  """Linear layers and convolutions: ours, A1111's, ComfyUI's and diffusers' readers."""
  sgm, known = kohya.writes_sgm(config), webuis.comfyui(config)
  written = {torch_name(path): kohya.module_name(path, sgm) for path in layers(config)}
  found = [torch_name(kohya.module_path(name)) for name in written.values()]
  assert found == [*written]
  wanted = {module: webuis.sgm_table(config)[module] for module in written}
  found = {module: known.get(name) for module, name in written.items()}
  assert found == wanted
  found = {module: webuis.a1111(name, config) for module, name in written.items()}
  assert found == wanted
  assert diffusers_modules(written.values(), config) == [*written]


def diffusers_modules(names, config):
  """The modules that diffusers takes names for, in their order."""
  state = {f"{name}.lora_down.weight": name for name in names}
  shape = types.SimpleNamespace(layers_per_block=config["layers_per_block"])
  found = {}
  for key, name in _maybe_map_sgm_blocks_to_diffusers(state, shape).items():
    theirs = _convert_unet_lora_key(key).replace(".processor", "")
    theirs = theirs.replace("to_out_lora", "to_out.0_lora").removesuffix(".weight")
    found[name] = theirs.replace("_lora.down", "").removesuffix(".lora.down")
  return [found[name] for name in names]


@pytest.mark.parametrize("config", distilled.UNETS.values(), ids=distilled.UNETS)
def test_numbers_count_on_the_resnets_of_the_unet_s_own_levels(config):
  """Every layer of distilled models, as diffusers and the web UIs number them."""
  table, resnets = webuis.sgm_table(config), kohya.resnets_of(config)
  wanted = {torch_name(path): path for path in layers(config)}
  names = {m: f"lora_unet_{table[m].replace('.', '_')}" for m in wanted}
  found = {module: kohya.module_path(name, resnets) for module, name in names.items()}
  assert found == wanted
  # diffusers loses an upsampler that follows a resnet.
  kept = {m: name for m, name in names.items() if not name.endswith("_1_conv")}
  assert diffusers_modules(kept.values(), config) == [*kept]
  # Read as of two resnets, no such file passes for another UNet's.
  as_usual = {kohya.module_path(name) for name in names.values()}
  assert (None in as_usual) == (config["layers_per_block"] != 2)


def test_levels_may_have_unequal_numbers_of_resnets():
  """One on the way down and two; three on the way up and two."""
  for number, path in enumerate(("up_0 0", "up_0 1", "up_0 2", "up_1 0", "up_1 1")):
    block, layer = path.replace("_", "_blocks_").split()
    found = kohya.module_path(f"output_blocks_{number}_0_in_layers_2", (1, 2))
    assert found == (block, f"resnets_{layer}", "conv1")
  found = kohya.module_path("input_blocks_4_0_in_layers_2", (1, 2))
  assert found == ("down_blocks_1", "resnets_1", "conv1")


def sgm_names():
  """Every name that sgm's UNets could have, whatever their size."""
  ends = [
    "op",
    "conv",
    "in_layers_2",
    "out_layers_3",
    "emb_layers_1",
    "skip_connection",
  ]
  ends += ["proj_in", "proj_out"]
  for layer in range(10):
    block = f"transformer_blocks_{layer}"
    ends += [
      f"{block}_{attention}_{part}"
      for attention in ("attn1", "attn2")
      for part in ("to_q", "to_k", "to_v", "to_out_0")
    ]
    ends += [f"{block}_ff_net_0_proj", f"{block}_ff_net_2"]
  for end in ends:
    for inner in range(3):
      yield f"middle_block_{inner}_{end}"
      for side in ("input_blocks", "output_blocks"):
        for index in range(12):
          yield f"{side}_{index}_{inner}_{end}"
  yield from ("input_blocks_0_0", "out_2", "time_embed_0", "time_embed_2")
  yield from ("label_emb_0_0", "label_emb_0_2")


def dotted(sgm):
  """The tensor's name in a checkpoint of sgm: single numbers and levels are modules."""
  for part in ("input_blocks", "output_blocks", "middle_block", "transformer_blocks"):
    sgm = sgm.replace(part, part.replace("_", "-"))
  for part in ("in_layers", "out_layers", "emb_layers", "skip_connection", "proj_in"):
    sgm = sgm.replace(part, part.replace("_", "-"))
  for part in ("proj_out", "to_q", "to_k", "to_v", "to_out", "time_embed", "label_emb"):
    sgm = sgm.replace(part, part.replace("_", "-"))
  return sgm.replace("_", ".").replace("-", "_")


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_sgm_s_names_mean_what_diffusers_converter_takes_them_for(name):
  config = UNETS[name]
  wanted = layers(config)
  names = {sgm: kohya.module_path(f"lora_unet_{sgm}") for sgm in sgm_names()}
  names = {sgm: path for sgm, path in names.items() if path in wanted}
  assert set(names.values()) == wanted, "every layer has a name"
  for path in wanted:
    # SD1's upsampler follows a resnet where its level has no attention, so both are in
    # sgm_names: diffusers' converter decides below.
    spellings = [sgm for sgm, other in names.items() if other == path]
    assert len(spellings) == (2 if path[1:2] == ("upsamplers_0",) else 1)
  attends = [kind.startswith("Cross") for kind in config["up_block_types"]]
  checkpoint = {}
  for sgm in names:
    if sgm.startswith("output_blocks") and sgm.endswith("_conv"):
      _, _, index, inner, _ = sgm.split("_")
      if int(inner) != 1 + attends[int(index) // 3]:
        continue
    checkpoint[f"{dotted(sgm)}.weight"] = names[sgm]
  norms = "output_blocks.0.0.in_layers.0.weight", "out.0.weight", "out.0.bias"
  known = checkpoint | dict.fromkeys(norms)
  known |= dict.fromkeys(
    f"{part}.bias"
    for part in ("time_embed.0", "time_embed.2", "label_emb.0.0", "label_emb.0.2")
  )
  known |= dict.fromkeys(("input_blocks.0.0.bias", "out.2.bias"))
  for index, _ in enumerate(config["block_out_channels"][:-1], 1):
    known[f"input_blocks.{3 * index}.0.op.bias"] = None
  for index, attending in enumerate(attends[:-1], 1):
    known[f"output_blocks.{3 * index - 1}.{1 + attending}.conv.bias"] = None
  full = {f"model.diffusion_model.{key}": value for key, value in known.items()}
  converted = convert_ldm_unet_checkpoint(full, dict(config))
  got = {key: path for key, path in converted.items() if path is not None}
  assert got == {f"{torch_name(path)}.weight": path for path in wanted}


@pytest.mark.parametrize(
  "name",
  [
    "",
    "down_blocks",
    "down_blocks_0_attentions",
    "down_blocks_0_attentions_0_transformer_blocks_0_attn3_to_q",
    "down_blocks_0_attentions_0_to_q_extra",
    "down_blocks_0__attentions_0_proj_in",
    "_conv_in",
    "conv_in_",
    "input_blocks_3_0_conv",
    "input_blocks_3_1_op",
    "input_blocks_3_0_in_layers_2",
    "input_blocks_0_1_proj_in",
    "input_blocks_4_2_proj_in",
    "input_blocks_4_1_in_layers_2",
    "output_blocks_1_1_conv",
    "output_blocks_2_0_conv",
    "output_blocks_2_1_op",
    "middle_block_1_op",
    "middle_block_3_proj_in",
    "..",
    "../../etc",
    "double_blocks_0_img_attn_qkv",
  ],
)
def test_a_name_that_is_no_layer_is_not_guessed(name):
  assert kohya.module_path(f"lora_unet_{name}") is None
