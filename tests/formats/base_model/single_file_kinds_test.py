"""Files of other models are called what they are."""

import pytest
import torch

from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.base_model.pipeline import load_pipeline

UNET = "model.diffusion_model."


def channels(number):
  return {f"{UNET}input_blocks.0.0.weight": torch.ones(32, number, 3, 3)}


OTHERS = {
  "inpainting": ("sd1", channels(9), (), "9 channels.* an inpainting model"),
  "instruct-pix2pix": ("sd1", channels(8), (), "8 channels.* InstructPix2Pix"),
  "refiner": (
    "sdxl",
    {"conditioner.embedders.0.model.token_embedding.weight": torch.ones(9, 4)},
    ("conditioner.embedders.1.", "conditioner.embedders.0.transformer."),
    "the refiner of Stable Diffusion XL",
  ),
  "EDM": ("sdxl", {"edm_mean": torch.ones(4)}, (), "Playground 2.5"),
  "CosXL": ("sdxl", {"edm_vpred.sigma_max": torch.ones(1)}, (), "CosXL"),
  "video": (
    "sd2",
    {f"{UNET}input_blocks.1.1.time_stack.0.x": torch.ones(1)},
    (),
    "Video",
  ),
  "unCLIP": ("sd2", {"embedder.model.visual.proj": torch.ones(1)}, (), "unCLIP"),
  "SD 3": (
    "sd1",
    {f"{UNET}joint_blocks.0.x": torch.ones(1)},
    (UNET + "i",),
    "Diffusion 3",
  ),
  "FLUX": (
    "sd1",
    {"double_blocks.0.img_attn.norm.key_norm.scale": torch.ones(1)},
    (UNET,),
    "FLUX",
  ),
  "a VAE": ("sd1", {}, (UNET, "cond_stage_model."), "a VAE alone"),
  "a LoRA": ("sd1", {"lora_unet_x.alpha": torch.ones(1)}, (UNET,), "a LoRA"),
  "no text encoder": ("sd1", {}, ("cond_stage_model.",), "no text encoder"),
  "unknown": ("sd1", {"x": torch.ones(1)}, (UNET, "cond", "first"), "1 tensors, .*'x'"),
}


@pytest.mark.parametrize("case", OTHERS.values(), ids=OTHERS)
def test_a_file_of_another_model_is_called_what_it_is(case, write):
  family, changes, without, message = case
  with pytest.raises(InputError, match=rf"m\.safetensors: .*{message}"):
    load_pipeline(write(family, changes=changes, without=without), components=())


def test_float8_with_scales_beside_it_is_refused(write):
  name = f"{UNET}input_blocks.1.0.in_layers.2.scale_weight"
  for more in ("scaled_fp8", name):
    with pytest.raises(InputError, match=r"scales .*scaled_fp8.*float16"):
      load_pipeline(write("sd1", {more: torch.ones(1)}))
