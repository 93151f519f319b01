"""Figures to PNG and GIF; each file draws one kind of them, without global state."""
