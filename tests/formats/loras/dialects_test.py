"""LoRA files of every dialect: every layer is read, and is what its tool makes it."""

import pytest

from tests.support import dialects
from tests.support.dialects import DIALECTS
from tests.support.sizes import SIZES

NAMINGS = {dialect.naming: dialect for dialect in reversed(DIALECTS)}
# The arithmetic is the same in all families; SDXL and KOALA are named differently.
CASES = [(dialect, "SD1") for dialect in DIALECTS]
CASES += [
  (dialect, family) for dialect in NAMINGS.values() for family in ("SDXL", "KOALA")
]


@pytest.mark.parametrize(
  ("dialect", "family"), CASES, ids=[f"{d.tool}: {d.kind}, {f}" for d, f in CASES]
)
def test_a_file_gives_the_weights_that_its_tool_gives(dialect, family, tmp_path):
  found = dialects.measure(dialect, family, tmp_path)
  assert found.read == found.there
  assert found.difference < 1e-6


@pytest.mark.parametrize("model", SIZES)
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("naming", NAMINGS, ids=lambda naming: naming.__name__)
def test_every_layer_of_the_published_models_is_found_by_name(naming, norms, model):
  dialect = DIALECTS[0]._replace(naming=naming, norms=norms)
  read, there = dialects.count_names(dialect, model)
  assert read == there > 130
