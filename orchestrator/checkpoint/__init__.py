"""The checkpoint adapter: training state <-> tensors <-> files, in node memory and in fsspec storage. Knows no Ray.

state, snapshot              the live state, and the form in which it travels
saver, schedule, pace        keep it safe while training goes on: what, when, how often
copying, memory, nodes       into the memory of every node
durable, ownership           into storage, each tensor by its owner
store, files                 a run's folder; one file of tensors
restore, start               begin an attempt: the newest whole state, or what init_from names
nanogpt, huggingface         other programs' formats; stream, torch_file, transfer, progress serve them
leftovers, behind            what killed attempts leave; a thread that runs calls in order
"""
