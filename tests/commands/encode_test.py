"""encode: the same cache whatever the layout, the interruptions and the processes."""

import shutil

import jax
import numpy as np
import pytest

from safetydpo_jax import encode
from safetydpo_jax.data.cache import encoding as moments
from safetydpo_jax.data.cache import records
from safetydpo_jax.data.images import load_image
from safetydpo_jax.data.sources import layouts
from safetydpo_jax.data.sources.pairs import SLOTS, SourcePair
from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.base_model.pipeline import load_pipeline
from tests.support.caches import PAIRS, contents, run
from tests.support.edits import edited_copy
from tests.support.lookalike import write_csv_layout, write_folder_layout


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
  return write_folder_layout(tmp_path_factory.mktemp("data") / "pairs", PAIRS)


@pytest.fixture(scope="module")
def cache(tiny_checkpoint, dataset, tmp_path_factory):
  return run(tiny_checkpoint, dataset, tmp_path_factory.mktemp("cache") / "cache")


@pytest.fixture(scope="module")
def pipeline(tiny_checkpoint):
  return load_pipeline(tiny_checkpoint, components=("vae",))


@pytest.fixture(scope="module")
def pixels(dataset, cache):
  """(pairs, 2, H, W, 3) float32 in [-1, 1], index 0 preferred."""
  pairs, _ = layouts.read_pairs(dataset)
  resolution = cache.manifest["resolution"]
  images = [
    [load_image(p.preferred, resolution), load_image(p.dispreferred, resolution)]
    for p in pairs
  ]
  return np.asarray(images, np.float32) / 127.5 - 1


@pytest.fixture(scope="module")
def encoded(pipeline, pixels):
  """(images…) → moments, straight through the VAE."""
  apply = jax.jit(
    lambda x: pipeline.vae.apply({"params": pipeline.params["vae"]}, x, method="encode")
  )

  def encode_all(images):
    flat = apply(images.reshape(-1, *images.shape[-3:]))
    return np.asarray(flat).reshape(*images.shape[:-3], *flat.shape[1:])

  return encode_all


def test_both_layouts_give_the_same_cache(tiny_checkpoint, cache, tmp_path):
  table = write_csv_layout(tmp_path / "table", PAIRS)
  run(tiny_checkpoint, table, tmp_path / "cache")
  assert contents(tmp_path / "cache") == contents(cache.path)


def test_records_are_the_images_moments_in_order(cache, encoded, pixels):
  stored = np.stack([cache[number]["moments"][0] for number in range(PAIRS)])
  np.testing.assert_allclose(stored, encoded(pixels), rtol=2e-3, atol=2e-3)


def test_the_flip_is_the_mirrored_image_encoded_and_not_mirrored_latents(
  cache, encoded, pixels
):
  stored = np.stack([cache[number]["moments"] for number in range(PAIRS)])
  np.testing.assert_allclose(
    stored[:, 1], encoded(pixels[..., ::-1, :]), rtol=2e-3, atol=2e-3
  )
  assert np.abs(stored[:, 1] - stored[:, 0, ..., ::-1, :]).max() > 0.1


def test_token_ids_are_the_captions(cache, pipeline):
  for number in range(PAIRS):
    captions = cache.about(number)["captions"]
    for slot, name in enumerate(SLOTS):
      (ids,) = pipeline.tokenize([captions[name]])
      np.testing.assert_array_equal(cache[number]["token_ids"][0, slot], ids[0])
  np.testing.assert_array_equal(cache.empty_token_ids, pipeline.tokenize([""])[0])


def test_a_missing_caption_is_zeros_and_no_slot(tiny_checkpoint, dataset, tmp_path):
  copy = shutil.copytree(dataset, tmp_path / "pairs")
  lines = (copy / "metadata.jsonl").read_text().splitlines()[:1]
  (copy / "metadata.jsonl").write_text(lines[0])
  cache = run(tiny_checkpoint, copy, tmp_path / "cache")
  assert cache.index[0].slots == ("unsafe",)
  assert cache[0]["token_ids"][0, 0].any()
  assert not cache[0]["token_ids"][0, 1].any()


def test_counts_say_what_became_of_every_row(cache):
  assert cache.manifest["counts"] == {
    "rows": 18,
    "pairs": 6,
    "captions": 12,
    "ties": 2,
    "repeated": 4,
    "skipped": 0,
    "uncategorised": 0,
    "other_categories": 0,
    "truncated": 0,
  }


def test_long_captions_are_cut_and_counted(pipeline, tmp_path):
  """A tokenizer's content is 75 tokens; one letter is one token here."""
  pairs = [
    SourcePair(str(n), tmp_path, tmp_path, ("q " * n, None), ())
    for n in (74, 75, 76, 200)
  ]
  token_ids, _, truncated = moments.tokenize(pipeline, pairs)
  assert token_ids.shape == (4, 1, 2, 77)
  assert truncated == 2, "75 fill the last place, and nothing is cut"


def test_the_cache_fits_its_model(cache, pipeline):
  records.check_cache_fits(cache, pipeline)


def test_a_category_is_kept_and_the_rest_counted(tiny_checkpoint, dataset, tmp_path):
  cache = run(tiny_checkpoint, dataset, tmp_path / "cache", "--category", "Violence")
  assert [entry.categories for entry in cache.index] == [("hate", "violence")]
  assert cache.manifest["counts"]["other_categories"] == PAIRS - 1
  assert cache.manifest["category"] == "violence"


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_the_batch_size_changes_no_record(
  tiny_checkpoint, dataset, cache, tmp_path, batch_size
):
  other = run(tiny_checkpoint, dataset, tmp_path / "c", "--batch_size", batch_size)
  for number in range(PAIRS):
    assert_close(other[number], cache[number], 2e-3)


def test_bfloat16_is_near(tiny_checkpoint, dataset, cache, tmp_path):
  other = run(tiny_checkpoint, dataset, tmp_path / "cache", "--dtype", "bfloat16")
  assert other.manifest["vae_dtype"] == "bfloat16"
  for number in range(PAIRS):
    assert_close(other[number], cache[number], 0.15)


def assert_close(record, other, tolerance):
  np.testing.assert_array_equal(record["token_ids"], other["token_ids"])
  np.testing.assert_allclose(
    record["moments"], other["moments"], rtol=tolerance, atol=tolerance
  )


def test_another_resolution(tiny_checkpoint, dataset, tmp_path):
  cache = run(tiny_checkpoint, dataset, tmp_path / "cache", "--resolution", 24)
  assert cache.latent_shape == (12, 12, 4)
  assert cache[0]["moments"].shape == (2, 2, 12, 12, 8)


def test_a_model_of_oblongs_needs_a_resolution(tiny_checkpoint, dataset, tmp_path):
  """Pairs are squares; a longer side would be a guess at what the user wants."""
  file, sizes = "unet/config.json", {"sample_size": [8, 12]}
  model = edited_copy(tiny_checkpoint, tmp_path / "model", file, **sizes)
  with pytest.raises(InputError, match=r"16 × 24 .*--resolution"):
    run(model, dataset, tmp_path / "cache")
  cache = run(model, dataset, tmp_path / "cache", "--resolution", 16)
  assert cache.latent_shape == (8, 8, 4)


WRONG = {
  "no dataset": ({"--pairs": "/nowhere/at/all"}, "--pairs /nowhere/at/all does not"),
  "resolution": ({"--resolution": "17"}, "--resolution 17 is not a multiple of 2"),
  "negative": ({"--resolution": "-16"}, "--resolution -16 is not a multiple"),
  "zero": ({"--resolution": "0"}, "--resolution 0 is not a multiple"),
  "batch": ({"--batch_size": "0"}, "--batch_size is 0; expected 1 or more"),
  "shards": ({"--shard_size": "0"}, "--shard_size is 0; expected 1 or more"),
  "category": ({"--category": "rude"}, "unknown category 'rude'; expected one of hate"),
  "absent": (
    {"--category": "self-harm"},
    "no pairs of category self_harm; it has .*hate",
  ),
  "out is a file": ({"--out": __file__}, "cannot make the folder .*File exists"),
  "out below a file": (
    {"--out": f"{__file__}/c"},
    "cannot make the folder .*Not a dir",
  ),
  "read-only": ({"--out": "/proc/cache"}, "cannot make the folder /proc/cache"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_wrong_input_is_named(tiny_checkpoint, dataset, tmp_path, change, message):
  arguments = {
    "--model": str(tiny_checkpoint),
    "--pairs": str(dataset),
    "--out": str(tmp_path / "cache"),
    **change,
  }
  with pytest.raises(InputError, match=message):
    encode.main([word for pair in arguments.items() for word in pair])
  assert not (tmp_path / "cache").exists()


def test_a_corrupt_image_is_named(tiny_checkpoint, dataset, tmp_path):
  copy = shutil.copytree(dataset, tmp_path / "pairs")
  file = copy / "u_idx_0000005_0.jpg"
  file.write_bytes(file.read_bytes()[:300])
  with pytest.raises(
    InputError, match=r"u_idx_0000005_0\.jpg cannot be read: .*[Tt]runc"
  ):
    run(tiny_checkpoint, copy, tmp_path / "cache")


def test_moments_that_overflow_are_named(
  tiny_checkpoint, dataset, tmp_path, monkeypatch
):
  def make_encoder(pipeline, batch_size):
    def overflow(images):
      moments = np.zeros((len(images), 2, 8, 8, 8), np.float16)
      moments[3, 1, 0, 0, 0] = np.inf
      return moments

    return overflow, 8

  monkeypatch.setattr(moments, "make_encoder", make_encoder)
  message = (
    r"moments of .*u_idx_0000001_0\.jpg are not finite.*--dtype float32.*fp16-fix"
  )
  with pytest.raises(InputError, match=message):
    run(tiny_checkpoint, dataset, tmp_path / "cache")


def test_help_shows_an_example(capsys):
  with pytest.raises(SystemExit):
    encode.main(["--help"])
  assert "python -m safetydpo_jax.encode --model" in capsys.readouterr().out
