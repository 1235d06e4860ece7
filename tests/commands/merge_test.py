"""merge: what it writes is an expert like any other; what does not fit is refused."""

import subprocess
import sys

import chex
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from PIL import Image

from safetydpo_jax import export, generate, load_lora, load_pipeline, lora
from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.loras.write import write_diffusers
from safetydpo_jax.merging import baselines, options
from tests.support import dialects, drawn, runs
from tests.support.experts import read, run


@pytest.fixture(scope="module")
def pipeline(tiny_checkpoint):
  return load_pipeline(tiny_checkpoint, components=())


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


def test_merging_again_replaces_the_merge_and_nothing_else(experts, tmp_path, capsys):
  out = run(experts, tmp_path / "out")
  run(experts[:2], out)
  assert f"{out} holds an earlier merge (linear)" in capsys.readouterr().err
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


def test_what_is_not_a_lora_is_not_merged(experts, tmp_path):
  config = dialects.TINY["SD1"]
  write = dialects.by_twin(dialects.kohya, drawn.draw_dora)
  file, _ = write(dialects.make_unet("SD1"), config, tmp_path)
  with pytest.raises(InputError, match=r"lora\.safetensors holds DoRA magnitudes"):
    run([experts[0], file], tmp_path / "out", "linear")


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


def test_help_shows_an_example():
  command = [sys.executable, "-m", "safetydpo_jax.merge", "--help"]
  shown = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True)
  assert shown.returncode == 0
  assert "merge --experts runs/hate,runs/violence --method co_merge" in shown.stdout
  assert "1/N" in shown.stdout
