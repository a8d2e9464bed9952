"""This machine: its processors, its GPUs, where it keeps compiled code. Knows neither Ray nor runs."""
