"""Arithmetic about a run that has not begun: memory, traffic, storage, time. Imports neither torch nor Ray."""
