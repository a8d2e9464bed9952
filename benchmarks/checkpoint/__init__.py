"""What checkpoints cost, beside torch.save and PyTorch's DCP: `checkpoint` and, at full size, `checkpoint_xl`."""
