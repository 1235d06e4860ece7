"""render_csv: pictures of each family equal diffusers', from tokenizer to pixels."""

import csv
import json

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from safetydpo_jax import load_pipeline
from safetydpo_jax.data.prompts import Row, read_prompts
from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.loras import adapter as adapters
from safetydpo_jax.sampling import inputs
from safetydpo_jax.sampling.render_csv import (
  RenderOptions,
  fill_from_checkpoint,
  make_folder,
  render_csv,
)
from tests.support.checkpoints import (
  SD2,
  save_tiny_checkpoint,
  save_tiny_sdxl_checkpoint,
)
from tests.support.edits import edited_copy
from tests.support.rendering import HEIGHT, WIDTH, write_noise

STEPS = 6
COLUMNS = ["prompt", "negative_prompt", "evaluation_guidance"]
# None: the cell is empty, and the command's own option holds.
ROWS = [
  ["a red one in the sand", None, None],
  ["an ant", "and the red", 3.0],
  ["", "on", 1.0],
]
GUIDANCE = 6.0


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
  return write_noise(tmp_path_factory.mktemp("latents") / "latents.npy", len(ROWS))


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_checkpoint):
  folder = tmp_path_factory.mktemp("models")
  return {
    "sd1": tiny_checkpoint,
    "sd2": save_tiny_checkpoint(folder / "sd2", **SD2),
    "sdxl": save_tiny_sdxl_checkpoint(folder / "sdxl"),
    "lcm": save_tiny_checkpoint(folder / "lcm", unet={"time_cond_proj_dim": 6}),
  }


def paint(model, latents, out, rescale, rows=ROWS):
  """Our pictures of the rows, (n, H, W, 3) in 0 to 255."""
  with open(out.with_suffix(".csv"), "w", newline="") as file:
    csv.writer(file).writerows([COLUMNS, *rows])
  options = RenderOptions(
    model=str(model),
    prompts=out.with_suffix(".csv"),
    out=out,
    height=HEIGHT,
    width=WIDTH,
    steps=STEPS,
    guidance=GUIDANCE,
    guidance_rescale=rescale,
    latents=latents,
  )
  render_csv(options)
  files = sorted(out.glob("*.png"))
  return np.stack([np.asarray(Image.open(file)).astype(float) for file in files])


def paint_with_diffusers(model, latents, rows=ROWS, **more):
  """The pictures of diffusers' pipeline with the checkpoint's scheduler, row by row."""
  pipeline = diffusers.DiffusionPipeline.from_pretrained(model)
  pipeline.set_progress_bar_config(disable=True)
  pictures = []
  for (prompt, negative, guidance), noise in zip(rows, np.load(latents)):
    pictures += pipeline(
      prompt,
      negative_prompt=negative,
      guidance_scale=GUIDANCE if guidance is None else guidance,
      height=HEIGHT,
      width=WIDTH,
      num_inference_steps=STEPS,
      latents=torch.from_numpy(noise[None]),
      output_type="np",
      **more,
    ).images.tolist()
  return np.array(pictures) * 255


@pytest.mark.parametrize(
  ("family", "sampler", "rescale"),
  [
    # `render_csv_test.py` has this sampler on this family, with LoRAs.
    pytest.param("sd1", "pndm", 0.0, marks=pytest.mark.slow),
    ("sd2", "ddim", 0.7),
    ("sdxl", "euler", 0.0),
  ],
)
def test_pictures_equal_diffusers(family, sampler, rescale, models, latents, tmp_path):
  """Each row with its own guidance and negative prompt; for SDXL no negative prompt
  means embeddings of zeros."""
  model = models[family]
  theirs = paint_with_diffusers(model, latents, guidance_rescale=rescale)
  ours = paint(model, latents, tmp_path / "out", rescale)
  assert theirs.std() > 20
  assert np.abs(ours - theirs).mean() < 1, "grey levels on average"
  assert np.abs(ours - theirs).max() < 4
  about = json.loads((tmp_path / "out" / "generate.json").read_text())
  assert about["sampler"] == sampler


def test_a_unet_distilled_with_guidance_is_told_the_scale(models, latents, tmp_path):
  rows = [(prompt, None, scale) for (prompt, _, _), scale in zip(ROWS, [None, 0.5, 3])]
  theirs = paint_with_diffusers(models["lcm"], latents, rows)
  ours = paint(models["lcm"], latents, tmp_path / "out", 0.0, rows)
  assert theirs.std() > 20
  assert np.abs(ours - theirs).max() < 4
  with pytest.raises(InputError, match=r"negative_prompt is 'and the red'.*distilled"):
    paint(models["lcm"], latents, tmp_path / "negative", 0.0)
  with pytest.raises(InputError, match=r"--guidance_rescale is 0.5.*distilled"):
    paint(models["lcm"], latents, tmp_path / "rescaled", 0.5, rows)


def make_inputs(model, row, guidance=7.5, negative_prompt=None):
  """What a row of ROWS is rendered from."""
  prompt, negative, own = ROWS[row]
  return inputs.make_inputs(
    [Row(None, prompt, 0, 0, own, negative)],
    pipeline=load_pipeline(model, components=()),
    shape=(8, 8, 4),
    guidance=guidance,
    negative_prompt=negative_prompt,
  )


def test_embeddings_are_zeros_only_for_sdxl_without_any_negative_prompt(
  models, tmp_path
):
  assert make_inputs(models["sdxl"], 0).negative == 0
  assert make_inputs(models["sdxl"], 1).negative == 1
  assert make_inputs(models["sdxl"], 0, negative_prompt="").negative == 1
  assert make_inputs(models["sd1"], 0).negative == 1
  index = models["sdxl"] / "model_index.json"
  before = index.read_text()
  index.write_text(
    json.dumps({**json.loads(before), "force_zeros_for_empty_prompt": False})
  )
  assert make_inputs(models["sdxl"], 0).negative == 1
  index.write_text(before)


def test_the_rows_own_guidance_and_negative_prompt_win(models):
  more = {"guidance": 5.0, "negative_prompt": "red"}
  of_command, of_row = (make_inputs(models["sd1"], row, **more) for row in (0, 1))
  assert (of_command.guidance, of_row.guidance) == (5, 3)
  pipeline = load_pipeline(models["sd1"], components=())
  for made, text in ((of_command, "red"), (of_row, "and the red")):
    np.testing.assert_array_equal(made.negative_ids, pipeline.tokenize([text]))


def test_what_a_row_says_of_itself_decides_its_folder(models, tmp_path):
  """Other guidance or another negative prompt in the CSV: other images."""
  pipeline = load_pipeline(models["sd1"], components=())
  found = []
  for number, row in enumerate((["x", "", ""], ["x", "red", ""], ["x", "", "3"])):
    file = tmp_path / f"{number}.csv"
    with open(file, "w", newline="") as lines:
      csv.writer(lines).writerows([COLUMNS, row])
    options = RenderOptions(model="x", prompts=file, out=tmp_path)
    options = fill_from_checkpoint(options, pipeline)
    rows = read_prompts(file, tmp_path)
    folder = make_folder(options, tmp_path, rows, pipeline, adapters.of_lora({}))
    found.append(folder.settings["prompts_sha256"])
  assert len(set(found)) == 3


def test_guidance_below_1_is_none_as_in_diffusers(models):
  assert make_inputs(models["sd1"], 0, guidance=0.5).guidance == 1


def test_pictures_are_as_high_and_as_wide_as_the_model_draws(models, tmp_path):
  """`sample_size` may be a height and a width, in this order."""
  file, sizes = "unet/config.json", {"sample_size": [8, 12]}
  model = edited_copy(models["sd1"], tmp_path / "model", file, **sizes)
  pipeline = diffusers.StableDiffusionPipeline.from_pretrained(model)
  pipeline.set_progress_bar_config(disable=True)
  theirs = pipeline("on", num_inference_steps=1, output_type="np").images[0].shape[:2]
  options = RenderOptions(model=str(model), prompts=tmp_path, out=tmp_path)
  ours = fill_from_checkpoint(options, load_pipeline(model, components=()))
  assert (ours.height, ours.width) == theirs == (16, 24)
