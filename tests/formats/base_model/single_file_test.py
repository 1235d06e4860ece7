"""A single file is the diffusers directory that it was written from."""

import diffusers
import jax
import numpy as np
import pytest
import torch

from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.base_model.pipeline import load_pipeline
from tests.support import single_files, sizes
from tests.support.parity import NETWORK, assert_same_params
from tests.support.single_files import FAMILIES, save


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_is_read_as_the_directory_it_was_written_from(family, bases, write):
  base = load_pipeline(bases[family])
  single = load_pipeline(write(family))
  assert_same_params(single.params, base.params)
  assert single.fingerprint == base.fingerprint
  assert (single.resolution, single.vae_scale) == (16, 2)
  assert single.scaling_factor == base.scaling_factor
  schedules = single.schedule, base.schedule
  assert len({s.prediction_type for s in schedules}) == 1
  np.testing.assert_array_equal(*(s.alphas_cumprod for s in schedules))
  assert single.index["scheduler"] == base.index["scheduler"]
  prompt = ["a red one"]
  for ours, theirs in zip(single.tokenize(prompt), base.tokenize(prompt)):
    end = int((theirs == theirs.max()).argmax())
    np.testing.assert_array_equal(ours[0, : end + 1], theirs[0, : end + 1])
  # SD 2 and SDXL's second encoder are padded with "!", the first token.
  pads = {"sd1": (521,), "sd2": (0,), "sdxl": (521, 0)}[family]
  assert tuple(ids[0, -1] for ids in single.tokenize(prompt)) == pads


@pytest.mark.parametrize("name", [*FAMILIES, *single_files.DISTILLED])
def test_diffusers_reads_the_same_from_the_file(name, bases, write):
  """Its `from_single_file`: every tensor of every network, and a prediction."""
  base, file = bases[name], write(name)
  family = single_files.FAMILY_OF.get(name, name)
  ours = load_pipeline(file)
  theirs = sizes.CLASSES[family].from_single_file(str(file), config=str(base))
  assert isinstance(theirs.scheduler, getattr(diffusers, ours.index["scheduler"][1]))
  assert theirs.scheduler.config["prediction_type"] == ours.schedule.prediction_type
  assert sizes.difference(ours, theirs) < NETWORK


def test_half_precision_is_the_same_model(bases, originals, write):
  tensors = {n: x.half() for n, x in originals["sd1"].items() if x.is_floating_point()}
  half, full = load_pipeline(write(changes=tensors)), load_pipeline(bases["sd1"])
  assert half.fingerprint == full.fingerprint
  rounded = jax.tree.map(lambda x: x.astype(np.float16).astype(x.dtype), full.params)
  assert_same_params(half.params, rounded)


def test_files_without_position_ids(bases, originals, write):
  """As current transformers saves text encoders."""
  ids = [name for name in originals["sdxl"] if name.endswith("position_ids")]
  assert len(ids) == 1
  single = load_pipeline(write("sdxl", without=ids))
  assert_same_params(single.params, load_pipeline(bases["sdxl"]).params)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_is_read_as_diffusers_reads_it_and_said(
  dtype, bases, originals, write, capsys
):
  base, tensors = bases["sdxl"], originals["sdxl"]
  narrow = {n: x.to(dtype) for n, x in tensors.items() if x.is_floating_point()}
  file = write("sdxl", narrow)
  single = load_pipeline(file)
  (line,) = [x for x in capsys.readouterr().err.splitlines() if "weights in" in x]
  assert f"{file}: the UNet has weights in {str(dtype).split('.')[1]}" in line
  theirs = sizes.CLASSES["sdxl"].from_single_file(str(file), config=str(base))
  assert sizes.difference(single, theirs) < NETWORK
  load_pipeline(base, components=())
  assert "weights in" not in capsys.readouterr().err


def test_a_text_encoder_of_before_text_model(bases, originals, write):
  inner = "cond_stage_model.transformer."
  flat = {
    n.replace("text_model.", ""): x
    for n, x in originals["sd1"].items()
    if n.startswith(inner)
  }
  single = load_pipeline(write(changes=flat, without=[f"{inner}text_model."]))
  assert_same_params(single.params, load_pipeline(bases["sd1"]).params)


def test_sd_turbo_s_names_of_sd_2_s_text_encoder(bases, originals, write):
  theirs = {
    n.replace("cond_stage_model.", "conditioner.embedders.0."): x
    for n, x in originals["sd2"].items()
    if n.startswith("cond_stage_model.")
  }
  single = load_pipeline(write("sd2", changes=theirs, without=["cond_stage_model."]))
  assert_same_params(single.params, load_pipeline(bases["sd2"]).params)


def test_a_file_without_its_vae(bases, originals, write, tmp_path):
  """It trains and merges; what decodes images names what is missing."""
  file = write(without=["first_stage_model."])
  single = load_pipeline(file, components=("unet", "text_encoder"))
  assert (single.vae_scale, single.scaling_factor) == (8, 0.18215)
  with pytest.raises(InputError, match=r"no VAE .*--vae"):
    load_pipeline(file)
  base, tensors = bases["sd1"], originals["sd1"]
  expected = load_pipeline(base, components=("vae",))
  prefix = "first_stage_model."
  alone = {
    n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)
  }
  vae = save(tmp_path / "vae.safetensors", alone)
  for other in (vae, write(name="whole"), base, base / "vae"):
    found = load_pipeline(file, components=("vae",), vae_from=other)
    assert_same_params(found.params, expected.params)
    assert found.vae_scale == 2


def test_a_vae_s_file_beside_a_diffusers_directory(bases, originals, write):
  base, tensors = bases["sdxl"], originals["sdxl"]
  doubled = {n: 2 * x for n, x in tensors.items() if n.startswith("first_stage_model.")}
  found = load_pipeline(base, components=("vae",), vae_from=write("sdxl", doubled))
  own = load_pipeline(base, components=("vae",))
  assert_same_params(found.params, jax.tree.map(lambda x: 2 * x, own.params))
  assert found.scaling_factor == own.scaling_factor == 0.13025
  assert found.vae_fingerprint != own.vae_fingerprint


def test_a_vae_s_file_that_is_none_is_one_line(bases, tmp_path):
  base = bases["sd1"]
  named = base / "vae" / "diffusion_pytorch_model.safetensors"
  with pytest.raises(InputError, match=r"VAE .*diffusers' names; give its folder"):
    load_pipeline(base, vae_from=named)
  other = save(tmp_path / "x.safetensors", {"lora_unet_x.alpha": torch.ones(1)})
  with pytest.raises(InputError, match=r"VAE .*a LoRA; expected the VAE"):
    load_pipeline(base, vae_from=other)


def test_files_that_are_not_safetensors_are_refused(tmp_path):
  pickle = tmp_path / "model.ckpt"
  pickle.write_bytes(b"x")
  with pytest.raises(InputError, match=r"pickles can run code.*from_single_file"):
    load_pipeline(pickle)
  damaged = tmp_path / "model.safetensors"
  damaged.write_bytes(b"x")
  with pytest.raises(InputError, match="not a readable safetensors file"):
    load_pipeline(damaged)
