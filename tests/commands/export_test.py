"""export: what PyTorch users get, followed from the images."""

import functools
import json
import shutil
import subprocess
import sys

import chex
import jax
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from flax.traverse_util import flatten_dict
from huggingface_hub.utils import filter_repo_objects

from safetydpo_jax import load_lora, load_pipeline, lora, train
from safetydpo_jax.errors import InputError
from safetydpo_jax.formats import verify
from safetydpo_jax.formats.loras import kohya
from safetydpo_jax.formats.loras import write as lora_files
from tests.support import caches, exports, lookalike, runs
from tests.support.checkpoints import save_tiny_checkpoint
from tests.support.exports import make_expert, read_card


@pytest.fixture(scope="module")
def pipeline(tiny_checkpoint):
  return load_pipeline(tiny_checkpoint, components=("unet",))


@pytest.fixture(scope="module")
def trained(tiny_checkpoint, tmp_path_factory):
  """5 steps on look-alikes of CoProV2's CSV and images: an expert's directory."""
  folder = tmp_path_factory.mktemp("spine")
  pairs = lookalike.write_csv_layout(folder / "pairs", pairs=12)
  caches.run(tiny_checkpoint, pairs, folder / "cache")
  changes = {"batch_size": 8, "accumulation": 1, "steps": 5, "learning_rate": 4e-4}
  train.main(
    runs.train_arguments(tiny_checkpoint, folder / "cache", folder / "run", **changes)
  )
  return folder / "run"


@pytest.fixture
def run(tiny_checkpoint, tmp_path):
  """`export` to a new folder."""
  return functools.partial(exports.run, tiny_checkpoint, tmp_path / "out")


def test_a_trained_expert_predicts_in_diffusers_what_it_predicts_here(
  trained, run, pipeline, tiny_checkpoint
):
  """Images and a CSV → encode → train → export → load_lora_weights."""
  out = run(trained)
  rng = np.random.default_rng(0)
  latents = rng.standard_normal((2, 6, 8, 4)).astype(np.float32)
  context = rng.standard_normal((2, 5, 24)).astype(np.float32)
  timesteps = np.array([3, 700])
  theirs = StableDiffusionPipeline.from_pretrained(tiny_checkpoint)

  def predict():
    with torch.no_grad():
      inputs = torch.from_numpy(latents).permute(0, 3, 1, 2), torch.tensor(timesteps)
      sample = theirs.unet(*inputs, torch.from_numpy(context)).sample
    return sample.permute(0, 2, 3, 1).numpy()

  before = predict()
  theirs.load_lora_weights(out)
  after = predict()
  variables = {"params": pipeline.params["unet"], "lora": load_lora(str(trained))}
  ours = jax.jit(pipeline.unet.apply)(variables, latents, timesteps, context)
  assert np.abs(after - before).max() > 1e-3, "the LoRA must be seen"
  np.testing.assert_allclose(ours, after, rtol=0, atol=1e-4)
  np.testing.assert_allclose(ours - before, after - before, rtol=0, atol=1e-5)


def test_an_export_says_what_it_is(trained, run, pipeline, tiny_checkpoint, capsys):
  out = run(trained)
  assert "rank 4, " in capsys.readouterr().out
  assert sorted(file.name for file in out.iterdir()) == [
    "README.md",
    "export.json",
    lora_files.FILE_NAME,
  ]
  about = json.loads((out / "export.json").read_text())
  assert about["about"]["category"] == "hate"
  assert about["lora"] == str(trained)
  assert about["base"] == {
    "name": str(tiny_checkpoint),
    "fingerprint": pipeline.fingerprint,
  }
  assert (about["format"], about["dtype"]) == ("diffusers", "float32")
  card = read_card(out)
  assert "| category | hate |" in card
  assert "| steps | 5 |" in card


@pytest.mark.parametrize("kind", ["diffusers", "pipeline"])
def test_a_variant_that_the_unet_does_not_have_is_taken_elsewhere(
  trained, run, tiny_checkpoint, tmp_path, kind
):
  """The export loads as the base does: with the variant, which some components have."""
  base = tmp_path / "base"
  shutil.copytree(tiny_checkpoint, base)
  file = base / "text_encoder" / "model.safetensors"
  file.rename(file.with_name("model.fp16.safetensors"))
  out = run(trained, "--variant", "fp16", "--verify", model=base, kind=kind)
  if kind == "pipeline":
    assert (out / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    load_pipeline(str(out), components=("text_encoder",), variant="fp16")


def test_figures_that_are_none_stop_before_anything_is_written(trained, run, tmp_path):
  (tmp_path / "figures.json").write_text("{}")
  with pytest.raises(InputError, match=r"not a figures\.json of evaluate"):
    run(trained, "--figures", tmp_path / "figures.json")
  assert not (tmp_path / "out").exists()


def test_verify_without_pytorch_is_one_line_before_anything_is_written(
  trained, run, tmp_path, monkeypatch
):
  monkeypatch.setattr(verify, "_NEEDED", ("torch", "no_such_package"))
  with pytest.raises(InputError, match=r"--verify needs no_such_package.*pip install"):
    run(trained, "--verify")
  assert not (tmp_path / "out").exists()


def test_kohya_s_file_is_named_for_the_prompt(trained, run, capsys):
  out = run(trained, kind="kohya")
  assert f"{out}: {kohya.FILE_NAME}; rank 4" in capsys.readouterr().out
  chex.assert_trees_all_close(load_lora(str(out)), load_lora(str(trained)), rtol=1e-6)


def test_a_pipeline_is_a_model_that_every_command_takes(trained, run, pipeline):
  out = run(trained, kind="pipeline")
  made = load_pipeline(str(out))
  assert made.fingerprint != pipeline.fingerprint
  chex.assert_trees_all_close(
    made.params["unet"],
    lora.fuse(pipeline.params["unet"], load_lora(str(trained))),
    atol=1e-6,
  )
  assert {"README.md", "export.json"} <= {file.name for file in out.iterdir()}
  with pytest.raises(InputError, match="already exists"):
    run(trained, kind="pipeline")


@pytest.fixture
def hub_client(monkeypatch):
  """The hub's client, which only writes down what it was asked for."""
  asked = []

  class Client:
    def create_repo(self, repository, **options):
      asked.append(("create", repository, options))

    def upload_folder(self, **options):
      files = [file.name for file in options.pop("folder_path").iterdir()]
      patterns = {
        f"{x}_patterns": options.pop(f"{x}_patterns") for x in ("allow", "ignore")
      }
      taken = sorted(filter_repo_objects(files, **patterns))
      asked.append(("upload", taken, options))

  monkeypatch.setattr("huggingface_hub.HfApi", Client)
  return asked


def test_nothing_is_pushed_unless_asked_for(trained, run, hub_client):
  run(trained)
  assert hub_client == []


def test_a_push_makes_a_private_repository_and_keeps_export_json_here(
  trained, run, hub_client, capsys
):
  run(trained, "--push", "me/safe")
  (_, repository, options), (_, files, upload) = hub_client
  assert (repository, options) == ("me/safe", {"private": True, "exist_ok": True})
  assert upload["repo_id"] == "me/safe"
  assert files == ["README.md", lora_files.FILE_NAME]
  assert "https://huggingface.co/me/safe" in capsys.readouterr().out


def test_a_push_of_a_pipeline_is_the_whole_folder(trained, run, hub_client):
  out = run(trained, "--push", "me/safe", kind="pipeline")
  _, (_, files, _) = hub_client
  assert files == sorted({file.name for file in out.iterdir()} - {"export.json"})


def test_a_push_leaves_what_else_is_in_the_folder(trained, run, hub_client, tmp_path):
  """An export may stand in a run's directory, whose files name folders of here."""
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "expert.json").write_text("{}")
  run(trained, "--push", "me/safe", kind="kohya")
  _, (_, files, _) = hub_client
  assert files == ["README.md", kohya.FILE_NAME]


def test_a_push_that_fails_is_one_line(trained, run, hub_client, monkeypatch):
  def refuse(self, *_, **__):
    raise OSError("no such\nrepository")

  monkeypatch.setattr("huggingface_hub.HfApi.create_repo", refuse, raising=False)
  with pytest.raises(InputError, match=r"could not push .* to me/safe \(no such\)"):
    run(trained, "--push", "me/safe")


def test_a_scale_is_folded_in(trained, run, tmp_path):
  whole = load_lora(str(run(trained)))
  half = load_lora(str(run(f"{trained}:0.5", out=tmp_path / "half")))
  chex.assert_trees_all_close(half, lora.scale(whole, 0.5), rtol=1e-6)
  chex.assert_trees_all_equal(whole, load_lora(str(trained)))


def test_a_fine_tune_of_the_base_is_exported_for_knowingly(
  trained, run, tmp_path, capsys
):
  other = save_tiny_checkpoint(tmp_path / "other", seed=5)
  with pytest.raises(InputError, match=r"was trained on .*--any_base"):
    run(trained, model=other)
  out = run(trained, "--any_base", model=other)
  assert "--any_base: " in capsys.readouterr().err
  about = json.loads((out / "export.json").read_text())
  assert about["base"]["fingerprint"] != about["about"]["base"]["fingerprint"]


def test_layer_kinds_are_named_as_peft_names_targets(pipeline):
  targets = ("attn2.to_q", "to_out.0", "net.0.proj", "net.2")
  tree = lora.init_lora(jax.random.key(0), pipeline.params["unet"], 2, targets)
  assert lora_files.adapted_layers(tree) == ["net.2", "proj", "to_out.0", "to_q"]


def test_a_folder_holds_a_lora_in_one_format(trained, run, tmp_path):
  run(trained, kind="kohya")
  with pytest.raises(InputError, match=r"--out .*out .*kohya \(safetydpo_lora"):
    run(trained, kind="diffusers")
  assert not (tmp_path / "out" / "pytorch_lora_weights.safetensors").exists()
  run(f"{trained}:0.5", kind="kohya")  # of one format the next replaces the last
  whole = run(trained, kind="pipeline", out=tmp_path / "whole")
  with pytest.raises(InputError, match=r"pipeline \(model_index\.json\)"):
    run(trained, kind="diffusers", out=whole)


def test_an_expert_of_another_model_is_refused(pipeline, run, tmp_path):
  tree = lora.init_lora(jax.random.key(0), pipeline.params["unet"], 2)
  other = make_expert(tmp_path / "other", tree, "0123456789abcdef")
  with pytest.raises(InputError, match=r"was trained on tiny .*0123456789abcdef"):
    run(other)
  assert not (tmp_path / "out").exists()


def test_a_lora_of_other_shapes_is_refused(pipeline, run, tmp_path):
  """A foreign file names no model; its shapes do."""
  tree = lora.init_lora(jax.random.key(0), pipeline.params["unet"], 2)
  flat = flatten_dict(tree)
  path = next(path for path in flat if path[-1] == "a")
  layer = {"a": np.zeros((7, 2)), "b": flat[(*path[:-1], "b")]}
  for name in reversed(path[:-1]):
    layer = {name: layer}
  file = lora_files.write_diffusers(tmp_path / "other", layer, ("to_q",))
  with pytest.raises(InputError, match=f"{'/'.join(path[:-1])} is .*another model"):
    run(file)
  assert not (tmp_path / "out").exists()


def test_a_lora_of_layers_the_model_lacks_is_refused(run, tmp_path):
  factors = {"a": np.zeros((8, 2)), "b": np.zeros((2, 8))}
  layer = {"mid_block": {"attentions_7": {"to_q": factors}}}
  file = lora_files.write_diffusers(tmp_path / "other", layer, ("to_q",))
  with pytest.raises(InputError, match="mid_block/attentions_7/to_q, which this model"):
    run(file)


def test_a_folder_that_cannot_be_written_is_named(trained, run, tmp_path):
  (tmp_path / "file").touch()
  for out in ("/proc/export", tmp_path / "file"):
    with pytest.raises(InputError, match=f"cannot write {out}.*; choose a folder"):
      run(trained, out=out)


def test_help_shows_an_example():
  command = [sys.executable, "-m", "safetydpo_jax.export", "--help"]
  shown = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True)
  assert shown.returncode == 0
  assert "export --lora runs/hate --model sd15 --format diffusers" in shown.stdout
