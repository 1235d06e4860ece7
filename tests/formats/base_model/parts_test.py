"""What model_index.json says: pipelines of text to image are read, others refused."""

import json

import pytest
from diffusers.pipelines import auto_pipeline

from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.base_model.parts import check_index

XL = {
  "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
  "tokenizer_2": ["transformers", "CLIPTokenizer"],
}
NOTHING = [None, None]


def index_of(kind, **more):
  return {
    "_class_name": kind,
    "_diffusers_version": "0.24.0",
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "image_encoder": NOTHING,
    "requires_safety_checker": True,
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    **more,
  }


def their_classes(families):
  """The classes that AutoPipelineForText2Image reads as text to image."""
  tables = (
    auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING,
    auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
    auto_pipeline.AUTO_INPAINT_PIPELINES_MAPPING,
  )
  return sorted({table[f].__name__ for table in tables for f in families if f in table})


SD, SDXL = "stable-diffusion", "stable-diffusion-xl"
PLAIN = their_classes([SD, SDXL, f"{SD}-pag", f"{SDXL}-pag", "lcm"])
_MORE = ("", "-pag", "-union")
STEERED = their_classes([f"{f}-controlnet{m}" for f in (SD, SDXL) for m in _MORE])


@pytest.mark.parametrize("kind", [*PLAIN, None, "FlaxStableDiffusionPipeline"])
def test_text_to_image_is_read(kind, tmp_path, capsys):
  more = XL if "XL" in str(kind) else {}
  encoders = check_index(tmp_path, index_of(kind, **more))
  assert list(encoders) == ["text_encoder", "text_encoder_2"][: 2 if more else 1]
  assert encoders["text_encoder"] == "CLIPTextModel"
  assert capsys.readouterr().err == ""


def test_a_setting_may_be_a_list(tmp_path):
  index = index_of("MyPipeline", words=["a", "b", "c"], sizes=[1, 2])
  assert list(check_index(tmp_path, index)) == ["text_encoder"]


def test_there_are_as_many_classes_as_diffusers_has():
  assert (len(PLAIN), len(STEERED)) == (14, 13)


@pytest.mark.parametrize("kind", STEERED)
def test_a_network_beside_the_unet_is_left_out_with_a_line(kind, tmp_path, capsys):
  more = XL if "XL" in kind else {}
  check_index(
    tmp_path, index_of(kind, controlnet=["diffusers", "ControlNetModel"], **more)
  )
  (line,) = capsys.readouterr().err.splitlines()
  assert "controlnet" in line


ZERO123PLUS = {
  "vision_encoder": ["transformers", "CLIPVisionModelWithProjection"],
  "feature_extractor_clip": ["transformers", "CLIPImageProcessor"],
  "feature_extractor_vae": ["transformers", "CLIPImageProcessor"],
  "ramping_coefficients": [0.0, 0.2060057818889618],
}
OTHERS = {
  "Zero123PlusPipeline": ZERO123PLUS,
  "StableDiffusionInstructPix2PixPipeline": {},
  "StableDiffusionXLInstructPix2PixPipeline": XL,
  "StableDiffusionDepth2ImgPipeline": {
    "depth_estimator": ["transformers", "DPTForDepthEstimation"]
  },
  "StableDiffusionUpscalePipeline": {
    "low_res_scheduler": ["diffusers", "DDPMScheduler"]
  },
  "StableDiffusionLatentUpscalePipeline": {},
  "StableDiffusionLDM3DPipeline": {},
  "StableDiffusionGLIGENPipeline": {},
  "StableUnCLIPPipeline": {"image_normalizer": ["stable_diffusion", "X"]},
  "TextToVideoZeroPipeline": {},
  "MyPipeline": ZERO123PLUS,
}


@pytest.mark.parametrize("kind", OTHERS)
def test_pipelines_with_the_same_parts_for_other_ends_are_refused(kind, tmp_path):
  with pytest.raises(InputError, match=rf"model_index\.json is for {kind}.*; give"):
    check_index(tmp_path, index_of(kind, **OTHERS[kind]))


@pytest.mark.parametrize(
  "kind", ["StableDiffusionPipelineSafe", ["my_pipeline", "MyPipeline"]]
)
def test_an_unknown_class_with_these_parts_alone_is_read_with_a_line(
  kind, tmp_path, capsys
):
  check_index(tmp_path, index_of(kind))
  (line,) = capsys.readouterr().err.splitlines()
  name = kind if isinstance(kind, str) else kind[-1]
  assert f"is for {name}, which is not known" in line


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ([], "list"),
    (index_of(None, unet="UNet2DConditionModel"), "unet is None"),
    (index_of(None, unet=["diffusers"]), "unet is None"),
    (index_of(None, tokenizer=["transformers", "T5Tokenizer"]), "T5Tokenizer"),
    (index_of(None, text_encoder=["x", "RobertaSeriesModel"]), "RobertaSeriesModel"),
  ],
)
def test_other_parts_are_refused(content, message, tmp_path):
  json.dumps(content)
  with pytest.raises(InputError, match=rf"model_index\.json.*{message}"):
    check_index(tmp_path, content)
