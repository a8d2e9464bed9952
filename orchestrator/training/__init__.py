"""The parts of the loop: what loop.py names. Knows no Ray."""
