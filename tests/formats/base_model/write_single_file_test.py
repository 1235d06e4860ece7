"""A single file with the LoRA in it: the original names, and what readers expect."""

import json
import shutil

import diffusers
import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from safetydpo_jax import export, load_pipeline, lora
from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.base_model.weights import convert
from safetydpo_jax.formats.base_model.write_single_file import FILE, write_single_file
from safetydpo_jax.formats.loras import expert
from tests.support import dialects, drawn, single_files, twins
from tests.support.checkpoints import save_tiny_checkpoint
from tests.support.single_files import FAMILIES, RESOLUTION, ema_name, save

LAST = "cond_stage_model.model.transformer.resblocks.23."


@pytest.fixture(scope="module")
def singles(bases, originals):
  """{family: a single file beside its directory, with a tokenizer}."""
  made = {}
  for name in FAMILIES:
    folder = bases[name].parent / f"{name}-file"
    folder.mkdir()
    for tokenizer in bases[name].glob("tokenizer*"):
      shutil.copytree(tokenizer, folder / tokenizer.name)
    tensors = originals[name]
    unet = {ema_name(n): x for n, x in tensors.items() if n.startswith("model.d")}
    made[name] = save(folder / "model.safetensors", tensors | unet, RESOLUTION)
  return made


@pytest.fixture
def run(tmp_path):
  """Exports a random LoRA with a base model; → (the folder, the LoRA)."""

  def run(model, kind="single_file", *more):
    base = load_pipeline(model, components=())
    targets = [t for t in twins.EVERY_KIND if "samplers" not in t]
    tree = twins.random_lora(base.unet_shapes(), 3, targets, size=0.05)
    about = {"base": {"name": "tiny", "fingerprint": base.fingerprint}}
    expert.write_expert(tmp_path / "expert", tree, about)
    options = ["--lora", tmp_path / "expert", "--model", model, "--format", kind]
    options += ["--out", tmp_path / "out", *more]
    export.main([str(option) for option in options])
    return tmp_path / "out", tree

  return run


def difference(text) -> float:
  line = text.splitlines()[-1]
  return float(line.split("this package ")[1].split(",")[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_file_is_the_directory_s_with_the_lora_in_it(
  family, bases, originals, run, capsys
):
  out, tree = run(bases[family], "single_file", "--verify")
  assert difference(capsys.readouterr().out) < 1e-4
  got = load_file(out / FILE)
  expected = originals[family]
  # Those of the base that no reader needs are not made up.
  made_up = {n for n in expected if n.startswith(LAST)}
  made_up |= {n for n in expected if n.endswith(("position_ids", "logit_scale"))}
  made_up |= {n for n in expected if family == "sd2" and n.endswith("text_projection")}
  assert got.keys() == expected.keys() - made_up
  assert {n: x.shape for n, x in got.items()} == {n: expected[n].shape for n in got}
  changed = {n for n in got if not torch.equal(got[n], expected[n])}
  assert changed
  assert all(name.startswith("model.diffusion_model.") for name in changed)
  again = load_pipeline(out / FILE, components=("unet",))
  base = load_pipeline(bases[family], components=("unet",))
  fused = lora.fuse(base.params["unet"], tree)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6),
    again.params["unet"],
    fused,
  )


def test_the_header_leaves_nothing_open(bases, run, capsys):
  out, _ = run(bases["sd2"])
  capsys.readouterr()
  with safe_open(out / FILE, "pt") as file:
    header = file.metadata()
  assert header["modelspec.architecture"].startswith("stable-diffusion-v")
  assert header["modelspec.prediction_type"] == "v"
  again = load_pipeline(out / FILE, components=())
  assert again.schedule.prediction_type == "v_prediction"
  assert "assumed" not in capsys.readouterr().err
  assert (again.resolution, again.path) == (16, out / FILE)


# One of each; the other pairs are slow.
AGAIN = {"sdxl": "single_file", "sd2": "pipeline", "sd1": "diffusers"}


@pytest.mark.parametrize(
  ("family", "kind"),
  [
    pytest.param(family, kind, marks=[] if AGAIN[family] == kind else pytest.mark.slow)
    for family in FAMILIES
    for kind in AGAIN.values()
  ],
)
def test_a_single_file_is_exported_as_its_directory(kind, family, singles, run, capsys):
  """PyTorch predicts with the result what we predict, read by diffusers itself."""
  out, _ = run(singles[family], kind, "--verify")
  assert difference(capsys.readouterr().out) < 1e-4
  if kind == "diffusers":
    return
  made = load_pipeline(out / FILE if kind == "single_file" else out)
  base = load_pipeline(singles[family])
  for name in set(made.params) - {"unet"}:
    for a, b in zip(*map(jax.tree.leaves, (made.params[name], base.params[name]))):
      np.testing.assert_array_equal(a, b)
  assert made.schedule.config["_class_name"] == base.schedule.config["_class_name"]
  if kind == "pipeline":
    prompt = ["a red one"]
    ids = zip(made.tokenize(prompt), base.tokenize(prompt))
    assert all(np.array_equal(a, b) for a, b in ids)
    index = json.loads((out / "model_index.json").read_text())
    whole = getattr(diffusers, index["_class_name"]).from_pretrained(out)
    assert whole.unet.config.sample_size == 8
  else:
    names = load_file(out / FILE).keys()
    assert not [name for name in names if name.startswith("model_ema")]
    assert any(name.startswith(LAST) for name in names) == (family == "sd2")


def test_every_number_is_of_the_type_asked_for(bases, run):
  out, tree = run(bases["sdxl"], "single_file", "--dtype", "bfloat16")
  base = load_pipeline(bases["sdxl"])
  assert {str(x.dtype) for x in load_file(out / FILE).values()} == {"torch.bfloat16"}
  made = load_pipeline(out / FILE, dtype=ml_dtypes.bfloat16)
  expected = lora.fuse(base.params["unet"], tree)
  for a, b in zip(*map(jax.tree.leaves, (made.params["unet"], expected))):
    np.testing.assert_array_equal(a, np.asarray(b).astype(ml_dtypes.bfloat16))


def test_a_variant_is_read_where_a_component_has_it(bases, run, tmp_path, capsys):
  """Here the text encoder, in float16; the type that is named is the UNet's."""
  base = tmp_path / "base"
  shutil.copytree(bases["sd1"], base)
  file = base / "text_encoder" / "model.safetensors"
  half = {name: x.half() for name, x in load_file(file).items()}
  save_file(half, file.with_name("model.fp16.safetensors"), {"format": "pt"})
  out, _ = run(base, "single_file", "--variant", "fp16")
  assert "parameters, float32" in capsys.readouterr().out
  got = load_file(out / FILE)
  types = {
    n.partition(".")[0]: x.dtype for n, x in got.items() if x.is_floating_point()
  }
  text = types.pop("cond_stage_model")
  assert (text, set(types.values())) == (torch.float16, {torch.float32})


def test_what_predicts_v_is_marked(bases, tmp_path):
  """As ComfyUI marks SDXL; readers see it in SD 2 without."""
  for family, scheduler, markers in (
    ("sdxl", {}, set()),
    ("sdxl", {"prediction_type": "v_prediction"}, {"v_pred"}),
    ("sd2", {}, set()),
    (
      "sd2",
      {"rescale_betas_zero_snr": True},
      {"v_pred", "ztsnr"},
    ),
  ):
    copy = tmp_path / "copy"
    shutil.copytree(bases[family], copy, dirs_exist_ok=True)
    file = copy / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | scheduler))
    base = load_pipeline(copy, components=())
    write_single_file(tmp_path / FILE, base, {}, {})
    found = {"v_pred", "ztsnr"} & load_file(tmp_path / FILE).keys()
    assert found == markers
    shutil.rmtree(copy)
    again = load_pipeline(tmp_path / FILE, components=())
    np.testing.assert_array_equal(
      again.schedule.alphas_cumprod, base.schedule.alphas_cumprod
    )
    assert again.schedule.prediction_type == base.schedule.prediction_type


REFUSED = {
  "heads": (
    {"unet": {"attention_head_dim": 4}},
    r"attention_head_dim = \[4, .* assume \[8, ",
  ),
  "groups": (
    {"vae": {"norm_num_groups": 8}},
    "vae has norm_num_groups = 8, .* assume 32;",
  ),
  "scale": ({"vae": {"scaling_factor": 0.3}}, "vae has scaling_factor = 0.3"),
  "betas": ({"scheduler": {"beta_end": 0.02}}, "noise schedule"),
  "x_0": ({"scheduler": {"prediction_type": "sample"}}, "noise schedule .*sample"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_readers_would_build_in_another_way_is_refused(case, tmp_path):
  changes, message = case
  parts = {
    "unet": {**single_files.UNET, "attention_head_dim": 8},
    "vae": single_files.VAE,
    "text": single_files.TEXT,
    "scheduler": {},
  }
  parts = {name: {**part, **changes.get(name, {})} for name, part in parts.items()}
  base = load_pipeline(save_tiny_checkpoint(tmp_path / "base", **parts), components=())
  with pytest.raises(InputError, match=f"cannot be a single file.*{message}"):
    write_single_file(tmp_path / FILE, base, {}, {})
  assert not (tmp_path / FILE).exists()


def test_the_card_says_how_to_load_it(bases, run):
  out, _ = run(bases["sdxl"])
  card = (out / "README.md").read_text()
  assert f'StableDiffusionXLPipeline.from_single_file("./{FILE}")' in card
  assert "base_model_relation" not in card  # a local model has no address
  about = json.loads((out / "export.json").read_text())
  assert (about["format"], about["dtype"]) == ("single_file", "float32")


def test_a_file_without_a_vae_is_not_a_whole_model(originals, run, tmp_path):
  tensors = originals["sd1"]
  tensors = {n: x for n, x in tensors.items() if not n.startswith("first_stage")}
  file = save(tmp_path / "m.safetensors", tensors, RESOLUTION)
  for kind in ("single_file", "pipeline"):
    with pytest.raises(InputError, match="has no vae in it"):
      run(file, kind)
    shutil.rmtree(tmp_path / "expert")
  assert not (tmp_path / "out").exists()


def draw_dora(weight):
  """DoRA of kernels, differences of norms and biases: none of it is a LoRA."""
  return drawn.draw_full(weight) if weight.ndim == 1 else drawn.draw_dora_in(weight)


@pytest.mark.parametrize(
  ("place", "kind"), [("directory", "single_file"), ("file", "pipeline")]
)
def test_what_is_not_a_lora_is_folded_in(place, kind, bases, singles, tmp_path, capsys):
  """Every weight is what the tool makes of the base, and PyTorch reads it as we do."""
  model = (bases if place == "directory" else singles)["sdxl"]
  unet = diffusers.UNet2DConditionModel.from_pretrained(bases["sdxl"] / "unet")
  torch.manual_seed(0)
  write = dialects.by_twin(dialects.comfyui, draw_dora, norms=True)
  file, merged = write(unet, unet.config, tmp_path)
  options = {"lora": file, "model": model, "format": kind, "out": tmp_path / "out"}
  words = [word for name, value in options.items() for word in (f"--{name}", value)]
  export.main([*map(str, words), "--verify"])
  assert difference(capsys.readouterr().out) < 1e-4
  out = tmp_path / "out" / FILE if kind == "single_file" else tmp_path / "out"
  made = load_pipeline(out, components=("unet",)).params["unet"]
  wanted = convert(dialects.theirs_state(merged), made)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), made, wanted)


@pytest.mark.parametrize("kind", ["single_file", "pipeline"])
def test_a_float8_base_is_written_so_that_the_lora_is_not_rounded_away(
  kind, bases, originals, run, tmp_path, capsys
):
  tensors = originals["sd1"]
  narrow = {
    name: x.to(torch.float8_e4m3fn) if x.is_floating_point() else x
    for name, x in tensors.items()
  }
  shutil.copytree(bases["sd1"] / "tokenizer", tmp_path / "tokenizer")
  file = save(tmp_path / "m.safetensors", narrow, RESOLUTION)
  out, tree = run(file, kind, "--verify")
  assert difference(capsys.readouterr().out) < 5e-3
  assert json.loads((out / "export.json").read_text())["dtype"] == "float16"
  made = load_pipeline(out / FILE if kind == "single_file" else out)
  base = load_pipeline(file)
  fused = lora.fuse(base.params["unet"], tree)
  for a, b in zip(*map(jax.tree.leaves, (made.params["unet"], fused))):
    np.testing.assert_array_equal(a, np.asarray(b, np.float16))
  for name in ("vae", "text_encoder"):
    for a, b in zip(*map(jax.tree.leaves, (made.params[name], base.params[name]))):
      np.testing.assert_array_equal(a, b)
