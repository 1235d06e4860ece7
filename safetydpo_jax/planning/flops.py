"""Floating-point operations of a traced function: products and convolutions.

    dot          2 · |out| · contracted
    convolution  2 · |out| · kernel positions · input channels / input dilation

Loops are multiplied out, rematerialised parts are counted as often as they run, and
Pallas kernels, which XLA's own count leaves out, by their grid. Elementwise work is not
counted: the matrix units do not do it.
"""

import math
from collections.abc import Iterator
from typing import Any

from jax.extend.core import Jaxpr, JaxprEqn


def count_flops(jaxpr: Jaxpr) -> float:
  """Operations of a jaxpr, on all devices together."""
  return sum(_equation(equation) for equation in jaxpr.eqns)


def _equation(equation: JaxprEqn) -> float:
  name, params = equation.primitive.name, equation.params
  inputs: list[Any] = [variable.aval for variable in equation.invars]
  outputs: list[Any] = [variable.aval for variable in equation.outvars]
  if name == "dot_general":
    (contracted, _), _ = params["dimension_numbers"]
    shape = inputs[0].shape
    return 2 * outputs[0].size * math.prod(shape[i] for i in contracted)
  if name == "conv_general_dilated":
    kernel = inputs[1]
    features = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
    dilation = math.prod(params["lhs_dilation"])
    return 2 * outputs[0].size * kernel.size / features / dilation
  inner = [count_flops(jaxpr) for jaxpr in _jaxprs(equation)]
  if name == "cond":
    return max(inner)
  if name == "scan":
    return sum(inner) * params["length"]
  if name == "pallas_call":
    return sum(inner) * math.prod(params["grid_mapping"].grid)
  if name == "shard_map":
    return sum(inner) * params["mesh"].size
  return sum(inner)


def _jaxprs(equation: JaxprEqn) -> Iterator[Jaxpr]:
  for value in equation.params.values():
    for item in value if isinstance(value, (tuple, list)) else (value,):
      inner = getattr(item, "jaxpr", item)  # a ClosedJaxpr's
      if isinstance(inner, Jaxpr):
        yield inner
