"""render_csv: prompts in chunks, weights, clip skip and SDXL's sizes; pictures equal
diffusers', which gets the embeddings of the web UI's twin where it has none itself."""

import csv
import json

import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from safetydpo_jax.errors import InputError
from safetydpo_jax.sampling import render_csv as rendering
from safetydpo_jax.sampling.render_csv import RenderOptions, render_csv
from tests.support import webui_twin
from tests.support.checkpoints import save_tiny_sdxl_checkpoint
from tests.support.rendering import (
  HEIGHT,
  WIDTH,
  assert_equal_to_rounding,
  write_csv,
  write_noise,
)

STEPS, GUIDANCE = 2, 6.0
COLUMNS = ["prompt", "negative_prompt", "evaluation_guidance"]
LONG = ", ".join(["a red one in the sand"] * 9)  # two chunks, cut at a comma
# None: the cell is empty. The rows of one chunk and those of two are rendered apart.
ROWS = [
  ["a (red:1.4) one! [in the] sand", None, None],
  [LONG, "and the red", None],
  ["an ant", "(on:0.6) " + LONG, 3.0],
  ["((an)) ant BREAK an ant", "on", None],
  ["the red", LONG, 1.0],  # no guidance, so that its length does not matter
]


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
  return write_noise(tmp_path_factory.mktemp("latents") / "latents.npy", len(ROWS))


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_checkpoint):
  sdxl = tmp_path_factory.mktemp("models") / "sdxl"
  return {"sd1": tiny_checkpoint, "sdxl": save_tiny_sdxl_checkpoint(sdxl)}


@pytest.fixture
def paint(models, latents, tmp_path):
  """Our pictures of rows, (n, H, W, 3) in 0 to 255."""

  def paint(family, rows=ROWS, name="out", **options):
    file = tmp_path / f"{name}.csv"
    with open(file, "w", newline="") as lines:
      csv.writer(lines).writerows([COLUMNS, *rows])
    noise = latents if len(rows) == len(ROWS) else None
    sizes = {"height": HEIGHT, "width": WIDTH}
    more = {"steps": STEPS, "guidance": GUIDANCE, "latents": noise, **sizes, **options}
    out = tmp_path / name
    render_csv(RenderOptions(str(models[family]), file, out, **more))
    files = sorted(out.glob("*.png"))
    return np.stack([np.asarray(Image.open(file)).astype(float) for file in files])

  return paint


def paint_with_diffusers(model, latents, inputs, **more):
  """diffusers' pictures of ROWS; `inputs` (pipeline, prompt, negative) → arguments."""
  pipeline = diffusers.DiffusionPipeline.from_pretrained(model)
  pipeline.set_progress_bar_config(disable=True)
  # diffusers looks for the last norm where transformers 4 had it.
  pipeline.text_encoder.__dict__["text_model"] = webui_twin.text_model(
    pipeline.text_encoder
  )
  pictures = []
  for (prompt, negative, guidance), noise in zip(ROWS, np.load(latents)):
    scale = GUIDANCE if guidance is None else guidance
    if scale <= 1 and negative:
      negative = ""
    pictures += pipeline(
      **inputs(pipeline, prompt, negative),
      guidance_scale=scale,
      height=HEIGHT,
      width=WIDTH,
      num_inference_steps=STEPS,
      latents=torch.from_numpy(noise[None]),
      output_type="np",
      **more,
    ).images.tolist()
  return np.array(pictures) * 255


def words(pipeline, prompt, negative):
  return {"prompt": prompt, "negative_prompt": negative}


def assert_pictures_agree(ours, theirs, other):
  """`other`: what a setting that is not applied would give."""
  assert theirs.std() > 20
  assert np.abs(theirs - other).mean() > 2, "the setting must be seen"
  assert np.abs(ours - theirs).mean() < 1, "grey levels on average"
  assert np.abs(ours - theirs).max() < 4


def test_clip_skip_equals_diffusers(paint, models, latents):
  """Which skips layers of the prompt alone."""
  model = models["sd1"]
  theirs = paint_with_diffusers(model, latents, words, clip_skip=1)
  other = paint_with_diffusers(model, latents, words)
  assert_pictures_agree(paint("sd1", clip_skip=1), theirs, other)


def test_clip_skip_and_sizes_equal_diffusers_sdxl(paint, models, latents, tmp_path):
  """Also with "!" in a prompt, the second tokenizer's padding."""
  model = models["sdxl"]
  theirs = paint_with_diffusers(
    model,
    latents,
    words,
    clip_skip=1,
    original_size=(300, 200),
    crops_coords_top_left=(50, 4),
    target_size=(70, 900),
    negative_original_size=(20, 600),
    negative_crops_coords_top_left=(7, 90),
    negative_target_size=(800, 30),
  )
  other = paint_with_diffusers(model, latents, words)
  ours = paint(
    "sdxl",
    clip_skip=1,
    original_size="300,200",
    crop_top_left="50,4",
    target_size="70,900",
    negative_original_size="20,600",
    negative_crop_top_left="7,90",
    negative_target_size="800,30",
  )
  assert_pictures_agree(ours, theirs, other)
  about = json.loads((tmp_path / "out" / "generate.json").read_text())
  assert about["conditioning"]["original_size"] == [300, 200]


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_chunks_and_weights_equal_the_web_uis(family, paint, models, latents):
  """The negative prompt skips as many layers as the prompt."""

  def embeddings(pipeline, prompt, negative):
    return webui_twin.embeddings(
      pipeline, prompt, negative, weighted=True, skips=(1, 1)
    )

  theirs = paint_with_diffusers(models[family], latents, embeddings)
  other = paint_with_diffusers(models[family], latents, words)
  ours = paint(family, prompt_style="a1111", clip_skip=1, batch_size=2)
  assert_pictures_agree(ours, theirs, other)


def test_what_is_cut_is_said_and_recorded(paint, models, tmp_path, capsys):
  """Prompts and negative prompts that have an effect, in rows as one counts them."""
  paint("sd1", steps=1)
  tokenizer = transformers.CLIPTokenizer.from_pretrained(models["sd1"] / "tokenizer")
  longest = len(tokenizer(ROWS[2][1])["input_ids"])
  printed = capsys.readouterr().out
  assert f"2 of 5 prompts are cut at 77 tokens; the longest, row 3, has {longest};" in (
    printed
  )
  assert "2 of 5 prompts have weights, (word:1.3), the first in row 1;" in printed
  about = json.loads((tmp_path / "out" / "generate.json").read_text())
  cut = {"rows": 2, "limit": 77, "longest": longest, "row": 3}
  assert about["cut_prompts"] == cut


def test_nothing_is_said_of_prompts_that_fit(paint, tmp_path, capsys):
  paint("sd1", [["a red one", None, None]], steps=1)
  about = json.loads((tmp_path / "out" / "generate.json").read_text())
  assert "cut_prompts" not in about
  assert about["conditioning"] is None
  (line,) = capsys.readouterr().out.splitlines()
  assert line.startswith("1 images in")


def test_images_of_another_style_do_not_mix(paint):
  rows = [["a red one", None, None]]
  paint("sd1", rows, steps=1)
  with pytest.raises(InputError, match=r"conditioning unset, now it is .*'long'"):
    paint("sd1", rows, steps=1, prompt_style="long")


def test_what_the_style_does_not_read_is_refused_before_the_model(paint, monkeypatch):
  monkeypatch.setattr(rendering, "load_pipeline", None)
  rows = [["a", None, None], ["a [cat|dog]", None, None]]
  with pytest.raises(InputError, match=r"out\.csv row 2: .*\[a\|b\]"):
    paint("sd1", rows, prompt_style="a1111")


def test_prompts_are_repaired_if_asked(run, tmp_path, capsys):
  """Curly quotation marks become plain ones, in negative prompts too."""
  columns, curly = ["prompt", "negative_prompt"], ["the “red” one", "“on”"]
  odd = write_csv(tmp_path / "odd.csv", columns, curly, ["an ant", ""])
  plain = [text.replace("“", '"').replace("”", '"') for text in curly]
  even = write_csv(tmp_path / "even.csv", columns, plain, ["an ant", ""])
  options = {"steps": 2, "latents": None, "negative_prompt": "“in”"}
  fixed = run(tmp_path / "a", prompts=odd, fix_text=True, **options)
  assert (
    "--fix_text changes 1 of 2 prompts; the first: row 1" in capsys.readouterr().out
  )
  options["negative_prompt"] = '"in"'
  assert_equal_to_rounding(fixed, run(tmp_path / "b", prompts=even, **options))
  left = run(tmp_path / "c", prompts=odd, **options)
  assert np.abs(next(iter(fixed.values())) - next(iter(left.values()))).max() > 1
  with pytest.raises(InputError, match="fix_text"):
    run(tmp_path / "a", prompts=odd, **(options | {"negative_prompt": "“in”"}))
