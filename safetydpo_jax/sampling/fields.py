"""The fields of scheduler_config.json, in the groups that diffusers' classes share.

First what classes read, with their defaults, then the values that are supported, where
not all are. `METHODS` in `methods.py` puts them together for each sampler.
"""

from typing import Any

import numpy as np

from safetydpo_jax.errors import InputError

BASIS = {
  "num_train_timesteps": 1000,
  "beta_start": 0.0001,
  "beta_end": 0.02,
  "beta_schedule": "linear",
  "trained_betas": None,
  "prediction_type": "epsilon",
}
LATENT = {"beta_start": 0.00085, "beta_end": 0.012}
SPACED = {"timestep_spacing": "linspace", "steps_offset": 0}
LEADING = {"timestep_spacing": "leading", "steps_offset": 0}
ZERO_SNR = {"rescale_betas_zero_snr": False}
CLIP = {"clip_sample": False, "clip_sample_range": 1.0}
# Most classes read the last two from a config without having them in their signature.
SPREAD = {
  "use_karras_sigmas": False,
  "use_exponential_sigmas": False,
  "use_beta_sigmas": False,
  "sigma_min": None,
  "sigma_max": None,
}
FINAL = {"final_sigmas_type": "zero"}
SOLVER = {"solver_order": 2, "lower_order_final": True}
DPM = {
  **BASIS,
  **SPREAD,
  **FINAL,
  **SOLVER,
  "algorithm_type": "dpmsolver++",
  "solver_type": "midpoint",
  "lambda_min_clipped": float("-inf"),
}
MULTISTEP = {
  **DPM,
  **SPACED,
  **ZERO_SNR,
  "euler_at_final": False,
  "use_lu_lambdas": False,
}
DISTILLED = {
  **BASIS,
  **LATENT,
  **ZERO_SNR,
  "beta_schedule": "scaled_linear",
  "original_inference_steps": 50,
}

LARGEST = 1e9  # of numbers; those of published files are below 1e5
ABSENT = (None, False)
NOT_SAMPLE = {"prediction_type": ("epsilon", "v_prediction")}
NO_THRESHOLDING = {"thresholding": ABSENT}
NO_FLOW = {"use_flow_sigmas": ABSENT, "use_dynamic_shifting": ABSENT}
ENDS = {"final_sigmas_type": ("zero", "sigma_min")}
ORDERS = {"solver_order": (1, 2, 3)}
# A class takes the solver types of the others for its own default.
SOLVERS = {"solver_type": ("midpoint", "heun", "logrho", "bh1", "bh2")}
ALGORITHMS = {
  "algorithm_type": (
    "dpmsolver++",
    "dpmsolver",
    "sde-dpmsolver++",
    "sde-dpmsolver",
    "deis",
  )
}
FIXED = (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log")
DPM_ACCEPTED = {
  **NO_THRESHOLDING,
  **NO_FLOW,
  **ENDS,
  **ORDERS,
  **SOLVERS,
  **ALGORITHMS,
  "variance_type": FIXED,  # the others are for UNets that predict a variance as well
}


def check_type(field: str, value: Any, default: Any) -> Any:
  """`value`, if it is of the type of a field with this default; null is false.

  Raises:
    InputError: it is not.
  """
  # JSON's integers have no largest, and NaN is none; lambda_min_clipped is -Infinity.
  number = type(value) in (int, float) and (abs(value) <= LARGEST or value == -np.inf)
  fits = {
    bool: value is None or isinstance(value, bool),
    int: number and np.isfinite(value) and value == int(value),
    float: number,
    str: isinstance(value, str) or value is None,
    tuple: isinstance(value, tuple),
    type(None): value is None or number or field == "trained_betas",
  }
  if not fits[type(default)]:
    raise InputError(
      f"scheduler_config.json: {field} = {value!r}; expected a value like {default!r}"
    )
  return int(value) if type(default) is int else value
