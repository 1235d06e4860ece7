"""What a single file leaves unsaid: what its UNet predicts, how, and at which size."""

import diffusers
import pytest
import torch

from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.base_model.pipeline import load_pipeline
from safetydpo_jax.models import published

# Header, more tensors, what is written behind the name → prediction, zero SNR, pixels.
SAID = {
  "nothing: diffusers' rule": ("sd2", {}, (), "", "v_prediction", False, 768),
  "the user": ("sd2", {}, (), ":epsilon", "epsilon", False, 512),
  "the user, against the file": (
    "sdxl",
    {},
    ("v_pred",),
    ":epsilon",
    "epsilon",
    False,
    1024,
  ),
  "the step of SD 2-base": ("sd2", {}, ("global_step",), "", "epsilon", False, 512),
  "a marker": ("sdxl", {}, ("v_pred",), "", "v_prediction", False, 1024),
  "two markers": ("sdxl", {}, ("v_pred", "ztsnr"), "", "v_prediction", True, 1024),
  "the header": (
    "sd2",
    {"modelspec.prediction_type": "epsilon", "modelspec.resolution": "512x768"},
    (),
    "",
    "epsilon",
    False,
    768,
  ),
  "nothing in SD 1": ("sd1", {}, (), "", "epsilon", False, 512),
}


@pytest.mark.parametrize("case", SAID.values(), ids=SAID)
def test_what_the_unet_predicts(case, write, capsys):
  family, header, markers, choice, predicted, zero_snr, pixels = case
  more = {name: torch.zeros(0) for name in markers}
  if "global_step" in more:
    more["global_step"] = torch.tensor(875_000)
  file = write(family, changes=more, header=header)
  single = load_pipeline(f"{file}{choice}", components=())
  assert single.schedule.prediction_type == predicted
  assert (single.schedule.alphas_cumprod[-1] == 0) == zero_snr
  assert single.schedule.config.get("timestep_spacing") != "trailing" or zero_snr
  assert single.resolution == (pixels // 2) * 2
  line = capsys.readouterr().err
  said = choice or markers or header
  assert (f"assumed, for it does not say: {predicted}" in line) == (not said)


@pytest.mark.parametrize("step", [float("nan"), float("inf"), 1.0])
def test_any_number_may_be_a_step(step, write):
  file = write("sd2", changes={"global_step": torch.tensor(step)})
  assert load_pipeline(file, components=()).schedule.prediction_type == "v_prediction"


def test_a_marker_alone_or_a_choice_that_is_none_is_refused(write):
  with pytest.raises(InputError, match="ztsnr and not v_pred"):
    load_pipeline(write("sdxl", changes={"ztsnr": torch.zeros(0)}))
  with pytest.raises(InputError, match=r"m\.safetensors:velocity.*:epsilon"):
    load_pipeline(f"{write()}:velocity")
  with pytest.raises(InputError, match="no variant 'fp16'"):
    load_pipeline(write(), variant="fp16")


def test_schedulers_are_those_of_the_published_repositories():
  fields = {"beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
  for config in published.SCHEDULERS.values():
    assert fields.items() <= config.items()
    kind = getattr(diffusers, config["_class_name"])
    assert kind.from_config(config).config["beta_schedule"] == "scaled_linear"
