"""The commands that read a run or a model, one verb per file. They start no cluster and change no run."""
