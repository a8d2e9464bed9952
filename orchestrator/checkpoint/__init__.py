"""The checkpoint adapter: training state <-> tensors <-> files in fsspec storage. Knows no Ray."""
