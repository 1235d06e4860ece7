"""A single file is the diffusers directory that it was written from."""

import shutil

import diffusers
import jax
import numpy as np
import pytest
import torch

from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.base_model import hub
from safetydpo_jax.formats.base_model.pipeline import load_pipeline
from safetydpo_jax.models import published
from tests.support import single_files, sizes
from tests.support.parity import NETWORK
from tests.support.single_files import FAMILIES, RESOLUTION, ema_name, save

UNET = "model.diffusion_model."
FAMILY_OF = {"ssd-1b": "sdxl", "koala": "sdxl", "small-sd": "sd1", "tiny-sd": "sd1"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
  """{name: (diffusers directory, its tensors under the original names)}."""
  folder = tmp_path_factory.mktemp("bases")
  both = {**FAMILIES, **single_files.DISTILLED}
  made = {name: build(folder / name) for name, build in both.items()}
  return {
    n: (base, single_files.original_tensors(base, FAMILY_OF.get(n, n)))
    for n, base in made.items()
  }


@pytest.fixture
def write(bases, tmp_path):
  """Writes a family's single file, with a tokenizer beside it."""

  def write(family="sd1", changes=None, without=(), header=RESOLUTION, name="m"):
    base, tensors = bases[family]
    tensors = {**tensors, **(changes or {})}
    tensors = {n: x for n, x in tensors.items() if not n.startswith(tuple(without))}
    for folder in base.glob("tokenizer*"):
      shutil.copytree(folder, tmp_path / folder.name, dirs_exist_ok=True)
    return save(tmp_path / f"{name}.safetensors", tensors, header)

  return write


def assert_same_params(one, other):
  ours, theirs = jax.tree.flatten(one), jax.tree.flatten(other)
  assert ours[1] == theirs[1]
  for a, b in zip(ours[0], theirs[0]):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_is_read_as_the_directory_it_was_written_from(family, bases, write):
  base = load_pipeline(bases[family][0])
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
  base, file = bases[name][0], write(name)
  family = FAMILY_OF.get(name, name)
  ours = load_pipeline(file)
  theirs = sizes.CLASSES[family].from_single_file(str(file), config=str(base))
  assert isinstance(theirs.scheduler, getattr(diffusers, ours.index["scheduler"][1]))
  assert theirs.scheduler.config["prediction_type"] == ours.schedule.prediction_type
  assert sizes.difference(ours, theirs) < NETWORK


def test_half_precision_is_the_same_model(bases, write):
  tensors = {n: x.half() for n, x in bases["sd1"][1].items() if x.is_floating_point()}
  half, full = load_pipeline(write(changes=tensors)), load_pipeline(bases["sd1"][0])
  assert half.fingerprint == full.fingerprint
  rounded = jax.tree.map(lambda x: x.astype(np.float16).astype(x.dtype), full.params)
  assert_same_params(half.params, rounded)


def test_files_without_position_ids(bases, write):
  """As current transformers saves text encoders."""
  ids = [name for name in bases["sdxl"][1] if name.endswith("position_ids")]
  assert len(ids) == 1
  single = load_pipeline(write("sdxl", without=ids))
  assert_same_params(single.params, load_pipeline(bases["sdxl"][0]).params)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_is_read_as_diffusers_reads_it_and_said(dtype, bases, write, capsys):
  base, tensors = bases["sdxl"]
  narrow = {n: x.to(dtype) for n, x in tensors.items() if x.is_floating_point()}
  file = write("sdxl", narrow)
  single = load_pipeline(file)
  (line,) = [x for x in capsys.readouterr().err.splitlines() if "weights in" in x]
  assert f"{file}: the UNet has weights in {str(dtype).split('.')[1]}" in line
  theirs = sizes.CLASSES["sdxl"].from_single_file(str(file), config=str(base))
  assert sizes.difference(single, theirs) < NETWORK
  load_pipeline(base, components=())
  assert "weights in" not in capsys.readouterr().err


def test_float8_with_scales_beside_it_is_refused(bases, write):
  name = f"{UNET}input_blocks.1.0.in_layers.2.scale_weight"
  for more in ("scaled_fp8", name):
    with pytest.raises(InputError, match=r"scales .*scaled_fp8.*float16"):
      load_pipeline(write("sd1", {more: torch.ones(1)}))


def ema_of(tensors, scale=2.0):
  return {ema_name(n): x * scale for n, x in tensors.items() if n.startswith(UNET)}


def test_ema_weights_are_left_out_and_counted(bases, write, capsys):
  tensors = bases["sd1"][1]
  ema = ema_of(tensors)
  counters = {
    "model_ema.decay": torch.tensor(0.9),
    "model_ema.num_updates": torch.ones(1),
  }
  file = write(changes=ema | counters)
  single = load_pipeline(file)
  assert_same_params(single.params, load_pipeline(bases["sd1"][0]).params)
  total = len(tensors) + len(ema) + 2
  line = capsys.readouterr().err
  assert f"{len(tensors) - 1:,} of {total:,} tensors read" in line
  assert f"EMA weights {len(ema) + 2}" in line
  load_pipeline(file)
  assert not capsys.readouterr().err, "it is said once"


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_ema_weights_are_used_where_there_are_no_others(family, bases, write, capsys):
  base, tensors = bases[family]
  single = load_pipeline(write(family, changes=ema_of(tensors), without=[UNET]))
  expected = jax.tree.map(lambda x: 2 * x, load_pipeline(base).params["unet"])
  assert_same_params(single.params["unet"], expected)
  assert "EMA weights, the only ones there" in capsys.readouterr().err


def test_what_trainers_leave_in_a_file_is_named(write, capsys):
  numbers = torch.ones(10)
  names = ("betas", "alphas_cumprod_prev", "sqrt_recipm1_alphas_cumprod", "logvar")
  names += ("log_one_minus_alphas_cumprod", "posterior_mean_coef1", "denoiser.sigmas")
  changes = dict.fromkeys(names, numbers) | {
    "global_step": torch.tensor(3),
    "first_stage_model.loss.logvar": numbers,
    "first_stage_model.loss.discriminator.main.0.weight": numbers,
    "cond_stage_model.logit_scale": numbers[:1],
    "cond_stage_model.transformer.text_projection.weight": numbers,
  }
  load_pipeline(write(changes=changes), components=("unet",))
  line = capsys.readouterr().err
  for count in ("noise schedule 7", "training state 1", "VAE training state 2"):
    assert count in line
  assert "text projections 2" in line


def test_an_unknown_or_a_missing_tensor_is_an_error_that_names_it(write):
  extra = {"model.diffusion_model.input_blocks.1.0.gate": torch.ones(2)}
  with pytest.raises(InputError, match=r"no place .* 1 tensors \(.*1\.0\.gate\)"):
    load_pipeline(write(changes=extra))
  gone = f"{UNET}input_blocks.1.1.norm.bias"
  with pytest.raises(InputError, match=r"lacks 1 tensors \(.*1\.1\.norm\.bias\)"):
    load_pipeline(write(without=[gone]))
  with pytest.raises(InputError, match=r"token_embedding\.weight is missing"):
    load_pipeline(write(without=["cond_stage_model.transformer.text_model.embeddings"]))
  cut = {"first_stage_model.decoder.conv_in.bias": torch.ones(3)}
  with pytest.raises(InputError, match=r"m\.safetensors \(vae\) .*shapes"):
    load_pipeline(write(changes=cut))


def test_a_text_encoder_of_before_text_model(bases, write):
  inner = "cond_stage_model.transformer."
  flat = {
    n.replace("text_model.", ""): x
    for n, x in bases["sd1"][1].items()
    if n.startswith(inner)
  }
  single = load_pipeline(write(changes=flat, without=[f"{inner}text_model."]))
  assert_same_params(single.params, load_pipeline(bases["sd1"][0]).params)


def test_sd_turbo_s_names_of_sd_2_s_text_encoder(bases, write):
  theirs = {
    n.replace("cond_stage_model.", "conditioner.embedders.0."): x
    for n, x in bases["sd2"][1].items()
    if n.startswith("cond_stage_model.")
  }
  single = load_pipeline(write("sd2", changes=theirs, without=["cond_stage_model."]))
  assert_same_params(single.params, load_pipeline(bases["sd2"][0]).params)


def test_a_file_without_its_vae(bases, write, tmp_path):
  """It trains and merges; what decodes images names what is missing."""
  file = write(without=["first_stage_model."])
  single = load_pipeline(file, components=("unet", "text_encoder"))
  assert (single.vae_scale, single.scaling_factor) == (8, 0.18215)
  with pytest.raises(InputError, match=r"no VAE .*--vae"):
    load_pipeline(file)
  base, tensors = bases["sd1"]
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


def test_a_vae_s_file_beside_a_diffusers_directory(bases, write):
  base, tensors = bases["sdxl"]
  doubled = {n: 2 * x for n, x in tensors.items() if n.startswith("first_stage_model.")}
  found = load_pipeline(base, components=("vae",), vae_from=write("sdxl", doubled))
  own = load_pipeline(base, components=("vae",))
  assert_same_params(found.params, jax.tree.map(lambda x: 2 * x, own.params))
  assert found.scaling_factor == own.scaling_factor == 0.13025
  assert found.vae_fingerprint != own.vae_fingerprint


def test_a_vae_s_file_that_is_none_is_one_line(bases, tmp_path):
  base = bases["sd1"][0]
  named = base / "vae" / "diffusion_pytorch_model.safetensors"
  with pytest.raises(InputError, match=r"VAE .*diffusers' names; give its folder"):
    load_pipeline(base, vae_from=named)
  other = save(tmp_path / "x.safetensors", {"lora_unet_x.alpha": torch.ones(1)})
  with pytest.raises(InputError, match=r"VAE .*a LoRA; expected the VAE"):
    load_pipeline(base, vae_from=other)


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


def test_a_marker_alone_or_a_choice_that_is_none_is_refused(write):
  with pytest.raises(InputError, match="ztsnr and not v_pred"):
    load_pipeline(write("sdxl", changes={"ztsnr": torch.zeros(0)}))
  with pytest.raises(InputError, match="cannot be downloaded"):
    load_pipeline(f"{write()}:velocity")
  with pytest.raises(InputError, match="no variant 'fp16'"):
    load_pipeline(write(), variant="fp16")


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


def test_files_that_are_not_safetensors_are_refused(tmp_path):
  pickle = tmp_path / "model.ckpt"
  pickle.write_bytes(b"x")
  with pytest.raises(InputError, match=r"pickles can run code.*from_single_file"):
    load_pipeline(pickle)
  damaged = tmp_path / "model.safetensors"
  damaged.write_bytes(b"x")
  with pytest.raises(InputError, match="not a readable safetensors file"):
    load_pipeline(damaged)


def test_schedulers_are_those_of_the_published_repositories():
  fields = {"beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
  for config in published.SCHEDULERS.values():
    assert fields.items() <= config.items()
    kind = getattr(diffusers, config["_class_name"])
    assert kind.from_config(config).config["beta_schedule"] == "scaled_linear"


def test_a_file_s_name_may_end_like_a_choice(write, tmp_path):
  file = write()
  odd = tmp_path / "odd:epsilon"
  odd.mkdir()
  assert hub.locate(str(odd), (), None, None) == odd
  assert hub.locate(f"{file}:epsilon", (), None, None) == file


TEXT, VAE = "cond_stage_model.transformer.text_model.", "first_stage_model."
IN_PROJ = "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_"
# Tensors from which configs are derived, and which are cut into parts.
MISSHAPEN = {
  "no axes": ("sd1", f"{UNET}input_blocks.1.0.in_layers.2.weight", torch.tensor(1.0)),
  "one axis": (
    "sd1",
    f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
    torch.ones(3),
  ),
  "too many axes": (
    "sd1",
    f"{TEXT}embeddings.token_embedding.weight",
    torch.ones(2, 3, 4),
  ),
  "no features": (
    "sd1",
    f"{VAE}encoder.down.0.block.0.conv1.weight",
    torch.ones(0, 3, 3, 3),
  ),
  "no groups": (
    "sd1",
    f"{VAE}encoder.down.0.block.0.conv1.weight",
    torch.ones(33, 3, 3, 3),
  ),
  "no thirds": ("sd2", f"{IN_PROJ}weight", torch.ones(3 * 64 + 2, 64)),
  "nothing to cut": ("sd2", f"{IN_PROJ}bias", torch.tensor(1.0)),
}


@pytest.mark.parametrize("case", MISSHAPEN.values(), ids=MISSHAPEN)
def test_a_tensor_of_another_shape_is_an_error(case, write):
  family, name, tensor = case
  place = name.removeprefix(UNET).removeprefix(VAE).removeprefix(TEXT)
  with pytest.raises(InputError, match=rf"{place} has shape|shapes .*|cannot be split"):
    load_pipeline(write(family, changes={name: tensor}))


@pytest.mark.parametrize("number", ["10000000000", "9" * 5000])
@pytest.mark.parametrize(
  "place",
  [
    f"{TEXT}encoder.layers.",
    f"{VAE}encoder.down.",
    f"{VAE}encoder.down.0.block.",
    f"{UNET}input_blocks.1.1.transformer_blocks.",
  ],
)
def test_a_block_of_any_number_is_no_reason_to_build_as_many(number, place, write):
  changes = {f"{place}{number}.conv1.weight": torch.ones(32, 32, 3, 3)}
  with pytest.raises(InputError, match="fetch"):
    load_pipeline(write(changes=changes))


def test_more_layers_than_any_model_has_are_not_built(write):
  more = {f"{TEXT}encoder.layers.{n}.mlp.fc1.bias": torch.ones(2) for n in range(101)}
  with pytest.raises(InputError, match=r"more than 100 encoder\.layers"):
    load_pipeline(write(changes=more))


@pytest.mark.parametrize("step", [float("nan"), float("inf"), 1.0])
def test_any_number_may_be_a_step(step, write):
  file = write("sd2", changes={"global_step": torch.tensor(step)})
  assert load_pipeline(file, components=()).schedule.prediction_type == "v_prediction"
