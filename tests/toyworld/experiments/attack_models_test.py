"""White-box attacks on the toy model: the objective, the words, the figures."""

import csv
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from safetydpo_jax import generate
from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.base_model.pipeline import load_pipeline
from safetydpo_jax.metrics.intervals import wilson
from safetydpo_jax.toyworld import attack, prompts
from safetydpo_jax.toyworld.experiments import adversary, aims, attack_figures
from safetydpo_jax.toyworld.world import detector, scenes
from safetydpo_jax.toyworld.world.symbols import CONCEPTS

SLOTS = 3


@pytest.fixture(scope="module")
def toy():
  return load_pipeline("toy")


@pytest.fixture(scope="module")
def vocabulary(toy):
  return adversary.attackable_words(toy.tokenizers[0])


@pytest.fixture(scope="module")
def test_csv(tmp_path_factory):
  file = tmp_path_factory.mktemp("prompts") / "test.csv"
  prompts.main(["--kind", "test", "--per_category", "2", "--out", str(file)])
  return file


def make_task(toy, count=2):
  pairs = scenes.prompt_pairs(count, 0, "hate")
  wanted = [aims.Aim(None, pair.scene, pair.concept) for pair in pairs]
  latents = aims.encode_pictures(toy, toy.params, wanted)
  texts = [scenes.caption(pair.scene) for pair in pairs]
  return adversary.make_task(toy, texts, latents, SLOTS)


def make_attacks(toy, vocabulary):
  return adversary.make_attacks(
    toy,
    vocabulary,
    optax.adam(0.05),
    draws_per_step=2,
    candidates=4,
    sampler_steps=2,
    guidance=4.0,
  )


def padding_words(toy, task):
  return jnp.full(task.slots.shape, toy.tokenizers[0].eos_token_id, jnp.int32)


def error_on(toy, task, key):
  noise, times = adversary.draws(key, task.latents.shape, 2, 1000)
  # The parameters are an argument: as constants they would be compiled for minutes.
  error = jax.jit(
    lambda params, noise, times, words, offsets: adversary.denoising_error(
      toy, params, {}, task, words, offsets, noise, times
    )
  )
  return functools.partial(error, toy.params, noise, times)


def test_every_word_of_the_grammar_is_free_and_no_piece_of_one(toy, vocabulary):
  tokenizer = toy.tokenizers[0]
  texts = {adversary.spell(tokenizer, [word]) for word in vocabulary}
  assert texts >= set(scenes.vocabulary())
  assert len(texts) == len(vocabulary)
  assert not set(tokenizer.all_special_ids) & set(vocabulary.tolist())
  pieces = [i for t, i in tokenizer.get_vocab().items() if not t.endswith("</w>")]
  assert not set(pieces) & set(vocabulary.tolist())
  assert all(text.isprintable() for text in texts)


def test_words_found_are_tokenized_to_themselves_after_any_prompt(toy, vocabulary):
  words = np.random.default_rng(0).choice(vocabulary, (200, SLOTS))
  scene = scenes.caption(scenes.all_scenes()[-1])
  texts = [f"{scene} {adversary.spell(toy.tokenizers[0], row)}" for row in words]
  (ids,) = toy.tokenize(texts)
  first = len(scene.split()) + 1
  np.testing.assert_array_equal(ids[:, first : first + SLOTS], words)


def test_slots_begin_where_the_prompt_ends(toy):
  task = make_task(toy)
  ids = np.asarray(task.token_ids)
  padding = toy.tokenizers[0].eos_token_id
  for row, places in zip(ids, np.asarray(task.slots)):
    assert row[places[0] - 1] != padding
    assert (row[places] == padding).all()
    assert places[-1] + 1 < len(row)  # an end token stays
  words = adversary.put(task.token_ids, task.slots, jnp.full((2, SLOTS), 7))
  assert (np.asarray(words) == 7).sum() == 2 * SLOTS


def test_timesteps_are_spread_over_the_schedule_for_each_prompt():
  _, times = adversary.draws(jax.random.key(0), (50, 1, 1, 1), 4, 1000)
  np.testing.assert_array_equal(np.asarray(times) // 250, np.tile(range(4), (50, 1)))


def test_the_gradient_is_that_of_finite_differences(toy):
  task = make_task(toy)
  error = error_on(toy, task, jax.random.key(1))
  words = padding_words(toy, task)
  start = 0.3 * jax.random.normal(jax.random.key(2), (*task.slots.shape, 96))
  gradient = jax.grad(lambda offsets: error(words, offsets).sum())(start)
  length = jnp.linalg.norm(gradient, axis=(1, 2))
  step = 0.05 * gradient / length[:, None, None]
  slope = (error(words, start + step) - error(words, start - step)) / 0.1
  np.testing.assert_allclose(slope, length, rtol=0.03)


def test_a_step_of_embeddings_lowers_the_error_of_each_prompt(toy, vocabulary):
  task = make_task(toy)
  attacks = make_attacks(toy, vocabulary)
  zeros = jnp.zeros((*task.slots.shape, 96))
  carry = zeros, optax.adam(0.05).init(zeros)
  key = jax.random.key(3)
  offsets, _ = attacks.embedding_step(toy.params, {}, task, carry, key)
  error = error_on(toy, task, key)
  words = padding_words(toy, task)
  assert (error(words, offsets) < error(words, zeros)).all()


def test_a_step_of_words_keeps_to_words_and_never_raises_the_error(toy, vocabulary):
  task = make_task(toy)
  attacks = make_attacks(toy, vocabulary)
  zeros = jnp.zeros((*task.slots.shape, 96))
  words = padding_words(toy, task)
  padding = int(words[0, 0])
  for step in range(4):
    key = jax.random.key(step)
    new = attacks.word_step(toy.params, {}, task, words, key)
    error = error_on(toy, task, jax.random.split(key, 3)[0])
    assert (error(new, zeros) <= error(words, zeros) + 1e-6).all()
    assert ((new != words).sum(axis=1) <= 1).all()
    words = new
    for row in np.asarray(words):
      length = int((row != padding).sum())
      assert (row[length:] == padding).all()
      assert np.isin(row[:length], vocabulary).all()
  assert (words != padding).any()


def run(test_csv, out, *more):
  words = ["--model", "toy", "--prompts", str(test_csv), "--out", str(out)]
  small = ["--count", "2", "--sampler_steps", "2", "--draws", "2", "--candidates", "4"]
  attack.main([*words, *small, "--slots", str(SLOTS), *more])
  return json.loads((out / "attack.json").read_text())


def pixels(folder):
  return np.stack(
    [np.asarray(Image.open(f), int) for f in sorted(folder.glob("*.png"))]
  )


def test_an_attack_of_no_steps_is_the_safe_prompt_as_generate_draws_it(
  test_csv, tmp_path
):
  figures = run(test_csv, tmp_path / "a", "--embedding_steps", "0", "--word_steps", "0")
  rows = {row["kind"]: row["prompts"] for row in figures["models"][0]["rates"]}
  for kind in ("asked", "words", "random_words"):
    file = tmp_path / f"{kind}.csv"
    fields = ("prompt", "evaluation_seed")
    with open(file, "w", newline="", encoding="utf-8") as lines:
      writer = csv.DictWriter(lines, fields, extrasaction="ignore")
      writer.writeheader()
      writer.writerows(rows[kind.replace("_", " ")])
    arguments = ["--model", "toy", "--prompts", str(file)]
    sampler = ["--steps", "2", "--guidance", "4", "--batch_size", "1"]
    generate.main([*arguments, *sampler, "--out", str(tmp_path / kind)])
    ours = pixels(tmp_path / "a/images/base" / kind)
    assert np.abs(ours - pixels(tmp_path / kind)).max() <= 1
  plain = pixels(tmp_path / "words")
  for kind in ("embeddings", "random_embeddings"):
    assert np.abs(pixels(tmp_path / "a/images/base" / kind) - plain).max() <= 1
  safe = [scenes.caption(scenes.parse(row["prompt"])[0]) for row in rows["asked"]]
  assert [row["prompt"] for row in rows["words"]] == safe


def test_what_is_written_says_what_was_done(test_csv, tmp_path, capsys):
  figures = run(
    test_csv, tmp_path / "out", "--embedding_steps", "1", "--word_steps", "1"
  )
  assert figures["base"] == load_pipeline("toy", components=()).fingerprint
  assert figures["threshold"] == detector.THRESHOLD
  settings = ("count", "slots", "embedding_steps", "word_steps", "guidance", "seed")
  assert [figures[name] for name in settings] == [2, SLOTS, 1, 1, 4.0, 0]
  (base,) = figures["models"]
  kinds = ["asked", "random embeddings", "embeddings", "random words", "words"]
  assert [row["kind"] for row in base["rates"]] == kinds
  assert base["lora"] is None
  for row in base["rates"]:
    for share in (row["asked"], row["any"]):
      ends = wilson(share["count"] / 2, 2)
      assert (share["low"], share["high"]) == pytest.approx(ends, abs=1e-6)
  said = capsys.readouterr().out
  rows = [re.split(r" *\| *", line) for line in said.splitlines()]
  assert [row[1:3] for row in rows if row[1:2] == ["base"]] == [
    ["base", kind] for kind in kinds
  ]
  with Image.open(tmp_path / "out/sheet.png") as picture:
    assert picture.format == "PNG"
  with pytest.raises(InputError, match="choose another --out"):
    run(test_csv, tmp_path / "out")


def test_a_rate_tells_the_symbol_asked_for_from_any():
  scene = scenes.all_scenes()[0]
  drawn = [CONCEPTS[3], CONCEPTS[5], None, CONCEPTS[3]]
  pictures = np.stack([scenes.render(scene, concept) for concept in drawn])
  asked = [("text", seed, CONCEPTS[3]) for seed in range(4)]
  rates = attack_figures.rates("words", asked, pictures)
  assert (rates["n"], rates["asked"]["count"], rates["any"]["count"]) == (4, 2, 3)
  found = [row["found"] for row in rates["prompts"]]
  assert found == [concept and concept.word for concept in drawn]


def test_unsafe_prompts_are_taken_from_the_whole_csv(test_csv, tmp_path):
  wanted = aims.read_aims(test_csv, tmp_path, 7)
  assert len({aim.concept.category for aim in wanted}) == 7
  assert len(aims.read_aims(test_csv, tmp_path, 99)) == 14


@pytest.mark.parametrize(
  ("more", "message"),
  [
    (["--count", "0"], "--count is 0; expected 1 or more"),
    (["--word_steps", "-1"], "--word_steps is -1; expected 0 or more"),
    (["--learning_rate", "nan"], "--learning_rate is nan"),
    (["--guidance", "inf"], "--guidance is inf"),
    (["--seed", "-1"], "--seed is -1"),
    (["--slots", "20"], "--slots is 20; expected 1 to"),
    (["--lora", "nowhere"], "no LoRA at nowhere"),
    (["--sampler_steps", "0"], "steps"),
  ],
)
def test_bad_options_are_one_line(test_csv, tmp_path, more, message):
  with pytest.raises(InputError) as caught:
    run(test_csv, tmp_path / "out", *more)
  assert message in str(caught.value)
  assert "\n" not in str(caught.value)


def test_prompts_without_a_symbol_are_refused(tmp_path):
  file = tmp_path / "safe.csv"
  file.write_text(f"prompt\n{scenes.caption(scenes.all_scenes()[0])}\n")
  with pytest.raises(InputError, match="no prompt that asks for a symbol"):
    aims.read_aims(file, tmp_path, 3)
  file.write_text("prompt\na cat\n")
  with pytest.raises(InputError, match="meanings here"):
    aims.read_aims(file, tmp_path, 3)


@pytest.mark.slow
def test_the_attacks_bring_symbols_back_where_chance_does_not(test_csv, tmp_path):
  arguments = ["--model", "toy", "--prompts", str(test_csv), "--count", "7"]
  attack.main([*arguments, "--out", str(tmp_path / "out")])
  figures = json.loads((tmp_path / "out/attack.json").read_text())
  rates = {row["kind"]: row for row in figures["models"][0]["rates"]}
  assert rates["asked"]["asked"]["count"] == 7
  assert rates["random embeddings"]["asked"]["count"] == 0
  assert rates["embeddings"]["asked"]["count"] >= 4
  assert rates["words"]["asked"]["count"] >= 4
