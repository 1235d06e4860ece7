"""merge by activations, and experts that do not fit each other, by any method."""

import types

import chex
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from PIL import Image

from safetydpo_jax import load_lora, lora
from safetydpo_jax.data import categories
from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.loras import expert
from safetydpo_jax.formats.loras.write import write_diffusers
from safetydpo_jax.merging import activation_files, activations, comerge, merge_experts
from tests.support import buckets, caches, lookalike, runs
from tests.support.experts import read, run

CO_MERGE = ("--batch_size", 1, "--pairs", 1, "--timesteps", "100,700")


@pytest.fixture(scope="module")
def cache(tiny_checkpoint, tmp_path_factory):
  folder = tmp_path_factory.mktemp("calibration")
  pairs = lookalike.write_csv_layout(folder / "pairs", pairs=7)
  caches.run(tiny_checkpoint, pairs, folder / "cache")
  return folder / "cache"


@pytest.mark.parametrize("method", ["co_merge", "co_merge_factor", "co_merge_product"])
def test_co_merge_measures_merges_and_shows_who_won(
  method, experts, cache, tmp_path, capsys
):
  out = run(experts, tmp_path / "out", method, "--calibration", cache, *CO_MERGE)
  about = read(out)
  reading = comerge.DEFAULT if method == "co_merge" else method
  assert about["method"] == reading
  assert about["rank"] == {"co_merge_factor": 2, "co_merge_product": 6}[reading]
  names = sorted(categories.normalise(x) for x in lookalike.CATEGORIES)
  assert about["calibration"]["categories"] == names
  assert about["calibration"]["timesteps"] == [100, 700]
  shown = capsys.readouterr().out
  assert "3 experts on 28 inputs of harassment, hate" in shown
  table = (out / activation_files.TABLE).read_text()
  assert table.startswith("\n".join(shown.splitlines()[1:4]))
  assert Image.open(out / activation_files.PICTURE).format == "PNG"
  merged = flatten_dict(load_lora(str(out)))
  loras = [flatten_dict(load_lora(str(folder))) for folder in experts]
  path = ("mid_block", "attentions_0", "transformer_blocks_0", "attn2", "to_out_0")
  columns = [x[(*path, "b")] for x in loras]
  found = merged[(*path, "b")].reshape(-1, *columns[0].shape)
  found = found if len(found) == 3 else [np.where(found[0] == c, c, 0) for c in columns]
  for ours, theirs in zip(found, columns):
    won = ours.any(0)
    np.testing.assert_array_equal(ours[:, won], theirs[:, won])
  assert np.stack([x.any(0) for x in found]).sum(0).max() == 1, "one winner each"


def test_the_next_merge_measures_only_what_is_new(
  experts, cache, tmp_path, make_expert, monkeypatch
):
  first = run(
    experts[:2], tmp_path / "two", "co_merge", "--calibration", cache, *CO_MERGE
  )
  kept = first / "statistics"
  assert len(list(kept.iterdir())) == 2
  measured = []

  def measure(pipeline, loras, *rest, **options):
    measured.append(loras)
    return slow(pipeline, loras, *rest, **options)

  slow = activations.measure
  monkeypatch.setattr(activations, "measure", measure)
  common = ("--calibration", cache, *CO_MERGE, "--statistics", kept)
  other = run(experts[:2], tmp_path / "other", "co_merge_product", *common, "--rank", 2)
  assert read(other)["rank"] == 2
  assert not measured
  run(experts, tmp_path / "three", "co_merge", *common)
  assert [len(loras) for loras in measured] == [1]
  chex.assert_trees_all_equal(measured[0][0], load_lora(str(experts[2])))
  assert len(list(kept.iterdir())) == 3
  fresh = run(
    experts, tmp_path / "fresh", "co_merge", "--calibration", cache, *CO_MERGE
  )
  chex.assert_trees_all_equal(load_lora(str(fresh)), load_lora(str(tmp_path / "three")))
  with pytest.raises(InputError, match=r"measured with seed 0, now it is 3; .*--stat"):
    run(experts, tmp_path / "seed", "co_merge", *common, "--seed", 3)


@pytest.fixture(scope="module")
def bad(make_expert, experts, tmp_path_factory):
  """Experts that do not fit the first."""
  folder = tmp_path_factory.mktemp("bad")
  other_base = {"name": "another", "fingerprint": "0123456789abcdef"}
  made = {
    "base": make_expert(folder / "base", 1, base=other_base),
    "rank": make_expert(folder / "rank", 1, rank=3),
    "targets": make_expert(folder / "targets", 1, targets=("to_q",)),
    "seed": make_expert(folder / "seed", 1, lora_seed=9),
    "warm": make_expert(folder / "warm", 1, init={"path": "x", "sha256": "89ab"}),
  }
  tree, about = expert.read_expert(experts[1])
  flat = flatten_dict(tree)
  path = next(path for path in flat if path[-1] == "b")
  broken = np.where(np.arange(flat[path].shape[1]) == 3, np.nan, flat[path])
  made["nan"] = folder / "nan"
  expert.write_expert(made["nan"], unflatten_dict({**flat, path: broken}), about)
  made["half"] = folder / "half"
  whole = {p: leaf for p, leaf in flat.items() if p != path}
  expert.write_expert(made["half"], unflatten_dict(whole), about)
  made["twice"] = folder / "twice"
  expert.write_expert(made["twice"], load_lora(str(experts[0])), about)
  foreign = {**flat, path: flat[path][:, :5]}
  made["shape"] = write_diffusers(folder, unflatten_dict(foreign), ("to_q",))
  return made


@pytest.mark.parametrize(
  ("which", "method", "message"),
  [
    (
      "base",
      "linear",
      r"hate was trained on .*, .*base on another \(0123456789abcdef\)",
    ),
    ("twice", "linear", r"hate and .*twice are the same LoRA; give each expert once"),
    ("half", "linear", r"half: .* is not a LoRA layer, a \(in, r\) and b \(r, out\)"),
    ("nan", "svd", r"nan: .*/b holds NaN or infinity"),
    ("shape", "linear", r"/b is for \d+ features in .*hate and for 5 in .*safetensors"),
    ("rank", "co_merge_factor", r"hate has rank 2, .*rank rank 3.*co_merge_product"),
    ("targets", "co_merge_factor", r"hate adapts .*to_k and .*targets does not"),
    ("targets", "co_merge_product", r"hate adapts .*to_k and .*targets does not"),
    ("seed", "co_merge_factor", r"hate has lora.seed 0, .*seed 9: .*co_merge_product"),
    ("warm", "co_merge_factor", r"hate has lora.seed 0, .*warm has lora.init 89ab: "),
  ],
)
def test_experts_that_do_not_fit_are_refused(
  which, method, message, bad, experts, cache, tmp_path
):
  more = ("--calibration", cache) if "co_merge" in method else ()
  with pytest.raises(InputError, match=message):
    run([experts[0], bad[which]], tmp_path / "out", method, *more)
  assert not (tmp_path / "out").exists()


def test_experts_of_a_fine_tune_are_merged_knowingly(
  bad, experts, tiny_checkpoint, tmp_path, capsys
):
  loras, out = [experts[0], bad["base"]], tmp_path / "out"
  with pytest.raises(InputError, match="give the --model that the merged LoRA is for"):
    run(loras, out, "linear", "--any_base")
  run(loras, out, "linear", "--any_base", "--model", tiny_checkpoint)
  assert "--any_base: " in capsys.readouterr().err
  assert read(out)["base"] == read(experts[0])["base"]
  assert "any_base" not in read(out)["options"]


def test_the_product_reading_takes_other_ranks_and_seeds(bad, experts, cache, tmp_path):
  loras = [experts[0], bad["rank"], bad["seed"]]
  more = ("--calibration", cache, *CO_MERGE)
  assert read(run(loras, tmp_path / "out", "co_merge_product", *more))["rank"] == 7


def test_an_unknown_lora_seed_is_a_warning(experts, cache, tmp_path, capsys):
  tree = load_lora(str(experts[1]))
  file = write_diffusers(tmp_path / "file", tree, lora.ATTENTION_TARGETS)
  more = ("--calibration", cache, *CO_MERGE)
  run([experts[0], file], tmp_path / "out", "co_merge_factor", *more)
  assert "does not record its lora.seed" in capsys.readouterr().err
  run(experts[:2], tmp_path / "two", "co_merge_factor", *more)
  assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (("--pairs", 5), r"has 1 pairs of category .*, --pairs is 5; lower it"),
    (("--timesteps", "5,1000"), r"--timesteps is '5,1000'; expected .* 0 to 999"),
    (("--timesteps", "x"), r"--timesteps is 'x'"),
  ],
)
def test_a_calibration_that_cannot_be_is_refused(
  changes, message, experts, cache, tmp_path
):
  with pytest.raises(InputError, match=message):
    run(
      experts,
      tmp_path / "out",
      "co_merge",
      "--calibration",
      cache,
      "--pairs",
      1,
      *changes,
    )


def test_the_calibration_may_lie_in_a_store(experts, cache, tmp_path):
  buckets.use_bucket()
  url = buckets.upload(cache, "gs://bucket/cache")
  one, other = (
    run(experts, tmp_path / name, "co_merge", "--calibration", place, *CO_MERGE)
    for name, place in (("one", cache), ("other", url))
  )
  assert read(one)["calibration"] == read(other)["calibration"]


def test_every_experts_category_must_be_in_the_calibration(
  experts, cache, tiny_checkpoint, tmp_path
):
  pairs, hate = cache.parent / "pairs", ("--category", "hate")
  caches.run(tiny_checkpoint, pairs, tmp_path / "cache", *hate)
  with pytest.raises(
    InputError, match=r"has no pairs of sexual, the category of .*; it"
  ):
    run(experts, tmp_path / "out", "co_merge", "--calibration", tmp_path / "cache")


def test_activations_that_are_not_finite_decide_nothing(
  experts, cache, tmp_path, monkeypatch
):
  def measure(*args, **kwargs):
    trees = activations.measure(*args, **kwargs)
    flat = {path: np.array(leaf) for path, leaf in flatten_dict(trees[1]).items()}
    next(iter(flat.values()))[0, 0] = np.nan
    return [trees[0], unflatten_dict(flat)]

  out = tmp_path / "out"
  fake = types.SimpleNamespace(measure=measure)
  monkeypatch.setattr(merge_experts, "activations", fake)
  with pytest.raises(InputError, match=r"sexual on .*are not finite; use --dtype"):
    run(experts[:2], out, "co_merge", "--calibration", cache, *CO_MERGE)
  assert not (out / "expert.json").exists()


def test_a_model_replaced_since_training_is_refused(make_expert, cache, tmp_path):
  """The expert's base is looked up by its name, and must still be that model."""
  base = read(make_expert(tmp_path / "one", 0))["base"] | {"fingerprint": "0" * 16}
  one = make_expert(tmp_path / "two", 1, base=base)
  with pytest.raises(InputError, match=r"was trained on .*fingerprint 0000"):
    run([one], tmp_path / "out", "co_merge", "--calibration", cache, *CO_MERGE)


def test_damaged_statistics_are_refused(experts, cache, tmp_path):
  more = ("--calibration", cache, *CO_MERGE)
  out = run(experts[:2], tmp_path / "out", "co_merge", *more)
  one, other = sorted((out / "statistics").iterdir())
  content = one.read_bytes()
  for damaged in (content[:-8], b"x" * 40, other.read_bytes()):
    one.write_bytes(damaged)
    with pytest.raises(InputError, match=one.name):
      run(experts[:2], out, "co_merge", *more)
  tensors, header = activation_files.open_safetensors(other)
  name = next(iter(tensors))
  for wrong in (tensors[name][:3], tensors[name] * np.nan):
    changed = {**tensors, name: wrong}
    activation_files.save_file(dict(sorted(changed.items())), tmp_path / "new", header)
    one.write_bytes(content)
    (tmp_path / "new").replace(other)
    with pytest.raises(InputError, match=f"{other.name} does not fit the expert"):
      run(experts[:2], out, "co_merge", *more)


@pytest.mark.slow
def test_two_processes_merge_as_one(experts, cache, tmp_path):
  one = run(experts, tmp_path / "one", "co_merge", "--calibration", cache, *CO_MERGE)
  names = ",".join(map(str, experts))
  arguments = ["--experts", names, "--method", "co_merge", "--calibration", cache]
  arguments += [*CO_MERGE, "--out", tmp_path / "two"]
  hosts = runs.start_hosts("merge", arguments, 2)
  printed = [host.communicate(timeout=300)[0] for host in hosts]
  assert [host.returncode for host in hosts] == [0, 0], printed
  two = load_lora(str(tmp_path / "two"))
  chex.assert_trees_all_equal(two, load_lora(str(one)))
