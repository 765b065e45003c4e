"""What is known and held while a pipeline runs: its runs, caches and forecasts; knows no model."""
