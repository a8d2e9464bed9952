"""What fits GPUs with little memory, and how well the plan foretells it."""
