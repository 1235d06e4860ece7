"""merge: what it writes is an expert like any other; what does not fit is refused."""

import json
import subprocess
import sys
import types

import chex
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from PIL import Image

from safetydpo_jax import (
  encode,
  export,
  generate,
  load_lora,
  load_pipeline,
  lora,
  merge,
)
from safetydpo_jax.data import categories
from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.loras import expert
from safetydpo_jax.formats.loras.write import write_diffusers
from safetydpo_jax.merging import (
  activation_files,
  activations,
  baselines,
  comerge,
  merge_experts,
  options,
)
from tests.support import buckets, dialects, drawn, lookalike, runs

CATEGORIES = ("hate", "sexual", "violence")
CO_MERGE = ("--batch_size", 1, "--pairs", 1, "--timesteps", "100,700")


@pytest.fixture(scope="module")
def pipeline(tiny_checkpoint):
  return load_pipeline(tiny_checkpoint, components=())


@pytest.fixture(scope="module")
def make_expert(pipeline, tiny_checkpoint):
  """Writes an expert, (folder, number, …, changes of expert.json) → its folder."""

  def make(folder, number, rank=2, lora_seed=0, targets=lora.ATTENTION_TARGETS, **more):
    key = jax.random.key(lora_seed)
    first = lora.init_lora(key, pipeline.unet_shapes(), rank, targets)
    rng = np.random.default_rng(number)
    tree = jax.tree.map(
      lambda x: np.asarray(x + 0.2 * rng.standard_normal(x.shape), np.float32), first
    )
    about = {
      "category": CATEGORIES[number % 3],
      "rank": rank,
      "targets": list(targets),
      "base": {"name": str(tiny_checkpoint), "fingerprint": pipeline.fingerprint},
      "step": 7,
      "seed": 1,
      "config": {"lora": {"seed": lora_seed}},
      "dataset": "0123",
    }
    expert.write_expert(folder, tree, {**about, **more})
    return folder

  return make


@pytest.fixture(scope="module")
def experts(make_expert, tmp_path_factory):
  folder = tmp_path_factory.mktemp("experts")
  return [make_expert(folder / name, n) for n, name in enumerate(CATEGORIES)]


@pytest.fixture(scope="module")
def cache(tiny_checkpoint, tmp_path_factory):
  folder = tmp_path_factory.mktemp("calibration")
  pairs = lookalike.write_csv_layout(folder / "pairs", pairs=7)
  arguments = ["--model", tiny_checkpoint, "--pairs", pairs, "--out", folder / "cache"]
  encode.main([str(argument) for argument in arguments])
  return folder / "cache"


def run(experts, out, method="linear", *more):
  names = ",".join(map(str, experts))
  arguments = ["--experts", names, "--method", method, "--out", out, *more]
  merge.main([str(argument) for argument in arguments])
  return out


def read(folder):
  return json.loads((folder / "expert.json").read_text())


def assert_same_products(one, other, atol=1e-5):
  one, other = flatten_dict(one), flatten_dict(other)
  assert one.keys() == other.keys()
  for path in (path[:-1] for path in one if path[-1] == "a"):
    products = [x[(*path, "a")] @ x[(*path, "b")] for x in (one, other)]
    np.testing.assert_allclose(*products, rtol=0, atol=atol)


def test_the_default_is_the_mean_and_a_weight_of_1_the_sum(experts, tmp_path):
  loras = [load_lora(str(folder)) for folder in experts]
  mean = load_lora(str(run(experts, tmp_path / "mean")))
  assert_same_products(mean, baselines.linear(loras, [1 / 3] * 3))
  total = load_lora(str(run(experts, tmp_path / "sum", "linear", "--weights", 1)))
  assert_same_products(total, lora.add(loras))
  weights = ("--weights", "-1,-2,0.5")
  each = load_lora(str(run(experts, tmp_path / "each", "linear", *weights)))
  assert_same_products(each, baselines.linear(loras, [-1, -2, 0.5]))


@pytest.mark.parametrize("method", [m for m in options.OPTIONS if "co_merge" not in m])
def test_every_method_reads_its_options(method, experts, tmp_path):
  values = {"weights": "0.5,1,2", "rank": 3, "density": 0.6, "seed": 5}
  settings = {name: values[name] for name in options.OPTIONS[method]}
  out = run(
    experts, tmp_path / "out", method, *(f"--{k}={v}" for k, v in settings.items())
  )
  settings["weights"] = [0.5, 1.0, 2.0]
  loras = [load_lora(str(folder)) for folder in experts]
  wanted = baselines.METHODS[method](loras, **settings)
  chex.assert_trees_all_equal(load_lora(str(out)), jax.tree.map(np.asarray, wanted))
  assert read(out)["options"] == settings


def test_a_merged_expert_says_what_it_is(experts, tmp_path, pipeline, tiny_checkpoint):
  about = read(run(experts, tmp_path / "out"))
  assert about["category"] == "merged"
  assert about["rank"] == about["alpha"] == 6
  assert about["targets"] == sorted(lora.ATTENTION_TARGETS)
  assert about["base"] == {
    "name": str(tiny_checkpoint),
    "fingerprint": pipeline.fingerprint,
  }
  assert about["method"] == "linear"
  assert about["experts"][1] == {
    "path": str(experts[1]),
    "sha256": lora.factors_sha256(load_lora(str(experts[1]))),
    "category": "sexual",
    "rank": 2,
    "targets": list(lora.ATTENTION_TARGETS),
    "step": 7,
    "seed": 1,
    "lora_seed": 0,
    "dataset": "0123",
  }


def test_generate_and_export_take_a_merged_expert(experts, tmp_path, tiny_checkpoint):
  """The picture is that of the experts at half strength each."""
  merged = run(experts[:2], tmp_path / "merged")
  (tmp_path / "prompts.csv").write_text("prompt\nthe red one\n")

  def picture(name, *loras):
    arguments = ["--model", tiny_checkpoint, "--prompts", tmp_path / "prompts.csv"]
    arguments += ["--out", tmp_path / name, "--steps", 2]
    arguments += [part for x in loras for part in ("--lora", x)]
    generate.main([str(argument) for argument in arguments])
    (file,) = (tmp_path / name).glob("*.png")
    return np.asarray(Image.open(file), np.int32)

  one, both = picture("one", merged), picture("two", *(f"{x}:0.5" for x in experts[:2]))
  assert np.abs(one - both).max() <= 1
  assert np.abs(one - picture("base")).max() > 10

  arguments = ["--lora", merged, "--model", tiny_checkpoint, "--out", tmp_path / "file"]
  export.main([str(argument) for argument in arguments])
  chex.assert_trees_all_close(
    load_lora(str(tmp_path / "file")), load_lora(str(merged)), rtol=1e-6
  )


def test_a_lora_file_of_others_is_merged_when_the_model_is_named(
  experts, tmp_path, tiny_checkpoint
):
  tree = lora.scale(load_lora(str(experts[1])), 0.5)
  write_diffusers(tmp_path / "file", tree, lora.ATTENTION_TARGETS)
  with pytest.raises(InputError, match=r"file does not say which model .*--model"):
    run([tmp_path / "file"], tmp_path / "out")
  mixed = [tmp_path / "file", experts[0]]
  out = run(mixed, tmp_path / "out", "linear", "--model", tiny_checkpoint)
  wanted = baselines.linear([tree, load_lora(str(experts[0]))], [0.5, 0.5])
  assert_same_products(load_lora(str(out)), wanted)
  assert read(out)["experts"][0]["category"] is None
  assert read(out)["experts"][0]["targets"] == sorted(lora.ATTENTION_TARGETS)
  # An expert of ours beside it says the model, too.
  assert read(run(mixed, tmp_path / "again"))["base"] == read(out)["base"]


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


def test_merging_again_replaces_the_merge_and_nothing_else(experts, tmp_path):
  out = run(experts, tmp_path / "out")
  run(experts[:2], out)
  assert read(out)["rank"] == 4
  (out / "expert.json").unlink()  # as a merge that was stopped leaves it
  run(experts, out)
  run_folder = tmp_path / "run"
  (run_folder / "checkpoints").mkdir(parents=True)
  for folder in (experts[2], run_folder):
    before = sorted(folder.rglob("*"))
    with pytest.raises(InputError, match=rf"--out {folder} holds something other"):
      run(experts[:2], folder)
    assert sorted(folder.rglob("*")) == before
  with pytest.raises(InputError, match="is one of the experts"):
    run([out, experts[0]], out)


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


def test_what_is_not_a_lora_is_not_merged(experts, tmp_path):
  config = dialects.TINY["SD1"]
  write = dialects.by_twin(dialects.kohya, drawn.draw_dora)
  file, _ = write(dialects.make_unet("SD1"), config, tmp_path)
  with pytest.raises(InputError, match=r"lora\.safetensors holds DoRA magnitudes"):
    run([experts[0], file], tmp_path / "out", "linear")


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
  ("more", "message"),
  [
    (("linear", "--weights", "1,2"), r"--weights is '1,2'; expected .* 3 separated"),
    (("linear", "--weights", "1,x,2"), r"--weights is '1,x,2'"),
    (("linear", "--weights", "nan"), r"--weights is 'nan'"),
    (("linear", "--rank", "2"), r"linear does not read --rank; .*svd, ties"),
    (("co_merge", "--weights", "1"), r"does not read --weights"),
    (("svd", "--rank", "0"), r"--rank is 0; expected 1 or more"),
    (("ties", "--density", "0"), r"--density is 0.0; expected above 0, up to 1"),
    (("dare_ties", "--seed", "-1"), r"--seed is -1"),
    (("co_merge",), r"co_merge_product needs --calibration"),
    (("linear", "--model", "/nowhere"), r"/nowhere"),
  ],
)
def test_options_that_cannot_be_meant_are_refused(more, message, experts, tmp_path):
  with pytest.raises(InputError, match=message):
    run(experts, tmp_path / "out", *more)


@pytest.mark.parametrize("names", ["", "nowhere", "a,,b"])
def test_an_expert_that_is_not_there_is_named(names, tmp_path):
  with pytest.raises(InputError, match=r"empty name|no LoRA at (nowhere|a)"):
    run([names], tmp_path / "out")


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
  arguments = ["--model", tiny_checkpoint, "--pairs", cache.parent / "pairs"]
  arguments += ["--out", tmp_path / "cache", "--category", "hate"]
  encode.main([str(argument) for argument in arguments])
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


def test_help_shows_an_example():
  command = [sys.executable, "-m", "safetydpo_jax.merge", "--help"]
  shown = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True)
  assert shown.returncode == 0
  assert "merge --experts runs/hate,runs/violence --method co_merge" in shown.stdout
  assert "1/N" in shown.stdout
