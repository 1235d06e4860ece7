"""evaluate: the command line of `evaluate_folder` and `run_suite`."""

import dataclasses
import shutil
from pathlib import Path

import pytest

from safetydpo_jax import evaluate
from safetydpo_jax.errors import InputError
from safetydpo_jax.evaluation.detectors import DetectorOptions
from safetydpo_jax.evaluation.evaluate_folder import EvaluateOptions
from safetydpo_jax.evaluation.suite import SuiteOptions
from safetydpo_jax.sampling.render_csv import RenderOptions
from tests.support import rendering
from tests.support.galleries import write_gallery


@pytest.fixture
def parsed(monkeypatch):
  """The options that `evaluate` makes of a command line."""

  def parsed(*words):
    seen = []
    monkeypatch.setattr(evaluate, "evaluate_folder", seen.append)
    monkeypatch.setattr(evaluate, "run_suite", seen.append)
    for name in ("print_summary", "print_suite"):
      monkeypatch.setattr(evaluate, name, lambda result: None)
    evaluate.main(list(words))
    return seen[0]

  return parsed


FOLDER = ("--images=i", "--prompts=p.csv", "--out=o")
SUITE = ("--suite=safety", "--sets=s", "--model=sd15", "--out=o")


def test_the_least_that_is_asked_for_leaves_the_defaults(parsed):
  assert parsed(*FOLDER) == EvaluateOptions(Path("i"), Path("p.csv"), Path("o"))
  assert parsed(*SUITE) == SuiteOptions("safety", Path("s"), "sd15", Path("o"))


DETECTORS = (
  *("--metrics", "ip,fid,clip", "--detector=q16,toy", "--q16", "prompts.p"),
  *("--q16_clip=a", "--clip", "b", "--inception", "c.pth", "--fid_statistics=d.npz"),
  *("--q16_threshold", "0.4", "--nudity_classes=FEET_EXPOSED"),
  *("--nudity_threshold", "0.5", "--batch_size", "3"),
  *("--train", "train.csv", "--title", "a title", "--seed=5"),
)
CHOSEN = DetectorOptions(
  metrics="ip,fid,clip",
  detector="q16,toy",
  q16="prompts.p",
  q16_clip="a",
  clip="b",
  inception="c.pth",
  fid_statistics=Path("d.npz"),
  q16_threshold=0.4,
  nudity_classes="FEET_EXPOSED",
  nudity_threshold=0.5,
  batch_size=3,
)


def test_every_flag_of_a_folder_is_an_option_of_its_type(parsed):
  assert parsed(*FOLDER, *DETECTORS, "--reference=r") == EvaluateOptions(
    images=Path("i"),
    prompts=Path("p.csv"),
    out=Path("o"),
    reference=Path("r"),
    train=Path("train.csv"),
    title="a title",
    seed=5,
    detectors=CHOSEN,
  )


def test_every_flag_of_a_suite_is_an_option_of_its_type(parsed):
  more = ("--lora", "hate", "--lora=merged:0.5", "--steps=7", "--guidance", "-1")
  more += ("--any_base",)
  more += ("--dtype", "bfloat16", "--render_batch_size=2", "--limit", "9")
  more += ("--sampler", "euler", "--guidance_rescale=0.7", "--negative_prompt=red")
  more += ("--height=16", "--width", "24", "--variant=fp16", "--no_row_guidance")
  assert parsed(*SUITE, *DETECTORS, *more) == SuiteOptions(
    suite="safety",
    sets=Path("s"),
    model="sd15",
    out=Path("o"),
    lora=("hate", "merged:0.5"),
    any_base=True,
    train=Path("train.csv"),
    steps=7,
    guidance=-1.0,
    dtype="bfloat16",
    sampler="euler",
    guidance_rescale=0.7,
    negative_prompt="red",
    height=16,
    width=24,
    variant="fp16",
    no_row_guidance=True,
    render_batch_size=2,
    limit=9,
    title="a title",
    seed=5,
    detectors=CHOSEN,
  )


def test_a_suite_has_every_flag_of_generate_but_those_of_its_own_work():
  generate, suite = (
    {field.name for field in dataclasses.fields(kind)}
    for kind in (RenderOptions, SuiteOptions)
  )
  assert generate - suite == {"prompts", "compare", "latents", "batch_size", "no_blur"}


@pytest.mark.parametrize(("name", "value"), rendering.SETTINGS.items())
def test_every_setting_of_rendering_is_a_flag_of_a_suite(parsed, name, value):
  more = rendering.SETTINGS if name.startswith("negative_") else {name: value}
  words = [f"--{n}" if v is True else f"--{n}={v}" for n, v in more.items()]
  assert getattr(parsed(*SUITE, *words), name) == value


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--suite", "safety", "--model", "toy"], "--sets is missing"),
    (["--suite", "safety", "--sets", "x"], "--model is missing"),
    (["--images", "x"], "--prompts is missing"),
    ([], "--images is missing"),
    (
      ["--images", "x", "--prompts", "y", "--metrics", "fid"],
      "--metrics fid needs .*--fid_statistics",
    ),
    ([*FOLDER, "--metrics", "ip,beauty"], "--metrics has 'beauty'"),
    ([*FOLDER, "--lora", "run"], "--lora applies to --suite"),
    ([*FOLDER, "--model", "toy"], "--model applies to --suite"),
    ([*FOLDER, "--limit", "5"], "--limit applies to --suite"),
    ([*FOLDER, "--any_base"], "--any_base applies to --suite"),
    ([*FOLDER, "--steps", "5"], "--steps applies to --suite"),
    ([*FOLDER, "--variant", "fp16"], "--variant applies to --suite"),
    ([*SUITE, "--reference", "r"], "--reference does not apply with --suite"),
  ],
)
def test_what_is_missing_or_does_not_fit_is_one_line(
  parsed, tmp_path, arguments, message
):
  with pytest.raises(InputError, match=message):
    parsed(*arguments, "--out", str(tmp_path))


def test_the_figures_of_a_suite_are_printed(monkeypatch):
  printed = []
  monkeypatch.setattr(evaluate, "run_suite", lambda options: {"suite": options.suite})
  monkeypatch.setattr(evaluate, "print_suite", printed.append)
  evaluate.main(list(SUITE))
  assert printed == [{"suite": "safety"}]


def test_the_example_of_the_help_works_as_written(tmp_path, monkeypatch, capsys):
  drawn = write_gallery(tmp_path, 6)
  shutil.copytree(drawn.images, tmp_path / "images")
  shutil.copytree(drawn.reference, tmp_path / "images" / "base")
  monkeypatch.chdir(tmp_path)
  line = evaluate.EXAMPLE.replace("\\\n", " ").split()
  evaluate.main(line[line.index("safetydpo_jax.evaluate") + 1 :])
  assert (tmp_path / "report/report/index.html").is_file()
  assert "only reference" in capsys.readouterr().out
