"""SafetyDPO in JAX."""
