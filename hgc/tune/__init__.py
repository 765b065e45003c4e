"""Plans calibrated on a model, on its own pictures."""
