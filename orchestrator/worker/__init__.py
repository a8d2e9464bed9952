"""One process per rank: what Ray, torchrun or a shell starts, around a call of the training loop."""
