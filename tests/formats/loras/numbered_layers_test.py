"""Files that call layers by their number, for a model whose levels have one resnet."""

import dataclasses

import diffusers
import jax
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict

from safetydpo_jax import load_lora, load_pipeline, lora
from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.export_lora import ExportOptions, read_source
from safetydpo_jax.formats.loras.load import load_loras
from safetydpo_jax.merging.merge_experts import MergeOptions, merge_experts
from safetydpo_jax.training import initial_lora
from tests.support import checkpoints, dialects, drawn
from tests.support.configs import run_config
from tests.support.twins import EVERY_KIND


@pytest.fixture(scope="module")
def koala(tmp_path_factory):
  """A tiny model of KOALA's form, and one LoRA in diffusers' and in sgm's spelling."""
  folder = tmp_path_factory.mktemp("koala")
  parts = {**checkpoints.SDXL, "unet": dialects.TINY["KOALA"]}
  base = checkpoints.save_tiny_sdxl_checkpoint(folder / "base", parts=parts)
  files = []
  for naming in (dialects.flat, dialects.flat_sgm):
    unet = diffusers.UNet2DConditionModel.from_pretrained(base / "unet")
    (folder / naming.__name__).mkdir()
    torch.manual_seed(0)
    write = dialects.by_twin(naming, drawn.draw_lora)
    files.append(str(write(unet, unet.config, folder / naming.__name__)[0]))
  return base, *files


def products(tree):
  factors = flatten_dict(jax.device_get(tree))
  paths = [path[:-1] for path in factors if path[-1] == "a"]
  return {path: factors[*path, "a"] @ factors[*path, "b"] for path in paths}


def read(command, file, base, out):
  """The LoRA that a command makes of the file."""
  pipeline = load_pipeline(str(base), components=("unet",))
  match command:
    case "generate":
      return load_loras([file], pipeline)
    case "export":
      return read_source(ExportOptions(file, str(base), out)).adapter.lora
    case "merge":
      merge_experts(MergeOptions(file, "linear", out, model=str(base), weights="1"))
      return load_lora(str(out))
    case "train":
      more = {"init": file, "rank": 3, "targets": (*EVERY_KIND, "linear_2")}
      settings = dataclasses.replace(run_config().lora, **more)
      make, _ = initial_lora.first_lora(settings, pipeline)
      return lora.fold_alpha(make(), settings.alpha, settings.alpha_pattern)
    case "Python":
      return load_lora(file, unet_config=pipeline.unet.config)


@pytest.mark.parametrize("command", ["generate", "export", "merge", "train", "Python"])
def test_the_model_in_use_says_what_numbers_mean(command, koala, tmp_path):
  base, named, numbered = koala
  expected = products(load_lora(named))
  found = products(read(command, numbered, base, tmp_path / "out"))
  assert found.keys() == expected.keys()
  for path, product in expected.items():
    np.testing.assert_allclose(found[path], product, rtol=0, atol=1e-5)


def test_without_a_model_or_with_another_they_are_refused(koala, tmp_path):
  *_, numbered = koala
  with pytest.raises(InputError, match=r"blocks_\d.* two resnets on each level.*merge"):
    load_lora(numbered)
  with pytest.raises(InputError, match=r"is not a layer of this model.* 2, 2 resnets"):
    load_lora(numbered, dialects.TINY["SDXL"])


def test_an_unknown_part_of_a_numbered_layer_is_not_blamed_on_the_number(tmp_path):
  name = "lora_unet_input_blocks_4_1_proj_in.lora_C.weight"
  file = tmp_path / "x.safetensors"
  dialects.save_file({name: torch.ones(2)}, file)
  with pytest.raises(InputError, match="is not a UNet LoRA tensor"):
    load_lora(str(file))
