"""Experts that the tests of `merge` share, and the host that those of `prompts` ask."""

import csv
import functools

import pytest

from safetydpo_jax import load_pipeline, prompts
from safetydpo_jax.data.writing import write_prompts
from safetydpo_jax.data.writing.endpoint import Endpoint
from tests.support.experts import CATEGORIES, write_expert
from tests.support.galleries import read_rows
from tests.support.llm_server import CONCEPTS, serve


@pytest.fixture(scope="session")
def make_expert(tiny_checkpoint):
  """`write_expert` for the tiny checkpoint."""
  pipeline = load_pipeline(str(tiny_checkpoint), components=())
  return functools.partial(write_expert, pipeline)


@pytest.fixture(scope="session")
def experts(make_expert, tmp_path_factory):
  folder = tmp_path_factory.mktemp("experts")
  return [make_expert(folder / name, n) for n, name in enumerate(CATEGORIES)]


@pytest.fixture
def server():
  with serve() as server:
    yield server


@pytest.fixture
def prompts_command(server, tmp_path):
  """The command line for the four concepts, six pairs each in requests for three."""
  categories = ("hate", "sexual", "self-harm", "Harrasment")
  with open(tmp_path / "concepts.csv", "w", newline="") as file:
    csv.writer(file).writerows([("concept", "category"), *zip(CONCEPTS, categories)])

  def command(*more, out="p.csv", per_concept=6):
    options = ["--concepts", tmp_path / "concepts.csv", "--endpoint", server.url]
    options += ["--model", "m", "--out", tmp_path / out, "--per_concept", per_concept]
    return [str(option) for option in (*options, "--per_request", 3, *more)]

  return command


@pytest.fixture
def run_prompts(prompts_command, monkeypatch, tmp_path):
  """Runs the command with short waits; returns the CSV's rows."""
  impatient = functools.partial(Endpoint, first_wait=0.01)
  monkeypatch.setattr(write_prompts, "Endpoint", impatient)

  def run(*more, out="p.csv", **options):
    prompts.main(prompts_command(*more, out=out, **options))
    return read_rows(tmp_path / out)

  return run
