"""Ranks: who is who, what they agree on, what they average. Knows neither Ray nor checkpoints."""
