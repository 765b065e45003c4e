"""What is computed at each evaluation: configurations, presets and plans; imports no torch."""
