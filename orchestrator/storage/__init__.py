"""Any storage that fsspec knows: places, files, retries. Knows neither tensors nor ranks."""
