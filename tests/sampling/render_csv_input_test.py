"""render_csv: what it refuses."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from safetydpo_jax import load_pipeline, lora
from safetydpo_jax.errors import InputError, run_command
from safetydpo_jax.formats.loras import adapter as adapters
from safetydpo_jax.formats.loras import expert
from safetydpo_jax.formats.loras.write import write_diffusers
from safetydpo_jax.sampling import render_csv as rendering
from safetydpo_jax.sampling.render_csv import RenderOptions, render_csv
from tests.support.rendering import write_csv


@pytest.fixture
def run(tiny_checkpoint, tmp_path):
  """`render_csv` with three prompts on the tiny checkpoint."""

  def run(out, **changes):
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("prompt\na\nb\nc\n")
    options = {"model": str(tiny_checkpoint), "prompts": prompts, "out": out}
    render_csv(RenderOptions(**(options | changes)))

  return run


@pytest.fixture(scope="module")
def foreign(tiny_checkpoint, tmp_path_factory):
  """An expert of another base model, and a LoRA of other shapes."""
  folder = tmp_path_factory.mktemp("foreign")
  shapes = load_pipeline(tiny_checkpoint, components=()).unet_shapes()
  tree = lora.init_lora(jax.random.key(0), shapes, 4)
  about = {"base": {"name": "another", "fingerprint": "0123456789abcdef"}}
  expert.write_expert(folder / "foreign", tree, about)
  wider = jax.tree.map(
    lambda s: jax.ShapeDtypeStruct((2 * s.shape[0], *s.shape[1:]), s.dtype), shapes
  )
  wide = lora.init_lora(jax.random.key(0), wider, 4)
  write_diffusers(folder / "wide", wide, lora.ATTENTION_TARGETS)
  return {"expert": folder / "foreign", "file": folder / "wide"}


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("expert", "was trained on another (fingerprint 0123456789abcdef)"),
    ("file", "it was made for another model"),
  ],
)
def test_a_lora_of_another_model_is_refused(
  name, message, foreign, run, tmp_path, capsys
):
  with pytest.raises(SystemExit) as stopped:
    run_command(lambda: run(tmp_path / "out", lora=(str(foreign[name]),)))
  assert stopped.value.code == 1
  (line,) = capsys.readouterr().err.strip().splitlines()
  assert line.startswith("error: ")
  assert message in line
  assert not (tmp_path / "out").exists()


def test_a_lora_of_another_model_is_used_knowingly(foreign, run, tmp_path, capsys):
  """It changes no setting: the LoRA's factors and the base are in the manifest."""
  options = {"lora": (str(foreign["expert"]),), "steps": 1}
  run(tmp_path / "out", any_base=True, **options)
  assert "--any_base: " in capsys.readouterr().err
  about = json.loads((tmp_path / "out" / "generate.json").read_text())
  assert "any_base" not in about
  with pytest.raises(InputError, match="it was made for another model"):
    run(tmp_path / "two", any_base=True, lora=(str(foreign["file"]),))


LATENTS = {
  "one too few": (np.zeros((2, 4, 8, 8), np.float32), r"expected \(3, 4, 8, 8\)"),
  "channels last": (np.zeros((3, 8, 8, 4), np.float32), r"expected \(3, 4, 8, 8\)"),
  "another size": (np.zeros((3, 4, 8, 12), np.float32), r"expected \(3, 4, 8, 8\)"),
  "pickled": (np.array([{}], object), r"as a \.npy file: .*Python objects"),
  "NaN": (np.full((3, 4, 8, 8), np.nan), r"holds NaN, infinity"),
  "too large": (np.full((3, 4, 8, 8), 1e300), r"too large for float32"),
  "text": (np.array(["x"]), r"is not a \.npy file of floating point numbers"),
}


@pytest.mark.parametrize(("noise", "message"), LATENTS.values(), ids=LATENTS)
def test_latents_of_another_kind_are_refused(noise, message, run, tmp_path):
  np.save(tmp_path / "noise.npy", noise, allow_pickle=True)
  with pytest.raises(InputError, match=rf"noise\.npy .*{message}"):
    run(tmp_path / "out", latents=tmp_path / "noise.npy")


def test_files_that_are_no_latents_are_refused(run, tmp_path):
  claims = {"descr": "<f4", "fortran_order": False, "shape": (3, 4, 8, 10**12)}
  with (tmp_path / "claims.npy").open("wb") as file:  # 384 terabytes
    np.lib.format.write_array_header_1_0(file, claims)
  (tmp_path / "zipped.npy").write_bytes(b"PK\x03\x04 and no more")
  np.savez(tmp_path / "archive.npz", np.zeros((3, 4, 8, 8), np.float32))
  (tmp_path / "empty.npy").touch()
  for name in ("archive.npz", "claims.npy", "empty.npy", "nothing.npy", "zipped.npy"):
    with pytest.raises(InputError, match=rf"{name} (is not|as) a \.npy file"):
      run(tmp_path / "out", latents=tmp_path / name)


IMPOSSIBLE = [
  ("height", 15, "--height is 15; expected a multiple of 2 pixels"),
  ("width", 0, "--width is 0; expected a multiple of 2 pixels"),
  ("width", 51_200_000, "--width is 51200000; .* at most 16,384"),
  ("steps", 0, "steps is 0; expected 1 to 1000"),
  ("steps", 1001, "steps is 1001"),
  ("compare", True, "--compare .* needs .*--lora"),
  ("batch_size", 0, "--batch_size is 0; expected 1 or more"),
  ("guidance", float("nan"), "--guidance is nan; expected a finite number"),
  ("guidance_rescale", 2.0, "--guidance_rescale is 2.0; expected 0 to 1"),
  ("lora", ("x:nan",), "expected a finite number"),
]


@pytest.mark.parametrize(("option", "value", "message"), IMPOSSIBLE)
def test_impossible_values_are_refused(option, value, message, run, tmp_path):
  with pytest.raises(InputError, match=message):
    run(tmp_path / "out", **{option: value})
  assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_named_before_anything_is_rendered(
  run, tmp_path, monkeypatch
):
  monkeypatch.setattr(rendering, "make_renderer", None)
  (tmp_path / "file").touch()
  for out in (Path("/proc/images"), tmp_path / "file"):
    with pytest.raises(InputError, match=f"cannot make the folder {out}"):
      run(out)


@pytest.mark.parametrize(
  ("name", "more"), [("sheet.jpg", {}), ("base/x.png", {"compare": True})]
)
def test_an_image_does_not_collide_with_what_we_write(
  name, more, run, tmp_path, monkeypatch
):
  adapter = adapters.of_lora({"layer": np.ones(1)})
  monkeypatch.setattr(rendering, "load_adapters", lambda *_: adapter)
  prompts = tmp_path / "p.csv"
  prompts.write_text(f"prompt,image\na,a.png\nb,{name}\n")
  with pytest.raises(InputError, match=f"row 2 of the CSV: its image .*{name} "):
    run(tmp_path / "out", prompts=prompts, lora=("x",), **more)
  assert not (tmp_path / "out").exists()


def test_a_scheduler_we_do_not_have_is_named(tiny_checkpoint, run, tmp_path):
  model = shutil.copytree(tiny_checkpoint, tmp_path / "model")
  index = json.loads((model / "model_index.json").read_text())
  for scheduler, name in (
    (["diffusers", "KDPM2DiscreteScheduler"], "'KDPM2DiscreteScheduler'"),
    (5, "None"),
    ([["x"], ["y"]], "None"),
  ):
    index["scheduler"] = scheduler
    (model / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=rf"{name}.*give --sampler"):
      run(tmp_path, model=str(model))


def test_a_format_that_is_not_written_is_refused_before_the_model_is_read(tmp_path):
  file = write_csv(tmp_path / "p.csv", ["prompt", "image"], ["x", "x.webp"])
  options = RenderOptions(model="none", prompts=file, out=tmp_path / "out")
  with pytest.raises(InputError, match=r"image 'x.webp' is not a .png or .jpg"):
    render_csv(options)
