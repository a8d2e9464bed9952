"""States as other programs write and read them, and how large files of tensors are streamed."""
