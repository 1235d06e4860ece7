"""Experts that the tests of `merge` share."""

import functools

import pytest

from safetydpo_jax import load_pipeline
from tests.support.experts import CATEGORIES, write_expert


@pytest.fixture(scope="session")
def make_expert(tiny_checkpoint):
  """`write_expert` for the tiny checkpoint."""
  pipeline = load_pipeline(str(tiny_checkpoint), components=())
  return functools.partial(write_expert, pipeline)


@pytest.fixture(scope="session")
def experts(make_expert, tmp_path_factory):
  folder = tmp_path_factory.mktemp("experts")
  return [make_expert(folder / name, n) for n, name in enumerate(CATEGORIES)]
