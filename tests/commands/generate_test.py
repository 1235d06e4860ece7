"""generate: the command line of `render_csv`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from safetydpo_jax import generate
from safetydpo_jax.errors import InputError
from safetydpo_jax.sampling.render_csv import RenderOptions
from tests.support import runs


@pytest.fixture
def parsed(monkeypatch):
  """The options that `generate` makes of a command line."""

  def parsed(*words):
    seen = []
    monkeypatch.setattr(generate, "render_csv", seen.append)
    generate.main(["--model=toy", "--prompts", "p.csv", "--out=images", *words])
    return seen[0]

  return parsed


def test_the_least_that_is_asked_for_leaves_the_defaults(parsed):
  assert parsed() == RenderOptions("toy", Path("p.csv"), Path("images"))


def test_every_flag_is_an_option_of_its_type(parsed):
  options = parsed(
    *(
      "--compare",
      "--lora",
      "runs/hate",
      "--lora=merged:0.5",
      "--any_base",
      "--sampler",
      "euler",
    ),
    *(
      "--steps",
      "7",
      "--guidance",
      "-1",
      "--guidance_rescale=0.7",
      "--negative_prompt",
      "-ve",
    ),
    *("--height=16", "--width", "24", "--latents", "noise.npy", "--batch_size", "2"),
    *("--dtype", "bfloat16", "--variant", "fp16", "--vae", "other", "--no_blur"),
    "--no_row_guidance",
    *("--prompt_style", "a1111", "--clip_skip=1", "--original_size", "512,768"),
    *("--crop_top_left=8,0", "--target_size=16,24", "--negative_original_size=9,9"),
    *("--negative_crop_top_left", "1,2", "--negative_target_size", "3,4"),
  )
  assert options == RenderOptions(
    model="toy",
    prompts=Path("p.csv"),
    out=Path("images"),
    lora=("runs/hate", "merged:0.5"),
    any_base=True,
    compare=True,
    sampler="euler",
    steps=7,
    guidance=-1.0,
    no_row_guidance=True,
    guidance_rescale=0.7,
    negative_prompt="-ve",
    height=16,
    width=24,
    latents=Path("noise.npy"),
    batch_size=2,
    dtype="bfloat16",
    vae="other",
    variant="fp16",
    no_blur=True,
    prompt_style="a1111",
    clip_skip=1,
    original_size="512,768",
    crop_top_left="8,0",
    target_size="16,24",
    negative_original_size="9,9",
    negative_crop_top_left="1,2",
    negative_target_size="3,4",
  )


@pytest.mark.parametrize(
  ("word", "message"),
  [("--batch_size=0", "--batch_size is 0"), ("--compare", "needs at least one --lora")],
)
def test_values_out_of_range_are_one_line(parsed, word, message):
  with pytest.raises(InputError, match=message):
    parsed(word)


def test_a_command_line_renders(tiny_checkpoint, tmp_path, capsys):
  (tmp_path / "p.csv").write_text("prompt\na\nb\n")
  words = ["--model", tiny_checkpoint, "--prompts", tmp_path / "p.csv"]
  generate.main([str(w) for w in (*words, "--out", tmp_path / "out", "--steps=2")])
  assert f"2 images in {tmp_path / 'out'}" in capsys.readouterr().out
  about = json.loads((tmp_path / "out" / "generate.json").read_text())
  assert (about["steps"], about["images"]) == (2, 2)
  assert (tmp_path / "out" / "0000001_0.png").is_file()


def test_help_shows_an_example():
  command = [sys.executable, "-m", "safetydpo_jax.generate", "--help"]
  shown = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True)
  assert shown.returncode == 0
  assert "generate --model sd15 --lora runs/hate" in shown.stdout
