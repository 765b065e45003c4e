"""Timing pipelines with and without the cache."""
