"""Whether a GPU keeps what we promise: `gpu` is the benchmark, and starts the sections in the other modules."""
