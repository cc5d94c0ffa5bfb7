"""jaxrl: length-aware reinforcement learning with verifiable rewards, in JAX."""
