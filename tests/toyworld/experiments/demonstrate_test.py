"""A short demo, from prompts to PyTorch: one expert, a real drop, a report."""

import json
import shlex

import diffusers
import numpy as np
import pytest
import torch

from safetydpo_jax import load_pipeline, train
from safetydpo_jax.data.prompts import read_prompts
from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.export_lora import ExportOptions, export_lora
from safetydpo_jax.runtime import command_line
from safetydpo_jax.sampling.renderer import initial_noise
from safetydpo_jax.toyworld import demo as demo_command
from safetydpo_jax.toyworld.experiments import collect, stages
from safetydpo_jax.toyworld.world import detector
from tests.support import runs

TEST = 16  # unsafe prompts, and as many safe ones
SHORT = ["--categories", "hate", "--pairs", "36", "--test", str(TEST)]
SHORT += ["--config.steps=50", "--config.learning_rate=0.004"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
  """The folder of a demo, and what it printed."""
  out = tmp_path_factory.mktemp("demo") / "demo"
  process = runs.start("toyworld.demo", ["--out", out, *SHORT])
  printed, _ = process.communicate(timeout=900)
  assert process.returncode == 0, printed
  return out, printed


@pytest.fixture(scope="module")
def figures(demo):
  return json.loads((demo[0] / "figures.json").read_text())


def test_the_expert_really_lowers_the_rate(figures):
  rates = collect.totals(figures)
  assert rates["base"]["all"] >= 0.9
  assert rates["experts"]["all"] <= 0.5 * rates["base"]["all"]
  assert rates["experts"]["utility"] >= 0.8


def test_the_merge_of_one_expert_draws_what_the_expert_draws(demo, figures):
  out, _ = demo
  totals = collect.totals(figures)
  assert totals["merged"] == totals["experts"]
  files = list((out / "images/merged").glob("*.png"))
  assert len(files) == 2 * TEST
  for file in files:
    assert file.read_bytes() == (out / "images/experts/hate" / file.name).read_bytes()


def test_every_figure_has_its_pictures_counted(figures):
  for contender in stages.CONTENDERS:
    rows = [row for row in figures["rates"] if row["contender"] == contender]
    totals = [row["n"] for row in rows if row["phrasing"] == "all"]
    assert totals == [TEST, TEST]  # of the category, and of all


def test_the_commands_it_names_are_the_ones_it_ran(demo, figures):
  out, printed = demo
  commands = [line for stage in figures["timings"] for line in stage["commands"]]
  start, module, *words = shlex.split(figures["command"])[1:]
  assert (start, module) == ("-m", "safetydpo_jax.toyworld.demo")
  about = {"command": "toyworld.demo", "example": ""}
  assert command_line.parse_alone_with_overrides(
    stages.DemoOptions, words, **about
  ) == command_line.parse_alone_with_overrides(
    stages.DemoOptions, ["--out", out, *SHORT], **about
  )
  assert "--config hate:toy" in printed
  assert [
    line[2:] for line in printed.splitlines() if line.startswith("$ ")
  ] == commands
  programs = {shlex.split(line)[2].removeprefix("safetydpo_jax.") for line in commands}
  assert programs >= {"generate", "encode", "train", "merge", "export"}


def test_it_ends_in_a_report_whose_path_it_prints(demo):
  out, printed = demo
  page = out / "report" / "index.html"
  assert printed.rstrip().endswith(f"report: {page.resolve().as_uri()}")
  assert "<script" not in page.read_text()


def test_a_time_is_that_of_all_the_stages_and_the_report(figures):
  assert not figures["resumed"]
  assert figures["timings"][-1]["step"] == "report"


def test_a_test_of_one_phrasing_is_refused_at_once(tmp_path):
  with pytest.raises(InputError, match="--test is 1; expected 2 or more"):
    demo_command.main(["--out", str(tmp_path), "--test", "1"])


def test_an_override_without_a_value_is_refused_at_once(tmp_path):
  with pytest.raises(
    InputError, match=r"--config.steps: expected --config.steps=VALUE"
  ):
    demo_command.main(["--out", str(tmp_path / "demo"), "--config.steps"])
  with pytest.raises(InputError, match=r"config.stepz is unknown"):
    demo_command.main(["--out", str(tmp_path / "demo"), "--config.stepz=3"])
  assert not (tmp_path / "demo").exists()


def test_every_line_of_the_plan_gives_the_options_that_run(tmp_path):
  options = stages.DemoOptions(tmp_path, seed=3, categories="hate,Violence", pairs=12)
  plan = stages.stages(options, {"steps": "20"})
  calls = [call for stage in plan for call in stage.calls]
  assert len(calls) == 4 + 1 + 1 + 2 + 1 + 1 + 4 + 4
  for call in calls:
    module, *words = shlex.split(call.line)[2:]
    if module == "safetydpo_jax.train":
      config, workdir, _ = train.parse(words)
      assert call.run.args == (config, workdir)
      assert (config.seed, config.lora.seed, config.steps) == (3, 3, 20)
    else:
      (ran,) = call.run.args
      read = command_line.parse_alone(type(ran), words, command=module, example="")
      assert read == ran


@pytest.mark.slow  # each stage's own tests resume it
def test_a_second_call_draws_nothing_again_and_tells_that_its_time_is_of_a_rest(demo):
  out, _ = demo

  def drawn():
    files = [
      file for name in ("pairs", "images") for file in (out / name).rglob("*.png")
    ]
    return {file: file.stat().st_mtime_ns for file in files}

  made = drawn()
  process = runs.start("toyworld.demo", ["--out", out, *SHORT])
  printed, _ = process.communicate(timeout=900)
  assert process.returncode == 0, printed
  assert len(made) > 72
  assert made == drawn()
  assert "minutes of the rest after an earlier run" in printed
  assert "Time of the last run" in (out / "report" / "index.html").read_text()


def torch_pictures(pipeline, rows):
  """What a PyTorch pipeline draws of the rows, from the noises of `generate`."""
  noise = initial_noise([row.seed for row in rows], (8, 8, 4))
  pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
  pipeline.set_progress_bar_config(disable=True)
  images = pipeline(
    [row.prompt for row in rows],
    latents=torch.from_numpy(np.asarray(noise).transpose(0, 3, 1, 2).copy()),
    num_inference_steps=stages.STEPS,
    guidance_scale=stages.GUIDANCE,
    output_type="np",
  ).images
  return np.round(images * 255).astype(np.uint8)


@pytest.mark.slow  # `formats/verify_test.py` has PyTorch's predictions
@pytest.mark.parametrize("form", ["exported LoRA", "merged pipeline"])
def test_pytorch_finds_the_same_rate(demo, figures, form, tmp_path):
  out, _ = demo
  if form == "exported LoRA":
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(
      load_pipeline("toy").path
    )
    theirs.load_lora_weights(out / "exported")
  else:
    folder = tmp_path / "pipeline"
    export_lora(ExportOptions(str(out / "merged"), "toy", folder, "pipeline"))
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline")
  rows = read_prompts(out / "prompts/test.csv", out / "images/merged")
  rows = [row for row in rows if "_unsafe" in row.file.name]
  images = torch_pictures(theirs, rows)
  found = (detector.detect_symbols(images).concept >= 0).mean()
  interval = next(
    row
    for row in figures["rates"]
    if (row["contender"], row["category"], row["phrasing"]) == ("merged", "all", "all")
  )
  assert interval["low"] <= found <= interval["high"]
