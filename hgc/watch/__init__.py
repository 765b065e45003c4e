"""What features depend on, and whether it changed."""
