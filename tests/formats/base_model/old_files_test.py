"""Files of older libraries are read as diffusers and transformers read them."""

import json
from functools import partial

import diffusers
import jax
import numpy as np
import pytest
import torch
import transformers

from safetydpo_jax import diffusion
from safetydpo_jax.formats.base_model import old_files
from safetydpo_jax.formats.base_model.pipeline import load_pipeline
from safetydpo_jax.models import clip
from safetydpo_jax.sampling.renderer import fix_schedule
from tests.support.checkpoints import SCHEDULER, save_tiny_sdxl_checkpoint
from tests.support.edits import edited_copy
from tests.support.parity import NETWORK, array, draw, tensor

pytestmark = pytest.mark.filterwarnings("ignore:The configuration file of")


@pytest.fixture(scope="module")
def checkpoints(tiny_checkpoint, tmp_path_factory):
  xl = save_tiny_sdxl_checkpoint(tmp_path_factory.mktemp("xl") / "xl")
  return {"sd1": tiny_checkpoint, "sdxl": xl}


@pytest.mark.parametrize(
  ("family", "version", "size", "expected"),
  [
    ("sd1", "0.8.1", 32, (128, 128)),
    ("sd1", "0.6.0.dev0", 8, (128, 128)),
    ("sd1", "0.8", 63, (128, 128)),
    ("sd1", "0.8.1", 96, (192, 192)),
    ("sd1", "0.8.1", [8, 12], (16, 24)),
    ("sd1", "0.9.0.dev0", 8, (16, 16)),
    ("sd1", "0.10.2", 32, (64, 64)),
    ("sd1", "1.0.0", 8, (16, 16)),
    ("sd1", None, 8, (16, 16)),
    ("sdxl", "0.8.1", 8, (16, 16)),
  ],
)
def test_a_small_sample_size_of_old_unets_is_64(
  checkpoints, family, version, size, expected, tmp_path, capsys
):
  changes = {"_diffusers_version": version, "sample_size": size}
  copy = edited_copy(
    checkpoints[family], tmp_path / "copy", "unet/config.json", **changes
  )
  theirs = diffusers.DiffusionPipeline.from_pretrained(copy)
  sides = theirs.unet.config.sample_size
  sides = (sides, sides) if isinstance(sides, int) else tuple(sides)
  assert tuple(theirs.vae_scale_factor * side for side in sides) == expected
  capsys.readouterr()
  assert load_pipeline(copy, components=()).image_size == expected
  assert load_pipeline(copy, components=()).image_size == expected
  lines = capsys.readouterr().err.splitlines()
  corrected = sides[0] != size and isinstance(size, int)
  assert [f"sample_size is {size} and read as 64" in line for line in lines] == (
    [True] if corrected else []
  )


def test_block_types_had_a_longer_name(tiny_checkpoint, tmp_path):
  """UNetRes…: in the UNet and in the VAE, which takes them from the same table."""
  copy = tiny_checkpoint
  for name in ("unet", "vae"):
    file = f"{name}/config.json"
    config = json.loads((tiny_checkpoint / file).read_text())
    fields = ("down_block_types", "up_block_types")
    changes = {field: [f"UNetRes{kind}" for kind in config[field]] for field in fields}
    copy = edited_copy(copy, tmp_path / name, file, **changes)
  theirs = diffusers.StableDiffusionPipeline.from_pretrained(copy)
  ours = load_pipeline(copy, components=("unet", "vae"))
  latents, context = draw(2, 8, 8, 4), draw(2, 5, 24)
  predicted = jax.jit(ours.unet.apply)(
    {"params": ours.params["unet"]}, latents, np.array([1, 700]), context
  )
  decode = jax.jit(partial(ours.vae.apply, method="decode"))
  decoded = decode({"params": ours.params["vae"]}, latents)
  with torch.no_grad():
    expected = theirs.unet(
      tensor(latents), torch.tensor([1, 700]), torch.from_numpy(context)
    )
    expected_image = theirs.vae.decode(tensor(latents)).sample
  np.testing.assert_allclose(predicted, array(expected.sample), rtol=0, atol=NETWORK)
  np.testing.assert_allclose(decoded, array(expected_image), rtol=0, atol=NETWORK)


@pytest.mark.parametrize("nested", [True, False])
def test_a_text_encoders_config_may_be_a_whole_clips(tiny_checkpoint, tmp_path, nested):
  file = tiny_checkpoint / "text_encoder" / "config.json"
  config = json.loads(file.read_text()) | {"architectures": ["CLIPModel"]}
  del config["model_type"]
  if nested:
    # Fields of the whole, which are not the encoder's.
    config = {"model_type": "clip", "text_config": config, "hidden_act": "gelu"}
  copy = edited_copy(tiny_checkpoint, tmp_path / "copy", "model_index.json")
  (copy / "text_encoder" / "config.json").write_text(json.dumps(config))
  theirs = transformers.CLIPTextModel.from_pretrained(copy / "text_encoder")
  ours = load_pipeline(copy, components=("text_encoder",))
  (ids,) = ours.tokenize(["a red one in the sand"])
  context, _ = clip.encode_text(ours.text_encoders, ours.params, [ids])
  with torch.no_grad():
    expected = theirs(torch.from_numpy(ids).long()).last_hidden_state
  np.testing.assert_allclose(context, expected, rtol=0, atol=NETWORK)


def test_the_index_knows_whether_there_is_a_projection(checkpoints, tmp_path):
  """The class in model_index.json wins over the config's, as in diffusers."""
  copy = edited_copy(
    checkpoints["sdxl"],
    tmp_path / "copy",
    "text_encoder_2/config.json",
    architectures=["CLIPTextModel"],
  )
  ours = load_pipeline(copy, components=("text_encoder_2",))
  assert "text_projection" in ours.params["text_encoder_2"]


@pytest.mark.parametrize(
  ("fields", "expected"),
  [
    ({"predict_epsilon": False}, "sample"),
    ({"predict_epsilon": True}, "epsilon"),
    ({"predict_epsilon": False, "prediction_type": "v_prediction"}, "v_prediction"),
  ],
)
def test_what_is_predicted_was_said_by_a_switch(
  tiny_checkpoint, tmp_path, fields, expected
):
  """The value is that of diffusers 0.10 to 0.12; later ones ignore the switch."""
  file = "scheduler/scheduler_config.json"
  fields = {"prediction_type": None, **fields}
  copy = edited_copy(tiny_checkpoint, tmp_path / "copy", file, **fields)
  assert load_pipeline(copy, components=()).schedule.prediction_type == expected


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("kind", ["DDIMScheduler", "PNDMScheduler"])
def test_schedules_are_fixed_for_sampling_with_sd_1_and_2(
  checkpoints, family, kind, tmp_path, capsys
):
  """Their pipeline sets both fields; the one for SDXL takes the file as it is, and so
  does training, with either."""
  file = "scheduler/scheduler_config.json"
  old = {"steps_offset": None, "clip_sample": None, "_class_name": kind}
  copy = edited_copy(checkpoints[family], tmp_path / "copy", file, **old)
  index = json.loads((copy / "model_index.json").read_text())
  index["scheduler"] = ["diffusers", kind]
  (copy / "model_index.json").write_text(json.dumps(index))
  theirs = diffusers.DiffusionPipeline.from_pretrained(copy).scheduler
  capsys.readouterr()
  ours = load_pipeline(copy, components=())
  assert not {"steps_offset", "clip_sample"} & set(ours.schedule.config)
  assert capsys.readouterr().err == ""
  fixed = fix_schedule(ours).schedule
  theirs.set_timesteps(7)
  steps = theirs.timesteps
  if kind == "DDIMScheduler":
    sampled = diffusion.sampling_timesteps(fixed, 7)
    np.testing.assert_array_equal(sampled, steps)
    clips = fixed.config.get("clip_sample", True)
    assert clips == theirs.config.clip_sample == (family == "sdxl")
  assert fixed.config.get("steps_offset", 0) == theirs.config.steps_offset
  # A field that the class does not have is corrected without a line.
  lines = capsys.readouterr().err.splitlines()
  said = [line.split(": ")[-1].split()[0] for line in lines]
  expected = ["steps_offset"] + ["clip_sample"] * (kind == "DDIMScheduler")
  assert said == (expected if family == "sd1" else [])


@pytest.mark.parametrize("model", ["toy", "tiny"])
def test_current_checkpoints_are_read_as_they_are(model, tiny_checkpoint, capsys):
  pipeline = load_pipeline(tiny_checkpoint if model == "tiny" else model, components=())
  fixed = fix_schedule(pipeline)
  assert dict(fixed.schedule.config) == dict(pipeline.schedule.config)
  assert capsys.readouterr().err == ""


def test_a_config_without_anything_old_is_left_alone():
  config = {"sample_size": 64, "_diffusers_version": "0.8.0", "down_block_types": None}
  assert old_files.correct_unet(config, "x", xl=False) == config
  assert old_files.correct_scheduler(SCHEDULER, "x") == SCHEDULER
