"""diffusers' networks as pure functions that compute part of an evaluation."""
