"""What the model costs: a training step and its memory, a step of GPT-2 XL, sampling."""
