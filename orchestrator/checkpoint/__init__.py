"""The training state, kept safe in node memory and in fsspec storage, and brought back. Knows no Ray.

state           the live state: built, captured, filled
snapshot        the form in which a state travels; tensor_slice: a piece of a tensor, and who holds it
store           the checkpoints in a run's folder; tensor_file: one file of tensors
rollbacks       stretches of a run that were undone; orphans: files that killed attempts leave
save/           while training goes on: when (policy), who writes what (plan), to_memory, to_storage, rescue
restore/        at the start of an attempt: the newest whole state of the run, or the one that init_from names
formats/        other programs' files: nanoGPT's ckpt.pt, Hugging Face folders; sources: what a path or name stands for
"""
