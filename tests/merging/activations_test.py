"""Activations against a slow, obvious count, and what Co-Merge makes of them."""

import chex
import flax.linen as nn
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from safetydpo_jax import diffusion
from safetydpo_jax.data.cache.batches import Draw
from safetydpo_jax.merging import activations, comerge
from safetydpo_jax.merging.calibration import Batch
from safetydpo_jax.models import attention
from safetydpo_jax.models.clip import encode_text
from safetydpo_jax.runtime import sharding
from tests.support import caches, lookalike
from tests.support.experts import TO_V, make_experts, normal

TIMESTEPS = (100, 700)
PAIRS = [
  Draw(0, 0, (0, 0), False),
  Draw(3, 1, (0, 0), False),
  Draw(5, 0, (0, 0), False),
]
METHODS = list(comerge.METHODS)


@pytest.fixture(scope="module")
def cache(tiny_checkpoint, tmp_path_factory):
  folder = tmp_path_factory.mktemp("pairs")
  pairs = lookalike.write_csv_layout(folder / "pairs", pairs=8)
  return caches.run(tiny_checkpoint, pairs, folder / "cache")


@pytest.fixture(scope="module")
def measure(load, cache):
  def measure(loras, devices=8, batch_size=1, experts_at_once=1, pairs=PAIRS):
    return activations.measure(
      load(),
      loras,
      cache,
      pairs,
      TIMESTEPS,
      seed=4,
      batch_size=batch_size,
      mesh=sharding.make_mesh(devices=jax.devices()[:devices]),
      experts_at_once=experts_at_once,
    )

  return measure


@pytest.fixture(scope="module")
def measured(measure, experts):
  return measure(experts)


def slow_activations(pipeline, trees, cache, monkeypatch):
  """The UNet once for every expert and input, noting what each layer was given."""
  params, seen = pipeline.params, {}

  class Noting(attention.Dense):  # the UNet's Dense, with a notebook
    def __call__(self, x):
      seen["/".join(self.path)] = x[0]
      return super().__call__(x)

  @jax.jit
  def run(tree, unet, noisy, timestep, context):
    variables = {"params": unet, "lora": tree}
    pipeline.unet.apply(variables, noisy[None], timestep[None], context)
    return dict(seen)

  found = [[] for _ in trees]
  monkeypatch.setattr(attention, "Dense", Noting)
  for number, pair in enumerate(PAIRS):
    record = cache[pair.record]
    tokens = tuple(ids[None] for ids in record["token_ids"][:, pair.slot])
    context, _ = encode_text(pipeline.text_encoders, params, tokens)
    for timestep in TIMESTEPS:
      key = jax.random.fold_in(jax.random.key(4), number)
      keys = jax.random.split(jax.random.fold_in(key, timestep))
      moments = record["moments"][0]  # not mirrored
      shape = (*moments.shape[:-1], 4)
      latents = diffusion.posterior_sample(
        moments, jax.random.normal(keys[0], shape), pipeline.scaling_factor
      )
      noise = jax.random.normal(keys[1], shape[1:])
      alpha = pipeline.schedule.alphas_cumprod[timestep]
      for image in range(2):
        noisy = alpha**0.5 * latents[image] + (1 - alpha) ** 0.5 * noise
        for tree, rows in zip(trees, found):
          given = run(tree, params["unet"], noisy, np.int32(timestep), context)
          rows.append(count_by_hand(tree, jax.tree.map(np.asarray, given)))
  return [
    {path: np.stack([x[path] for x in rows]) for path in rows[0]} for rows in found
  ]


def count_by_hand(tree, seen):
  factors, means = flatten_dict(tree), {}
  for path in {path[:-1] for path in factors}:
    x = seen["/".join(path)]
    hidden = x @ factors[(*path, "a")]
    means[(*path, "a")] = np.abs(hidden).mean(0)
    means[(*path, "b")] = np.abs(hidden @ factors[(*path, "b")]).mean(0)
  return means


def test_activations_and_wins_are_those_of_a_slow_count(
  load, cache, experts, measured, monkeypatch
):
  slow = slow_activations(load(), experts, cache, monkeypatch)
  for ours, theirs in zip(measured, slow):
    chex.assert_trees_all_close(flatten_dict(ours), theirs, rtol=1e-4, atol=1e-6)
  wins = flatten_dict(comerge.count_wins(measured))
  for path, counts in wins.items():
    by_hand = np.zeros_like(counts)
    for i in range(2 * len(PAIRS) * len(TIMESTEPS)):
      for unit in range(counts.shape[1]):
        by_hand[max(range(3), key=lambda n: slow[n][path][i, unit]), unit] += 1
    np.testing.assert_array_equal(counts, by_hand)
  winners = {int(w) for counts in wins.values() for w in counts.argmax(0)}
  assert winners == {0, 1, 2}, "or the comparison says nothing"


@pytest.mark.parametrize(
  "how", [{"devices": 1}, {"batch_size": 3}, {"experts_at_once": 2}], ids=str
)
def test_devices_batches_and_experts_at_once_change_nothing(
  how, measure, measured, experts
):
  found = measure(experts, **how)
  chex.assert_trees_all_close(found, measured, rtol=1e-4, atol=1e-6)
  chex.assert_trees_all_equal(comerge.count_wins(found), comerge.count_wins(measured))


def test_an_expert_is_measured_alone_as_among_others(measure, measured, experts):
  """So that an eighth expert can join seven that were measured before."""
  alone = measure(experts[2:])
  chex.assert_trees_all_close(alone[0], measured[2], rtol=1e-4, atol=1e-6)


def test_a_pair_draws_what_it_draws_without_those_after_it(measure, measured, experts):
  fewer = measure(experts[:1], pairs=PAIRS[:2])
  rows = 2 * 2 * len(TIMESTEPS)
  first = jax.tree.map(lambda x: x[:rows], measured[0])
  chex.assert_trees_all_close(fewer[0], first, rtol=1e-4, atol=1e-6)


def test_experts_of_unequal_rank_are_measured_together(load, measure, experts):
  wide = make_experts(load().unet_shapes(), 1, rank=5)[0]
  found = measure([experts[0], wide])
  assert flatten_dict(found[0])[(*TO_V, "a")].shape[1] == 2
  assert flatten_dict(found[1])[(*TO_V, "a")].shape[1] == 5
  chex.assert_trees_all_close(found[1], measure([wide])[0], rtol=1e-4, atol=1e-6)


def test_the_unet_predicts_the_same_while_it_is_listened_to(load, experts):
  pipeline = load()
  variables = {"params": pipeline.params["unet"], "lora": experts[0]}
  rng = np.random.default_rng(0)
  inputs = normal(rng, (2, 8, 8, 4)), np.array([3, 700]), normal(rng, (2, 5, 24))

  @jax.jit
  def listen(variables, *inputs):
    with nn.intercept_methods(activations._capture):
      return pipeline.unet.apply(variables, *inputs, mutable=[activations.COLLECTION])

  heard, state = listen(variables, *inputs)
  plain = jax.jit(pipeline.unet.apply)(variables, *inputs)
  np.testing.assert_allclose(heard, plain, rtol=0, atol=1e-5)
  found = flatten_dict(state[activations.COLLECTION])
  assert found.keys() == flatten_dict(experts[0]).keys()


@pytest.mark.slow
def test_experts_that_wait_take_no_memory(load):
  """Seven in turn need little more than one, seven at once several times as much."""
  pipeline, mesh = load(), sharding.make_mesh(devices=jax.devices()[:1])
  one = make_experts(pipeline.unet_shapes(), 1)
  moments = np.zeros((4, 2, 8, 8, 8), np.float16)
  numbers = np.zeros(4, np.int32)
  batch = Batch(moments, (np.zeros((4, 77), np.int32),), numbers, numbers)

  def temporaries(count, experts_at_once):
    step = activations.make_measure(
      pipeline,
      mesh,
      sharding.base_shardings(mesh, pipeline.params),
      seed=0,
      experts_at_once=experts_at_once,
    )
    lowered = step.lower(activations.stack(one * count), pipeline.params, batch)
    return lowered.compile().memory_analysis().temp_size_in_bytes

  alone = temporaries(1, 1)
  assert temporaries(7, 1) < 1.5 * alone
  assert temporaries(7, 7) > 3 * alone


@pytest.mark.parametrize("method", METHODS)
def test_one_expert_is_itself(method, experts, measured):
  merged = comerge.METHODS[method].merge(experts[:1], measured[:1])
  chex.assert_trees_all_equal(merged, experts[0])


@pytest.mark.parametrize("method", METHODS)
def test_identical_experts_are_that_expert(method, experts, measured):
  merged = comerge.METHODS[method].merge([experts[1]] * 3, [measured[1]] * 3)
  one, other = (flatten_dict(x) for x in (merged, experts[1]))
  for path in (path[:-1] for path in other if path[-1] == "a"):
    products = [x[(*path, "a")] @ x[(*path, "b")] for x in (one, other)]
    np.testing.assert_allclose(*products, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_unit_that_one_expert_alone_activates_is_that_experts(
  method, experts, measure
):
  """Expert 1 keeps one output column, which the others have at zero."""
  path, unit, loras = (*TO_V, "b"), 5, []
  for n, tree in enumerate(experts):
    flat = flatten_dict(tree)
    keep = (np.arange(flat[path].shape[1]) == unit) == (n == 1)
    loras.append(unflatten_dict({**flat, path: flat[path] * keep[None]}))
  merged = flatten_dict(comerge.METHODS[method].merge(loras, measure(loras)))
  column = merged[path][:, unit].reshape(-1, 2)  # (experts or 1, rank)
  wanted = flatten_dict(experts[1])[path][:, unit]
  np.testing.assert_array_equal(column.sum(0), wanted)


def turn(tree, seed):
  """Another split of the same products: (a R) (R⁻¹ b)."""
  mix = np.random.default_rng(seed).standard_normal((2, 2)) + 2 * np.eye(2)
  mix, back = (x.astype(np.float32) for x in (mix, np.linalg.inv(mix)))
  return unflatten_dict(
    {
      path: leaf @ mix if path[-1] == "a" else back @ leaf
      for path, leaf in flatten_dict(tree).items()
    }
  )


def test_the_split_into_factors_matters_to_factors_and_not_to_the_product(
  experts, measure, measured
):
  """Why factor-level merging needs experts of one LoRA seed."""
  turned = [turn(experts[0], 7), *experts[1:]]
  heard = measure(turned)
  differences = {}
  for method, reading in comerge.METHODS.items():
    one, other = (
      flatten_dict(reading.merge(loras, found))
      for loras, found in ((experts, measured), (turned, heard))
    )
    differences[method] = max(
      np.abs(one[p] @ one[(*p[:-1], "b")] - other[p] @ other[(*p[:-1], "b")]).max()
      for p in one
      if p[-1] == "a"
    )
  assert differences["co_merge_product"] < 1e-4
  assert differences["co_merge_factor"] > 0.1
