"""What a loss costs, beside plain Ray Train: `recovery` times one loss, `goodput` runs under many."""
