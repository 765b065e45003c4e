"""Plans fitted to a model on its own pictures."""
