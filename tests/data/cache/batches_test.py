"""Batches: everything about them follows from the seed and the step."""

import dataclasses

import chex
import numpy as np
import pytest

from benchmarks.data_pipeline import write_cache
from safetydpo_jax.data.cache import batches, records
from safetydpo_jax.errors import InputError

PAIRS = 14
EXAMPLES = 2 * PAIRS


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  path = tmp_path_factory.mktemp("data") / "cache"
  return records.open_cache(
    write_cache(path, PAIRS, latent_shape=(2, 2, 4), encoders=2, shard_size=4)
  )


def read(cache, **options):
  """All batches of a small run; by default without randomness but the order."""
  defaults = {
    "category": None,
    "mixture": "both",
    "batch_size": 4,
    "seed": 1,
    "start_step": 0,
    "steps": EXAMPLES // 4,
    "caption_dropout": 0.0,
    "flip": "none",
  }
  return list(batches.train_batches(cache, **{**defaults, **options}))


def joined(*rows):
  """Batches one after the other, as one."""
  moments = np.concatenate([batch.moments for batch in rows])
  encoders = zip(*(batch.token_ids for batch in rows))
  time_ids = np.concatenate([batch.time_ids for batch in rows])
  return batches.Batch(moments, tuple(map(np.concatenate, encoders)), time_ids)


def identify(cache, batch):
  """[(record, slot)] by looking the batch's content up in the cache."""
  found = []
  for row in range(len(batch.moments)):
    ids = np.stack([encoder[row] for encoder in batch.token_ids])
    found += [
      (number, slot)
      for number in range(len(cache))
      for slot in (0, 1)
      if (cache[number]["moments"][0] == batch.moments[row]).all()
      and (cache[number]["token_ids"][:, slot] == ids).all()
    ]
  return found


def test_a_batch_has_the_promised_shapes(cache):
  for batch in read(cache):
    chex.assert_shape(batch.moments, (4, 2, 2, 2, 8))
    assert batch.moments.dtype == np.float16
    chex.assert_shape(batch.token_ids, (4, 77))
    assert [ids.dtype for ids in batch.token_ids] == [np.int32] * 2
    # Two encoders: SDXL. The side of 2 latents is 16 pixels here.
    np.testing.assert_array_equal(batch.time_ids, [[16, 16, 0, 0, 16, 16]] * 4)


def test_a_family_with_one_text_encoder_has_no_time_ids(tmp_path):
  path = write_cache(tmp_path / "cache", PAIRS, latent_shape=(2, 2, 4), encoders=1)
  assert all(batch.time_ids is None for batch in read(records.open_cache(path)))


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_every_example_comes_once_an_epoch_over_all_hosts(cache, hosts):
  epochs = [
    read(cache, rows=host, steps=2 * EXAMPLES // 4, threads=1)
    for host in np.arange(4).reshape(hosts, -1)
  ]
  for epoch in (0, 1):
    half = slice(epoch * EXAMPLES // 4, (epoch + 1) * EXAMPLES // 4)
    seen = [identify(cache, batch) for host in epochs for batch in host[half]]
    examples = [example for batch in seen for example in batch]
    assert sorted(examples) == [(n, s) for n in range(PAIRS) for s in (0, 1)]


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_together_see_what_one_host_sees(cache, hosts):
  options = {"caption_dropout": 0.5, "flip": "independent", "steps": 20}
  parts = [
    read(cache, rows=host, **options) for host in np.arange(4).reshape(hosts, -1)
  ]
  for whole, *rows in zip(read(cache, **options), *parts, strict=True):
    chex.assert_trees_all_equal(joined(*rows), whole)


def test_a_resumed_run_sees_what_it_would_have_seen(cache):
  options = {"caption_dropout": 0.5, "flip": "independent", "steps": 20}
  whole = read(cache, **options)
  for start in (1, 7, 19):
    resumed = read(cache, start_step=start, **options)
    chex.assert_trees_all_equal(resumed, whole[start:])
  assert read(cache, start_step=20, **options) == []


def test_threads_do_not_change_the_order(cache):
  one, four = (read(cache, threads=threads, steps=50) for threads in (1, 4))
  chex.assert_trees_all_equal(one, four)


def test_epochs_and_seeds_have_orders_of_their_own(cache):
  steps = EXAMPLES // 4
  order = [identify(cache, batch) for batch in read(cache, steps=2 * steps)]
  other = [identify(cache, batch) for batch in read(cache, seed=2)]
  assert order[:steps] != order[steps:]
  assert order[:steps] != other
  assert order[steps:] != other, "the next seed is not the next epoch"


def test_a_batch_larger_than_an_epoch_wraps_around(cache):
  (batch,) = read(cache, batch_size=2 * EXAMPLES, steps=1)
  seen = identify(cache, batch)
  for epoch in (seen[:EXAMPLES], seen[EXAMPLES:]):
    assert len(set(epoch)) == EXAMPLES


@pytest.mark.parametrize(("mixture", "slot"), [("unsafe", 0), ("safe", 1)])
def test_a_mixture_of_one_caption_has_only_that(cache, mixture, slot):
  for batch in read(cache, mixture=mixture):
    assert {s for _, s in identify(cache, batch)} == {slot}


def test_a_category_has_only_its_pairs(cache):
  for batch in read(cache, category="hate"):
    for number, _ in identify(cache, batch):
      assert "hate" in cache.index[number].categories


def test_training_and_holdout_share_no_pair_and_miss_none(cache):
  parts = [
    {
      number
      for batch in read(cache, held_out=0.4, part=part, batch_size=1, steps=EXAMPLES)
      for number, _ in identify(cache, batch)
    }
    for part in ("train", "holdout")
  ]
  assert all(parts)
  assert not parts[0] & parts[1]
  assert parts[0] | parts[1] == set(range(PAIRS))


def draw(flip="independent", caption_dropout=0.2, count=4000, seed=0):
  places = batches.draws(
    np.asarray([[3, 1]]), seed=seed, caption_dropout=caption_dropout, flip=flip
  )
  return [places[g] for g in range(count)]


def test_captions_are_dropped_at_the_rate_asked_for():
  # 4,000 draws: the standard deviation of the rate is 0.006.
  assert np.mean([d.drop for d in draw()]) == pytest.approx(0.2, abs=0.025)
  assert not any(d.drop for d in draw(caption_dropout=0.0))
  assert all(d.drop for d in draw(caption_dropout=1.0))


def test_flips_are_fair_and_independent_of_each_other_and_of_dropout():
  # Eight outcomes of 4,000 draws; four standard deviations of a quarter are 0.027.
  flips = np.asarray([d.flips for d in draw()])
  drops = np.asarray([d.drop for d in draw()])
  for outcome in np.ndindex(2, 2):
    assert (flips == outcome).all(1).mean() == pytest.approx(0.25, abs=0.03)
    assert (flips[drops] == outcome).all(1).mean() == pytest.approx(0.25, abs=0.065)


def test_shared_flips_agree_and_none_are_none():
  shared = np.asarray([d.flips for d in draw("shared")])
  assert (shared[:, 0] == shared[:, 1]).all()
  assert shared.mean() == pytest.approx(0.5, abs=0.035)
  assert not np.any([d.flips for d in draw("none")])


def test_one_option_leaves_the_draws_of_the_others():
  assert [d.drop for d in draw("none")] == [d.drop for d in draw("independent")]
  assert [d.flips for d in draw()] == [d.flips for d in draw(caption_dropout=0.9)]
  assert [d.flips for d in draw(seed=0)] != [d.flips for d in draw(seed=1)]


def test_a_row_is_the_flips_and_caption_that_were_drawn(cache):
  rows = [
    batches.Draw(record, slot, flips, drop)
    for record, (slot, drop, *flips) in enumerate(np.ndindex(2, 2, 2, 2))
    if record < PAIRS
  ]
  batch = batches.assemble(cache, rows, cache.empty_token_ids)
  for row, (record, slot, flips, drop) in enumerate(rows):
    content = cache[record]
    for side in (0, 1):
      np.testing.assert_array_equal(
        batch.moments[row, side], content["moments"][flips[side], side]
      )
    expected = cache.empty_token_ids if drop else content["token_ids"][:, slot]
    ids = np.stack([encoder[row] for encoder in batch.token_ids])
    np.testing.assert_array_equal(ids, expected)


WRONG = {
  "no batch": ({"batch_size": 0}, "batch_size is 0; expected 1"),
  "flip": ({"flip": "both"}, "unknown flip 'both'; expected one of independent, "),
  "dropout": ({"caption_dropout": 1.5}, "caption_dropout is 1.5; expected 0 to 1"),
  "seed": ({"seed": -1}, "seed is -1; expected 0"),
  "holdout": ({"held_out": 1.0}, "holdout is 1.0; expected 0"),
  "category": ({"category": "rude"}, "unknown category"),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_named(cache, options, message):
  with pytest.raises(InputError, match=message):
    read(cache, **options)


class Broken:
  """An ArrayRecord source whose checksums do not agree."""

  def __getitem__(self, number):
    raise RuntimeError("hash mismatch")


def test_a_damaged_record_is_named_by_the_batch_that_reads_it(cache):
  with pytest.raises(InputError, match=r"arrayrecord is damaged \(hash mismatch\)"):
    read(dataclasses.replace(cache, _source=Broken()))
