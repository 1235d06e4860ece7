"""PEFT's settings scale a LoRA as PEFT does, or are refused."""

import json

import peft
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from safetensors.numpy import load_file, save_file

from safetydpo_jax import load_lora
from safetydpo_jax.errors import InputError
from tests.support import twins
from tests.support.twins import ATTENTION, EVERY_KIND


def adapted_unet(tiny_checkpoint, **settings):
  """A UNet with a PEFT LoRA whose factors are all far from 0."""
  unet = UNet2DConditionModel.from_pretrained(tiny_checkpoint / "unet").eval()
  torch.manual_seed(0)
  settings = {"r": 3, "lora_alpha": 6, "target_modules": list(ATTENTION), **settings}
  unet.add_adapter(peft.LoraConfig(init_lora_weights=False, **settings))
  return unet


def save_peft_folder(folder, unet, **changes):
  state = peft.get_peft_model_state_dict(unet)
  tensors = {f"base_model.model.{name}": t.numpy() for name, t in state.items()}
  save_file(tensors, folder / "adapter_model.safetensors")
  config = unet.peft_config["default"].to_dict() | changes
  config = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
  (folder / "adapter_config.json").write_text(json.dumps(config))


SETTINGS = {
  "plain": {},
  "every kind of layer": {"target_modules": list(EVERY_KIND)},
  "rslora": {"use_rslora": True},
  "patterns": {
    "rank_pattern": {"attn1.to_q": 5, "^mid_block.*attn2.to_k": 2},
    "alpha_pattern": {"attn1.to_q": 1.5, "mid_block.*to_k": 9, "to_(v|q)": 4},
  },
  "rslora with patterns": {
    "use_rslora": True,
    "rank_pattern": {"to_v": 2},
    "alpha_pattern": {"to_v": 1},
  },
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("naming", ["diffusers", "peft"])
def test_a_lora_trained_by_peft_predicts_the_same_here(
  naming, settings, pipeline, inputs, tiny_checkpoint, tmp_path
):
  unet = adapted_unet(tiny_checkpoint, **settings)
  if naming == "diffusers":
    state = convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(unet))
    StableDiffusionPipeline.save_lora_weights(
      tmp_path,
      unet_lora_layers=state,
      unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
    )
  else:
    save_peft_folder(tmp_path, unet)
  twins.assert_same_predictions(pipeline, tmp_path, unet, inputs)


HEADERS = {
  "dora": ('{"unet.use_dora": true}', "no lora_magnitude_vector, although .* use_dora"),
  "alpha": ('{"unet.lora_alpha": "four"}', "lora_alpha is 'four'"),
  "infinite": ('{"unet.lora_alpha": 1e999}', "lora_alpha is inf"),
  "beyond all floats": (
    f'{{"unet.lora_alpha": {10**400}}}',
    "lora_alpha is 10{400}; expected a finite",
  ),
  "a switch": ('{"unet.use_rslora": "false"}', "use_rslora is 'false'; expected true"),
  "list": ("[]", "lora_adapter_metadata is not a JSON object"),
  "cut": ('{"unet.r"', "lora_adapter_metadata is not JSON"),
  "deep": ("[" * 100_000, "lora_adapter_metadata is not JSON"),
  "patterns": (
    '{"unet.alpha_pattern": ["to_q"]}',
    "alpha_pattern is not a JSON object",
  ),
  "endless pattern": (
    '{"unet.alpha_pattern": {"((a+)+)+x": 1}}',
    r"alpha_pattern '\(\(a\+\)\+\)\+x' is not",
  ),
  "broken pattern": (
    '{"unet.alpha_pattern": {"(to_q": 1}}',
    r"alpha_pattern '\(to_q' is not",
  ),
  "repeated forever": (
    f'{{"unet.alpha_pattern": {{"a{{{10**30}}}": 1}}}}',
    r"alpha_pattern 'a\{10{30}\}' is not",
  ),
  "moves the base": ('{"unet.init_lora_weights": "pissa_niter_4"}', "pissa_niter_4"),
}


@pytest.mark.parametrize(("metadata", "message"), HEADERS.values(), ids=HEADERS)
def test_settings_that_cannot_be_followed_are_refused(
  metadata, message, exported, tmp_path
):
  file = tmp_path / "other.safetensors"
  save_file(load_file(exported), file, metadata={"lora_adapter_metadata": metadata})
  with pytest.raises(InputError, match=message):
    load_lora(str(file))


def test_a_peft_folder_of_another_adapter_is_refused(tiny_checkpoint, tmp_path):
  unet = adapted_unet(tiny_checkpoint)
  for changes, message in (
    ({"use_dora": True}, "use_dora"),
    ({"peft_type": "OFT"}, r"adapter_config\.json is a OFT"),
    ({"peft_type": "LOKR", "r": 0}, r"adapter_config\.json: r or rank_pattern"),
    ({"lora_bias": True}, "lora_bias"),
  ):
    save_peft_folder(tmp_path, unet, **changes)
    with pytest.raises(InputError, match=message):
      load_lora(str(tmp_path))
  (tmp_path / "adapter_config.json").write_text("[1]")
  with pytest.raises(InputError, match=r"adapter_config\.json is not a JSON object"):
    load_lora(str(tmp_path))
