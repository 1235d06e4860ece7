"""Operations counted from a jaxpr, against arithmetic by hand."""

import jax
import jax.numpy as jnp

from safetydpo_jax.planning import flops


def test_operations_of_products_loops_and_convolutions():
  x, w = jnp.zeros((3, 5)), jnp.zeros((5, 5))

  def loop(x, w):
    return jax.lax.scan(lambda x, _: (x @ w, None), x, length=7)[0] @ w

  assert flops.count_flops(jax.make_jaxpr(loop)(x, w).jaxpr) == 8 * 2 * 3 * 5 * 5
  image, kernel = jnp.zeros((2, 8, 8, 4)), jnp.zeros((3, 3, 4, 6))
  convolve = jax.make_jaxpr(
    lambda x, k: jax.lax.conv_general_dilated(
      x, k, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
  )(image, kernel)
  assert flops.count_flops(convolve.jaxpr) == 2 * (2 * 4 * 4 * 6) * (3 * 3 * 4)


def test_operations_of_rematerialised_products_count_twice():
  x, w = jnp.zeros((3, 5)), jnp.zeros((5, 5))

  def loss(function):
    return lambda x, w: jnp.sin(function(x, w) @ w).sum()

  def count(function):
    return flops.count_flops(jax.make_jaxpr(jax.grad(loss(function)))(x, w).jaxpr)

  def product(x, w):
    return jnp.sin(jnp.sin(x @ w) @ w)

  once = 2 * 3 * 5 * 5
  assert count(jax.checkpoint(product)) - count(product) >= once
