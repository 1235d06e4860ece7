"""render_csv: the pictures diffusers makes, one row at a time, whatever the batch."""

import csv
import json
import shutil
from unittest import mock

import diffusers
import jax
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict
from PIL import Image

from safetydpo_jax import load_pipeline, lora
from safetydpo_jax.data import contact_sheet, images, prompts
from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.loras.load import load_loras
from safetydpo_jax.formats.loras.write import write_diffusers
from safetydpo_jax.sampling import render_csv as rendering
from safetydpo_jax.sampling.render_csv import RenderOptions, render_csv
from safetydpo_jax.sampling.renderer import initial_noise
from tests.support import dialects, drawn

HEIGHT, WIDTH = 16, 24
PROMPTS = ['the "red" one, and the blue', "in the sand\non an ant", ""]
STEPS, GUIDANCE = 5, 7.5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("generate")


@pytest.fixture(scope="module")
def prompts_csv(folder):
  return write_csv(folder / "prompts.csv", ["prompt"], *([text] for text in PROMPTS))


@pytest.fixture(scope="module")
def latents(folder):
  """Initial noise in PyTorch's order, no two axes of one size."""
  rng = np.random.default_rng(0)
  noise = rng.standard_normal((3, 4, HEIGHT // 2, WIDTH // 2)).astype(np.float32)
  np.save(folder / "latents.npy", noise)
  return folder / "latents.npy"


@pytest.fixture(scope="module")
def tree(tiny_checkpoint):
  """A LoRA with both factors far from 0."""
  shapes = load_pipeline(str(tiny_checkpoint), components=()).unet_shapes()
  fresh = lora.init_lora(jax.random.key(0), shapes, 3)
  rng = np.random.default_rng(1)
  return jax.tree.map(
    lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32) * 0.3, fresh
  )


@pytest.fixture(scope="module")
def lora_folder(tree, folder):
  write_diffusers(folder / "lora", tree, lora.ATTENTION_TARGETS)
  return folder / "lora"


@pytest.fixture(scope="module")
def run(tiny_checkpoint, prompts_csv):
  """`render_csv` on the tiny checkpoint; the folder as {name: (H, W, 3) int}."""
  renderers, make_renderer = {}, rendering.make_renderer

  def make_once(pipeline, *how):  # Compiling takes 5 s, painting 1 s.
    if how not in renderers:
      renderers[how] = make_renderer(pipeline, *how)
    return renderers[how]

  def run(out, **changes):
    options = {
      "model": str(tiny_checkpoint),
      "prompts": prompts_csv,
      "out": out,
      "steps": STEPS,
      "height": HEIGHT,
      "width": WIDTH,
      "guidance": GUIDANCE,
    }
    with mock.patch.object(rendering, "make_renderer", make_once):
      count = render_csv(RenderOptions(**(options | changes)))
    found = read_images(out)
    if jax.process_count() == 1:
      assert count == len(found) * (2 if changes.get("compare") else 1)
    return found

  return run


@pytest.fixture(scope="module")
def base(run, folder):
  """The three prompts without a LoRA, each from its own seed."""
  run(folder / "base")
  return folder / "base"


def write_csv(path, columns, *rows):
  with open(path, "w", newline="", encoding="utf-8") as file:
    csv.writer(file).writerows([columns, *rows])
  return path


def read_images(out):
  files = sorted(out.glob("[!.]*.png"))
  return {file.name: np.asarray(Image.open(file)).astype(int) for file in files}


def assert_equal_to_rounding(ours, expected):
  assert ours.keys() == expected.keys()
  for name, image in expected.items():
    assert image.std() > 10, "a grey picture would equal any other"
    assert np.abs(ours[name] - image).max() <= 1, name


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


def test_an_image_does_not_depend_on_its_batch_its_neighbours_or_the_devices(
  run, tmp_path, monkeypatch
):
  """Batches of 16 on eight devices, then in reverse of 1 on one device, with new noise
  at each step and each row's own guidance and negative prompt."""
  rows = [
    [text, f"{n}.png", n % 11, 1 + n, "on" * (n % 2)]
    for n, text in enumerate(f"an ant {word}" for word in "abcdefghijklmnopq")
  ]
  columns = [
    "prompt",
    "image",
    "evaluation_seed",
    "evaluation_guidance",
    "negative_prompt",
  ]
  there = write_csv(tmp_path / "there.csv", columns, *rows)
  back = write_csv(tmp_path / "back.csv", columns, *rows[:2:-1])
  ancestral = {"sampler": "euler_ancestral"}
  together = run(tmp_path / "together", batch_size=2, prompts=there, **ancestral)
  devices = jax.devices()[3:4]
  monkeypatch.setattr(jax, "local_devices", lambda: devices)
  monkeypatch.setattr(jax, "local_device_count", lambda: 1)
  alone = run(tmp_path / "alone", batch_size=1, prompts=back, **ancestral)
  assert len(alone) == 14
  assert_equal_to_rounding({name: together[name] for name in alone}, alone)
  assert np.abs(together["0.png"] - together["11.png"]).mean() > 1, "prompts count"


def test_the_noise_of_a_step_is_the_rows_own(run, tmp_path):
  """Euler ancestral from equal initial noise: equal seeds agree, others do not."""
  np.save(tmp_path / "noise.npy", np.ones((3, 4, HEIGHT // 2, WIDTH // 2), np.float32))
  columns, rows = ["prompt", "evaluation_seed"], [["red", 1], ["red", 1], ["red", 2]]
  file = write_csv(tmp_path / "p.csv", columns, *rows)
  more = {"latents": tmp_path / "noise.npy", "sampler": "euler_ancestral"}
  first, same, other = run(tmp_path / "out", prompts=file, **more).values()
  assert np.abs(first - same).max() <= 1
  assert np.abs(first - other).mean() > 5


def test_the_seed_decides_the_noise_and_all_its_bits_count():
  seeds = [0, 1, 2**32 - 1, 2**32, 2**33, -1, 2**64 - 1, 2**63]
  noise = np.asarray(initial_noise(seeds, (4, 3, 2)))
  assert noise.shape == (8, 4, 3, 2)
  for index in range(3):
    expected = jax.random.normal(jax.random.key(seeds[index]), (4, 3, 2))
    np.testing.assert_array_equal(noise[index], expected)
  np.testing.assert_array_equal(noise[5], noise[6])  # −1 is 2⁶⁴ − 1, as in PyTorch
  assert len({picture.tobytes() for picture in noise}) == 7


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
  with pytest.raises(InputError, match="holds images with steps 5, now it is 4"):
    run(out, steps=4)
  assert len(run(out)) == 3
  assert (out / "generate.json").exists()
  assert not (out / "plan.json").exists()


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"guidance": 3.0}, "guidance 7.5, now it is 3.0"),
    ({"guidance_rescale": 0.5}, "without guidance_rescale, now it is 0.5"),
    ({"negative_prompt": "red"}, "without negative_prompt, now it is 'red'"),
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
  with pytest.raises(InputError, match=f"holds images with .*{message}.*another --out"):
    run(base, **changes)
  assert (base / "generate.json").exists()


def test_lora_scale_0_equals_no_lora(base, run, tmp_path, lora_folder):
  images = run(tmp_path / "out", lora=(f"{lora_folder}:0",))
  assert_equal_to_rounding(images, read_images(base))


def test_loras_add_up_each_with_its_scale(tiny_checkpoint, lora_folder, tree):
  pipeline = load_pipeline(tiny_checkpoint, components=("unet",))
  names = [str(lora_folder), f"{lora_folder}:0.5", f"{lora_folder}:-0.25"]
  total = flatten_dict(load_loras(names, pipeline))
  for path, a in flatten_dict(tree).items():
    if path[-1] == "a":
      product = a @ flatten_dict(tree)[(*path[:-1], "b")]
      np.testing.assert_allclose(
        total[path] @ total[(*path[:-1], "b")], 1.25 * product, atol=1e-4
      )
  assert load_loras([], pipeline) == {}


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


def test_a_format_that_is_not_written_is_refused_before_the_model_is_read(tmp_path):
  file = write_csv(tmp_path / "p.csv", ["prompt", "image"], ["x", "x.webp"])
  options = RenderOptions(model="none", prompts=file, out=tmp_path / "out")
  with pytest.raises(InputError, match=r"image 'x.webp' is not a .png or .jpg"):
    render_csv(options)


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
