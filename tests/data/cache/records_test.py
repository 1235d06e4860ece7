"""Pair caches: opened whole, or refused with the reason."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.data_pipeline import write_cache
from safetydpo_jax.data.cache import records
from safetydpo_jax.errors import InputError


@pytest.fixture
def path(tmp_path):
  return write_cache(tmp_path / "cache", pairs=14, latent_shape=(4, 4, 4), shard_size=6)


def edit(path, **changes):
  file = path / "cache.json"
  file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_cache_opens_with_everything_in_it(path):
  cache = records.open_cache(path)
  assert len(cache) == 14
  assert cache.latent_shape == (4, 4, 4)
  assert cache.empty_token_ids.shape == (1, 77)
  for number in (0, 6, 13):
    assert cache[number]["moments"].shape == (2, 2, 4, 4, 8)
    assert cache.about(number)["id"] == cache.index[number].id == f"pair {number}"


def test_fingerprints_tell_settings_apart(path, tmp_path):
  same = write_cache(tmp_path / "same", 14, (4, 4, 4), shard_size=6)
  other = write_cache(tmp_path / "other", 14, (4, 4, 4), shard_size=7)
  prints = [records.open_cache(p).fingerprint for p in (path, same, other)]
  assert prints[0] == prints[1] != prints[2]


@pytest.fixture
def cache(path):
  """Records 0..2: both captions of two categories, the unsafe only, the safe only."""
  index = (
    records.Entry("0", ("hate", "violence"), ("unsafe", "safe")),
    records.Entry("1", ("hate",), ("unsafe",)),
    records.Entry("2", (), ("safe",)),
  )
  return dataclasses.replace(records.open_cache(path), index=index)


SELECTIONS = {
  "everything": (None, "both", [(0, 0), (0, 1), (1, 0), (2, 1)]),
  "all": ("all", "both", [(0, 0), (0, 1), (1, 0), (2, 1)]),
  "empty": ("", "both", [(0, 0), (0, 1), (1, 0), (2, 1)]),
  "category": ("hate", "both", [(0, 0), (0, 1), (1, 0)]),
  "second category": ("Violence", "both", [(0, 0), (0, 1)]),
  "unsafe": (None, "unsafe", [(0, 0), (1, 0)]),
  "safe": (None, "safe", [(0, 1), (2, 1)]),
  "both filters": ("hate", "safe", [(0, 1)]),
}


@pytest.mark.parametrize(
  ("category", "mixture", "examples"), SELECTIONS.values(), ids=SELECTIONS
)
def test_examples_of_a_category_and_mixture(cache, category, mixture, examples):
  np.testing.assert_array_equal(cache.select(category, mixture), examples)
  pairs = len({number for number, _ in examples})
  assert cache.count(category, mixture) == (pairs, len(examples))


def test_held_out_pairs_are_one_part_and_training_has_the_others(path):
  cache = records.open_cache(path)
  whole = cache.select()
  train, apart = (cache.select(held_out=0.3, part=part) for part in records.PARTS)
  assert 0 < len(apart) < len(train)
  assert sorted(map(tuple, [*train, *apart])) == sorted(map(tuple, whole))
  assert not {*train[:, 0]} & {*apart[:, 0]}, "both captions of a pair stay together"
  assert cache.count(None, "both", 0.3) == (len(train) // 2, len(train))


EMPTY = {
  "no such category": ("rude", "both", "unknown category 'rude'"),
  "none of it": (
    "self-harm",
    "both",
    r"no examples of category self_harm.*hate 2, viol",
  ),
  "mixture": (None, "neither", "unknown mixture 'neither'; expected one of both,"),
}


@pytest.mark.parametrize(("category", "mixture", "message"), EMPTY.values(), ids=EMPTY)
def test_an_empty_selection_says_what_is_there(cache, category, mixture, message):
  with pytest.raises(InputError, match=message):
    cache.select(category, mixture)


def test_a_manifest_cannot_name_files_outside_the_cache(path, tmp_path):
  outside = shard(path, 0).rename(tmp_path / "outside.arrayrecord")
  table = json.loads((path / "cache.json").read_text())["shards"]
  for name in ("../outside.arrayrecord", str(outside)):
    edit(path, shards=[{**table[0], "file": name}, *table[1:]])
    with pytest.raises(InputError, match=r"lacks outside\.arrayrecord"):
      records.open_cache(path)


def test_an_empty_part_says_so(path):
  cache = records.open_cache(path)
  with pytest.raises(InputError, match=r"in the holdout part at holdout 1e-09; its 14"):
    cache.select(held_out=1e-9, part="holdout")
  with pytest.raises(InputError, match="unknown part 'test'; expected train or"):
    cache.select(part="test")


def shard(path, number):
  return sorted(path.glob("pairs-*"))[number]


def truncate(file):
  file.write_bytes(file.read_bytes()[:-5000])


DAMAGE = {
  "no cache": (lambda p: (p / "cache.json").unlink(), "a pair cache: .* cache.json"),
  "unfinished": (
    lambda p: (p / "cache.json").rename(p / "plan.json"),
    "is an unfinished pair cache; run the same encode command again",
  ),
  "broken manifest": (
    lambda p: (p / "cache.json").write_text("{"),
    "read .*cache.json, .* pair cache: ",
  ),
  "version": (lambda p: edit(p, format=99), "has format 99, this version reads 1"),
  "list": (lambda p: (p / "cache.json").write_text("[]"), "has format None"),
  "no shards": (lambda p: edit(p, shards=None), r"cache\.json is damaged"),
  "no fields": (lambda p: edit(p, fields=[1]), r"cache\.json is damaged"),
  "missing shard": (
    lambda p: shard(p, 1).unlink(),
    r"lacks pairs-00001-of-00003.arrayrecord; run the same",
  ),
  "truncated": (
    lambda p: truncate(shard(p, 1)),
    r"pairs-00001\S* is damaged \(.*delete",
  ),
  "garbage": (lambda p: shard(p, 0).write_bytes(b"x" * 99999), "is damaged"),
  "swapped": (
    lambda p: shard(p, 2).rename(shard(p, 1)),
    r"lacks pairs-00002",
  ),
  "other length": (
    lambda p: shard(p, 1).write_bytes(shard(p, 2).read_bytes()),
    "pairs-00001.* damaged .2 records instead of 6",
  ),
  "no index": (lambda p: (p / "index.jsonl").unlink(), "index.jsonl is damaged"),
  "short index": (
    lambda p: (p / "index.jsonl").write_text('{"id":"","categories":[],"slots":[]}\n'),
    "1 lines for 14 records",
  ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_cache_is_refused_with_what_to_do(path, damage, message):
  damage(path)
  with pytest.raises(InputError, match=message):
    records.open_cache(path)


def test_a_damaged_record_is_found_when_it_is_read(tmp_path):
  path = write_cache(tmp_path / "cache", pairs=3, latent_shape=(64, 64, 4))
  content = bytearray(shard(path, 0).read_bytes())
  content[len(content) // 2] ^= 1
  shard(path, 0).write_bytes(content)
  cache = records.open_cache(path)
  with pytest.raises(InputError, match=r"pairs-00000\S* is damaged"):
    [cache[number] for number in range(3)]


def test_a_damaged_record_names_its_shard_also_when_shards_differ_in_size(path):
  cache = records.open_cache(path)

  class Broken:
    def __getitem__(self, number):
      raise RuntimeError("hash mismatch")

  sizes = [{"file": name, "records": n} for name, n in (("a", 1), ("b", 0), ("c", 13))]
  about = {**cache.manifest, "shards": sizes}
  broken = dataclasses.replace(cache, manifest=about, _source=Broken())
  for number, name in ((0, "a"), (1, "c"), (13, "c")):
    with pytest.raises(InputError, match=rf"/{name} is damaged \(hash mismatch\)"):
      broken[number]


@pytest.fixture
def pipeline():
  """What `check_cache_fits` reads of a pipeline that fits."""
  return SimpleNamespace(
    name="m",
    fingerprint="synthetic",
    latent_channels=4,
    vae_scale=8,
    text_encoders=(None,),
    scaling_factor=0.18215,
    tokenize=lambda captions: (np.full((len(captions), 77), 49407),),
  )


MISFITS = {
  "fingerprint": ("other", "the base model's fingerprint synthetic and other"),
  "latent_channels": (16, "latent channels 4 and 16"),
  "vae_scale": (4, "pixels per latent 8 and 4"),
  "scaling_factor": (1.0, "the VAE's scaling factor 0.18215 and 1.0"),
  "tokenize": (
    lambda captions: (np.zeros((len(captions), 77), int),),
    "an empty caption's first and last token",
  ),
  "text_encoders": ((None, None), "text encoders 1 and 2"),
}


def test_a_cache_fits_the_model_it_was_encoded_with(path, pipeline):
  records.check_cache_fits(records.open_cache(path), pipeline)


@pytest.mark.parametrize("name", MISFITS)
def test_a_cache_of_another_model_is_refused(path, pipeline, name):
  value, message = MISFITS[name]
  setattr(pipeline, name, value)
  with pytest.raises(InputError, match=f"synthetic, which does not fit m: {message}"):
    records.check_cache_fits(records.open_cache(path), pipeline)


def test_a_cache_of_one_category_is_not_taken_for_another(path):
  edit(path, category="hate")
  cache = records.open_cache(path)
  assert len(cache.select("hate")) > 0
  for category in (None, "violence"):
    with pytest.raises(InputError, match="holds only hate"):
      cache.select(category)
