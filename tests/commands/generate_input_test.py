"""generate: what it refuses, and how an image gets onto the disk."""

import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from safetydpo_jax import generate, load_pipeline, lora
from safetydpo_jax.errors import InputError, run_command
from safetydpo_jax.formats.loras import expert
from safetydpo_jax.formats.loras.write import write_diffusers
from tests.support import runs


@pytest.fixture
def run(tiny_checkpoint, tmp_path):
  """`generate` with three prompts on the tiny checkpoint."""

  def run(out, *more):
    (tmp_path / "prompts.csv").write_text("prompt\na\nb\nc\n")
    options = ["--model", tiny_checkpoint, "--prompts", tmp_path / "prompts.csv"]
    generate.main([str(option) for option in (*options, "--out", out, *more)])

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
    run_command(lambda: run(tmp_path / "out", f"--lora={foreign[name]}"))
  assert stopped.value.code == 1
  (line,) = capsys.readouterr().err.strip().splitlines()
  assert line.startswith("error: ")
  assert message in line
  assert not (tmp_path / "out").exists()


LATENTS = {
  "one too few": (np.zeros((2, 4, 8, 8), np.float32), r"expected \(3, 4, 8, 8\)"),
  "channels last": (np.zeros((3, 8, 8, 4), np.float32), r"expected \(3, 4, 8, 8\)"),
  "another size": (np.zeros((3, 4, 8, 12), np.float32), r"expected \(3, 4, 8, 8\)"),
  "pickled": (np.array([{}], object), r"is no readable \.npy"),
  "text": (np.array(["x"]), r"is no \.npy file of floating point numbers"),
}


@pytest.mark.parametrize(("noise", "message"), LATENTS.values(), ids=LATENTS)
def test_latents_of_another_kind_are_refused(noise, message, run, tmp_path):
  np.save(tmp_path / "noise.npy", noise, allow_pickle=True)
  with pytest.raises(InputError, match=rf"noise\.npy .*{message}"):
    run(tmp_path / "out", f"--latents={tmp_path / 'noise.npy'}")


def test_files_that_are_no_latents_are_refused(run, tmp_path):
  np.savez(tmp_path / "archive.npz", np.zeros((3, 4, 8, 8), np.float32))
  (tmp_path / "empty.npy").touch()
  for name in ("archive.npz", "empty.npy", "nothing.npy"):
    with pytest.raises(InputError, match=rf"{name} is no .*\.npy file"):
      run(tmp_path / "out", f"--latents={tmp_path / name}")


NUMBERS = {
  "--height=15": "--height is 15; expected a multiple of 2 pixels",
  "--width=0": "--width is 0; expected a multiple of 2 pixels",
  "--steps=0": "steps is 0; expected 1 to 1000",
  "--steps=1001": "steps is 1001",
  "--compare": "--compare sets images beside the base model's; it needs --lora",
  "--batch_size=0": "--batch_size is 0; expected 1 or more",
  "--guidance=nan": "--guidance is nan; expected a finite number",
  "--guidance_rescale=2": "--guidance_rescale is 2.0; expected 0 to 1",
  "--lora=x:nan": "expected a finite number",
}


@pytest.mark.parametrize(("option", "message"), NUMBERS.items())
def test_impossible_numbers_are_refused(option, message, run, tmp_path):
  with pytest.raises(InputError, match=message):
    run(tmp_path / "out", option)
  assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_named_before_anything_is_rendered(
  run, tmp_path, monkeypatch
):
  monkeypatch.setattr(generate, "make_renderer", None)
  (tmp_path / "file").touch()
  for out in ("/proc/images", tmp_path / "file"):
    with pytest.raises(InputError, match=f"cannot make the folder {out}"):
      run(out)


@pytest.mark.parametrize(
  ("name", "more"), [("sheet.jpg", []), ("base/x.png", ["--compare"])]
)
def test_an_image_does_not_stand_where_we_write(
  name, more, tiny_checkpoint, tmp_path, monkeypatch
):
  monkeypatch.setattr(generate, "load_loras", lambda *_: {"layer": np.ones(1)})
  (tmp_path / "p.csv").write_text(f"prompt,image\na,a.png\nb,{name}\n")
  options = ["--model", tiny_checkpoint, "--prompts", tmp_path / "p.csv", *more]
  options += ["--out", tmp_path / "out", "--lora=x"]
  with pytest.raises(InputError, match=f"row 2 of the CSV: its image .*{name} stands"):
    generate.main([str(option) for option in options])
  assert not (tmp_path / "out").exists()


def test_a_scheduler_we_do_not_have_is_named(tiny_checkpoint, tmp_path):
  model = shutil.copytree(tiny_checkpoint, tmp_path / "model")
  index = json.loads((model / "model_index.json").read_text())
  index["scheduler"] = ["diffusers", "LMSDiscreteScheduler"]
  (model / "model_index.json").write_text(json.dumps(index))
  (tmp_path / "p.csv").write_text("prompt\na\n")
  options = ["--model", model, "--prompts", tmp_path / "p.csv", "--out", tmp_path]
  with pytest.raises(InputError, match=r"'LMSDiscreteScheduler'.*give --sampler"):
    generate.main([str(option) for option in options])


def test_an_image_that_cannot_be_written_leaves_nothing_behind(tmp_path):
  (tmp_path / "x.png").mkdir()
  with pytest.raises(InputError, match=r"cannot write .*x\.png"):
    generate.save_image(tmp_path / "x.png", np.zeros((2, 2, 3)))
  assert [file.name for file in tmp_path.iterdir()] == ["x.png"]


def test_an_image_of_nan_is_an_error_and_not_a_black_square(tmp_path):
  with pytest.raises(InputError, match="NaN or infinity; use --dtype float32"):
    generate.save_image(tmp_path / "x.png", np.full((2, 2, 3), np.nan))
  assert not list(tmp_path.iterdir())


def test_grey_levels_are_rounded_and_not_cut(tmp_path):
  generate.save_image(tmp_path / "a" / "x.png", np.full((1, 1, 3), 99.6 / 255))
  np.testing.assert_array_equal(
    np.asarray(Image.open(tmp_path / "a" / "x.png")), [[[100] * 3]]
  )


def test_jpeg_names_make_jpeg_files(tmp_path):
  generate.save_image(tmp_path / "x.jpg", np.full((8, 8, 3), 0.5))
  assert Image.open(tmp_path / "x.jpg").format == "JPEG"


def test_help_shows_an_example():
  command = [sys.executable, "-m", "safetydpo_jax.generate", "--help"]
  shown = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True)
  assert shown.returncode == 0
  assert "generate --model sd15 --lora runs/hate" in shown.stdout
