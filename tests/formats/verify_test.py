"""Exports as PyTorch sees them: what it predicts, and whether --verify notices."""

import functools
import json
import re

import chex
import jax
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from safetydpo_jax import load_lora, load_pipeline, lora
from safetydpo_jax.errors import InputError
from safetydpo_jax.formats import export_lora, verify
from safetydpo_jax.formats.loras import kohya
from tests.support import dialects, drawn, exports, twins
from tests.support.checkpoints import (
  SDXL,
  save_tiny_checkpoint,
  save_tiny_sdxl_checkpoint,
)
from tests.support.exports import make_expert, read_card


@pytest.fixture(scope="module")
def pipeline(tiny_checkpoint):
  return load_pipeline(tiny_checkpoint, components=("unet",))


@pytest.fixture
def run(tiny_checkpoint, tmp_path):
  """`export` to a new folder."""
  return functools.partial(exports.run, tiny_checkpoint, tmp_path / "out")


FAMILIES = {"sd1": save_tiny_checkpoint, "sdxl": save_tiny_sdxl_checkpoint}
# One of each family, format and type; the other pairs of these are slow.
KINDS = (
  ("sd1", "diffusers", None),
  ("sdxl", "kohya", "float16"),
  ("sd1", "pipeline", "bfloat16"),
  ("sdxl", "pipeline", None),
  *(
    pytest.param(*case, marks=pytest.mark.slow)
    for case in (
      ("sdxl", "diffusers", None),
      ("sd1", "kohya", "float16"),
      ("sdxl", "pipeline", "bfloat16"),
      ("sd1", "pipeline", None),
    )
  ),
)


@pytest.fixture(scope="module")
def family(request, tmp_path_factory):
  """A checkpoint of each family, and a LoRA on every kind of its layers."""
  folder = tmp_path_factory.mktemp(request.param)
  base = FAMILIES[request.param](folder / "base")
  model = load_pipeline(str(base), components=())
  targets = [t for t in twins.EVERY_KIND if t != "upsamplers.0.conv"]
  tree = twins.random_lora(model.unet_shapes(), 3, targets, size=0.05)
  return base, make_expert(folder / "expert", tree, model.fingerprint)


@pytest.mark.parametrize(("family", "kind", "dtype"), KINDS, indirect=["family"])
def test_pytorch_predicts_with_every_export_what_we_predict(
  kind, dtype, family, run, tmp_path, capsys
):
  base, name = family
  more = ["--dtype", dtype] if dtype else []
  run(name, "--verify", *more, model=base, kind=kind)
  line = capsys.readouterr().out.splitlines()[-1]
  found = re.search(r"this package (\S+), .* deviation (\S+) that .* to (\S+)$", line)
  difference, deviation, effect = map(float, found.groups())
  close = {None: 1e-4, "float16": 5e-3, "bfloat16": 5e-2}[dtype]
  assert difference < close * max(1, deviation)
  assert effect > 4 * difference, "the LoRA must be seen"


def test_diffusers_finds_every_layer_of_sdxl_in_sgm_s_spelling(run, tmp_path, capsys):
  """As published, with two layers a block; the upsampler's convolution too."""
  parts = {**SDXL, "unet": {**SDXL["unet"], "layers_per_block": 2}}
  base = save_tiny_sdxl_checkpoint(tmp_path / "base", parts=parts)
  model = load_pipeline(str(base), components=())
  assert kohya.writes_sgm(model.unet.config)
  tree = twins.random_lora(model.unet_shapes(), 3, twins.EVERY_KIND, size=0.05)
  name = make_expert(tmp_path / "expert", tree, model.fingerprint)
  out = run(name, "--verify", model=base, kind="kohya")
  assert "largest difference between PyTorch" in capsys.readouterr().out
  chex.assert_trees_all_equal(load_lora(str(out)), jax.device_get(tree))


def test_the_number_type_of_the_base_is_kept_unless_another_is_asked_for(
  tiny_checkpoint, pipeline, run, tmp_path, capsys
):
  """A float16 base rounds the sum to float16, which --verify has to allow for."""
  half = StableDiffusionPipeline.from_pretrained(tiny_checkpoint).to(torch.float16)
  half.save_pretrained(tmp_path / "half", variant="fp16")
  base = load_pipeline(str(tmp_path / "half"), components=(), variant="fp16")
  tree = twins.random_lora(base.unet_shapes(), size=0.05)
  name = make_expert(tmp_path / "expert", tree, base.fingerprint)
  more = ("--variant", "fp16", "--verify")
  out = run(name, *more, model=tmp_path / "half", kind="pipeline")
  assert "parameters, float16" in capsys.readouterr().out
  assert json.loads((out / "export.json").read_text())["dtype"] == "float16"
  assert "| numbers | float16 |" in read_card(out)


def test_verify_sees_an_export_that_predicts_something_else(
  run, pipeline, tmp_path, monkeypatch
):
  """A file of half the scale, as a forgotten alpha would make it."""
  tree = twins.random_lora(pipeline.params["unet"])
  file = make_expert(tmp_path / "wrong", tree, pipeline.fingerprint)
  write = export_lora.write_diffusers

  def wrong(out, tree, *arguments, **options):
    return write(out, lora.scale(tree, 0.5), *arguments, **options)

  monkeypatch.setattr(export_lora, "write_diffusers", wrong)
  with pytest.raises(
    InputError, match=r"--verify: largest difference .*do not publish"
  ):
    run(file, "--verify")


def test_verify_multiplies_in_float32_wherever_it_runs(pipeline, monkeypatch):
  """TF32 and bf16, the defaults of GPUs and TPUs, would be taken for a wrong export."""
  seen = []

  def look(unet, params, lora, latents, *_):
    seen.append(jax.config.jax_default_matmul_precision)
    return latents

  monkeypatch.setattr(verify, "_predict", look)
  monkeypatch.setattr(verify, "_predict_torch", lambda *_: np.zeros(1))
  with jax.default_matmul_precision("bfloat16"):
    verify.compare(pipeline, {}, None, fused=False)
  assert seen
  assert set(seen) == {"highest"}


@pytest.fixture(scope="module")
def dora(tmp_path_factory):
  """A base, a file with DoRA, norms and biases, and the UNet with it merged in."""
  folder = tmp_path_factory.mktemp("dora")
  base = save_tiny_checkpoint(folder / "base", unet={"layers_per_block": 2})
  unet = UNet2DConditionModel.from_pretrained(base / "unet")

  def draw(weight):
    norms = weight.ndim == 1
    return (drawn.draw_full if norms else drawn.draw_dora_in)(weight)

  torch.manual_seed(0)
  write = dialects.by_twin(dialects.omi, draw, norms=True)
  file, merged = write(unet, dialects.TINY["SD1"], folder)
  return base, file, merged.eval()


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_what_is_not_a_lora_is_folded_into_a_pipeline(
  dtype, dora, run, tmp_path, capsys
):
  base, file, merged = dora
  more = ("--dtype", dtype) if dtype else ()
  out = run(file, "--verify", *more, kind="pipeline", model=base)
  printed = capsys.readouterr().out
  assert "largest difference between PyTorch" in printed
  assert "; rank" not in printed
  assert "| rank |" not in read_card(out)
  theirs = UNet2DConditionModel.from_pretrained(out / "unet").state_dict()
  for name, tensor in merged.state_dict().items():
    tolerance = {"rtol": 1e-3, "atol": 1e-3} if dtype else {"rtol": 0, "atol": 2e-6}
    torch.testing.assert_close(theirs[name].float(), tensor, **tolerance)
  with pytest.raises(InputError, match=r"DoRA magnitudes.*--format pipeline"):
    run(file, kind="kohya", model=base, out=tmp_path / "kohya")
