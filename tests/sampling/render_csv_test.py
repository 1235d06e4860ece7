"""render_csv: the pictures diffusers makes, in folders that say what made them."""

import json
import shutil

import diffusers
import jax
import numpy as np
import pytest
import torch
from PIL import Image

from safetydpo_jax import load_pipeline, lora
from safetydpo_jax.data import contact_sheet, images, prompts
from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.loras.write import write_diffusers
from safetydpo_jax.sampling import render_csv as rendering
from tests.support import dialects, drawn
from tests.support.rendering import (
  GUIDANCE,
  HEIGHT,
  PROMPTS,
  STEPS,
  WIDTH,
  assert_equal_to_rounding,
  read_images,
  write_csv,
  write_noise,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("generate")


@pytest.fixture(scope="module")
def latents(folder):
  return write_noise(folder / "latents.npy", len(PROMPTS))


@pytest.fixture(scope="module")
def lora_folder(tiny_checkpoint, folder):
  """A LoRA with both factors far from 0."""
  shapes = load_pipeline(str(tiny_checkpoint), components=()).unet_shapes()
  fresh = lora.init_lora(jax.random.key(0), shapes, 3)
  rng = np.random.default_rng(1)
  tree = jax.tree.map(
    lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32) * 0.3, fresh
  )
  write_diffusers(folder / "lora", tree, lora.ATTENTION_TARGETS)
  return folder / "lora"


@pytest.fixture(scope="module")
def base(run, folder):
  """The three prompts without a LoRA, each from its own seed."""
  run(folder / "base")
  return folder / "base"


def paint_with_diffusers(model, latents, lora_folder=None, scale=None):
  """What StableDiffusionPipeline makes of PROMPTS: (n, H, W, 3) in 0 to 255."""
  pipeline = diffusers.StableDiffusionPipeline.from_pretrained(model)
  pipeline.set_progress_bar_config(disable=True)
  if lora_folder:
    pipeline.load_lora_weights(lora_folder)
  images = pipeline(
    PROMPTS,
    height=HEIGHT,
    width=WIDTH,
    num_inference_steps=STEPS,
    guidance_scale=GUIDANCE,
    latents=torch.from_numpy(np.load(latents)),
    cross_attention_kwargs={"scale": scale} if lora_folder else None,
    output_type="np",
  ).images
  return images * 255


def assert_pictures_agree(ours, theirs):
  ours = np.stack(list(ours.values()))
  assert ours.shape == theirs.shape == (3, HEIGHT, WIDTH, 3)
  assert theirs.std() > 20
  assert np.abs(ours - theirs).mean() < 1, "grey levels on average"
  assert np.abs(ours - theirs).max() < 4


@pytest.mark.parametrize("scale", [None, 1.0, 0.5])
def test_whole_pictures_equal_diffusers(
  scale, run, tiny_checkpoint, latents, lora_folder, tmp_path
):
  """The same noise, prompts and guidance in both; a LoRA at full and half."""
  loras = ()
  theirs = paint_with_diffusers(tiny_checkpoint, latents)
  if scale:
    loras = (str(lora_folder) if scale == 1.0 else f"{lora_folder}:{scale}",)
    base = theirs
    theirs = paint_with_diffusers(tiny_checkpoint, latents, lora_folder, scale)
    assert np.abs(theirs - base).mean() > 5, "the LoRA must be seen"
  ours = run(tmp_path / "out", latents=latents, lora=loras)
  assert_pictures_agree(ours, theirs)


def test_a_run_leaves_pictures_and_what_made_them(base, tiny_checkpoint, prompts_csv):
  images = read_images(base)
  assert list(images) == [f"{number:07d}_0.png" for number in range(3)]
  assert {image.shape for image in images.values()} == {(HEIGHT, WIDTH, 3)}
  others = ["generate.json", "sheet.jpg"]
  assert sorted(file.name for file in base.iterdir()) == [*images, *others]
  about = json.loads((base / "generate.json").read_text())
  assert about["base"] == load_pipeline(tiny_checkpoint, components=()).fingerprint
  assert about["model"] == str(tiny_checkpoint)
  assert about["prompts"] == str(prompts_csv)
  expected = {"steps": 5, "guidance": 7.5, "height": 16, "width": 24, "images": 3}
  assert expected.items() <= about.items()
  assert (about["sampler"], about["lora"], about["dtype"]) == ("pndm", [], "float32")


def test_existing_images_are_kept_and_missing_ones_made_again(base, run, tmp_path):
  out = shutil.copytree(base, tmp_path / "out")
  expected = read_images(base)
  marked = out / "0000000_0.png"
  Image.new("RGB", (2, 2)).save(marked)
  before = marked.read_bytes()
  (out / "0000002_0.png").unlink()
  images = run(out)
  assert marked.read_bytes() == before
  for name in ("0000001_0.png", "0000002_0.png"):
    assert np.abs(images[name] - expected[name]).max() <= 1


def test_an_interrupted_run_goes_on_with_the_same_settings_alone(
  run, tmp_path, monkeypatch
):
  """Until all images are there the folder has no manifest, but a plan."""
  save, saved = rendering.save_image, []

  def save_two(file, image):
    if len(saved) == 2:
      raise KeyboardInterrupt
    saved.append(save(file, image))

  out = tmp_path / "out"
  with monkeypatch.context() as patch:
    patch.setattr(rendering, "save_image", save_two)
    with pytest.raises(KeyboardInterrupt):
      run(out)
  assert not (out / "generate.json").exists()
  with pytest.raises(InputError, match="steps 5, now it is 4"):
    run(out, steps=4)
  assert len(run(out)) == 3
  assert (out / "generate.json").exists()
  assert not (out / "plan.json").exists()


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"guidance": 3.0}, "guidance 7.5, now it is 3.0"),
    ({"guidance_rescale": 0.5}, "guidance_rescale unset, now it is 0.5"),
    ({"negative_prompt": "red"}, "negative_prompt unset, now it is 'red'"),
    ({"sampler": "euler"}, "sampler 'pndm', now it is 'euler'"),
    ("lora", "lora_sha256"),
    ("prompts", "prompts_sha256"),
    ("latents", "latents_sha256"),
  ],
)
def test_images_of_other_settings_do_not_mix(
  change, message, base, run, tmp_path, lora_folder
):
  np.save(tmp_path / "noise.npy", np.zeros((3, 4, 8, 12), np.float32))
  values = {
    "lora": (str(lora_folder),),
    "prompts": write_csv(tmp_path / "p.csv", ["prompt"], ["x"], ["y"], ["z"]),
    "latents": tmp_path / "noise.npy",
  }
  changes = {change: values[change]} if isinstance(change, str) else change
  with pytest.raises(InputError, match=f"{message}.*--out"):
    run(base, **changes)
  assert (base / "generate.json").exists()


def test_lora_scale_0_equals_no_lora(base, run, tmp_path, lora_folder):
  images = run(tmp_path / "out", lora=(f"{lora_folder}:0",))
  assert_equal_to_rounding(images, read_images(base))


def test_what_is_not_a_lora_is_in_the_images_and_not_in_the_base_s(
  run, tmp_path, base, tiny_checkpoint
):
  """A full difference with norms and biases, against a checkpoint that has it in it."""
  unet = diffusers.UNet2DConditionModel.from_pretrained(tiny_checkpoint / "unet")

  def draw(weight):
    parts = drawn.draw_full(weight)
    return {name: 0.1 * part for name, part in parts.items()}

  torch.manual_seed(0)
  write = dialects.by_twin(dialects.flat, draw, norms=True)
  file, merged = write(unet, unet.config, tmp_path)
  shutil.copytree(tiny_checkpoint, tmp_path / "merged")
  merged.save_pretrained(tmp_path / "merged" / "unet")
  out = tmp_path / "out"
  images = run(out, lora=(str(file),), compare=True)
  assert_equal_to_rounding(images, run(tmp_path / "x", model=str(tmp_path / "merged")))
  assert_equal_to_rounding(read_images(out / "base"), read_images(base))
  settings = [
    json.loads((folder / "generate.json").read_text()) for folder in (out, base)
  ]
  assert settings[0]["lora_sha256"] != settings[1]["lora_sha256"]
  assert settings[0]["lora"] == [str(file)]


def test_hosts_share_the_rows_whatever_exists_when_they_look(
  run, tmp_path, base, monkeypatch
):
  """The second host looks when the first has written its share."""
  waits = []

  def wait(name):
    assert not (tmp_path / "out" / "generate.json").exists() or len(waits) > 1
    waits.append(name)

  monkeypatch.setattr(rendering.hosts, "wait_for_all", wait)
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  for host in (0, 1):
    with monkeypatch.context() as patch:
      patch.setattr(jax, "process_index", lambda host=host: host)
      run(tmp_path / "out")
  assert len(waits) == 4
  assert_equal_to_rounding(read_images(tmp_path / "out"), read_images(base))


def test_base_and_aligned_stand_side_by_side(base, run, tmp_path, lora_folder):
  """The base model's images are those of a run without the LoRA, in a folder of its
  own; the sheet shows them left."""
  out = tmp_path / "out"
  aligned = run(out, compare=True, lora=(str(lora_folder),), no_blur=True)
  plain = read_images(base)
  assert_equal_to_rounding(read_images(out / "base"), plain)
  assert all(np.abs(aligned[name] - plain[name]).mean() > 5 for name in plain)
  about = json.loads((out / "base" / "generate.json").read_text())
  assert about["lora"] == []
  assert json.loads((out / "generate.json").read_text())["lora"] == [str(lora_folder)]
  drawn = np.asarray(Image.open(out / "sheet.jpg")).astype(int)
  left = drawn[contact_sheet.GAP :, contact_sheet.GAP :][
    : contact_sheet.SIDE, : contact_sheet.SIDE
  ]
  for folder, near in ((out / "base", True), (out, False)):
    expected = images.load_image(folder / "0000000_0.png", contact_sheet.SIDE)
    assert (np.abs(left - expected).mean() < 4) == near
  run(out / "base")  # goes on there as in any folder


def test_a_comparison_goes_on_where_either_half_was_stopped(run, tmp_path, lora_folder):
  out = tmp_path / "out"
  more = {"compare": True, "lora": (str(lora_folder),)}
  before = run(out, **more)
  (out / "base" / "0000001_0.png").unlink()
  (out / "0000002_0.png").unlink()
  assert_equal_to_rounding(run(out, **more), before)
  assert len(read_images(out / "base")) == 3


def test_the_sheet_is_blurred_unless_asked(base, run, tmp_path):
  run(shutil.copytree(base, tmp_path / "out"), no_blur=True)
  edges = [
    np.abs(np.diff(np.asarray(Image.open(folder / "sheet.jpg")).astype(int), axis=1))[
      contact_sheet.GAP + 2 : contact_sheet.SIDE,
      contact_sheet.GAP + 2 : contact_sheet.SIDE,
    ]
    for folder in (base, tmp_path / "out")
  ]
  assert edges[0].max() < 20 < edges[1].max()


def test_the_csv_is_read_once(run, tmp_path, lora_folder, monkeypatch):
  read, files = prompts.read_table, []

  def read_table(file):
    files.append(file)
    return read(file)

  monkeypatch.setattr(rendering, "read_table", read_table)
  monkeypatch.setattr(prompts, "read_table", read_table)
  run(tmp_path / "out", compare=True, lora=(str(lora_folder),))
  assert len(files) == 1


def test_one_guidance_for_all_rows_is_as_if_they_had_none(
  base, run, tmp_path, prompts_csv, capsys
):
  columns = ["prompt", "sd_guidance_scale", "sd_image_width"]
  rows = [[text, 1 + number, 512] for number, text in enumerate(PROMPTS)]
  file = write_csv(tmp_path / "p.csv", columns, *rows)
  out = tmp_path / "one"
  one = run(out, prompts=file, no_row_guidance=True)
  assert f"{file}: columns not read: sd_image_width\n" in capsys.readouterr().out
  assert_equal_to_rounding(one, read_images(base))
  own = run(tmp_path / "own", prompts=file)
  # The last prompt is empty, which no guidance moves.
  assert all(np.abs(own[name] - one[name]).max() > 1 for name in list(one)[:2])
  hashes, said = zip(
    *(
      (about["prompts_sha256"], about["no_row_guidance"])
      for about in (
        json.loads((folder / "generate.json").read_text()) for folder in (out, base)
      )
    )
  )
  assert hashes[0] == hashes[1]
  assert said == (True, None)
  with pytest.raises(InputError, match="prompts_sha256"):
    run(out, prompts=file)
  # No row has its own: the option changes nothing, and so the folder goes on.
  assert run(base, prompts=prompts_csv, no_row_guidance=True).keys() == one.keys()
