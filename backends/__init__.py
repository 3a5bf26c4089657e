"""The backends: each writes a Program for one runtime and loads it there."""
