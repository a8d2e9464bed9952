"""Side-by-side measurements, run by `python -m benchmarks NAME`. Nothing of the product imports them."""
