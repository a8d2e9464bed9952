"""Any storage that fsspec knows. Knows neither tensors nor ranks.

run_folder           a run's folder: opened once per process, it retries and raises our errors
writable, orphans    whether a run can write there; the files of killed attempts
transfer             single files and folders, to and from this machine
retry                exponential backoff
location             the client that a path or URL means, new credentials, new connections
reasons              why storage has failed: in words, and as our errors
identity             whether two paths are one place
options, paths       settings: storage_options, and paths as users write them
"""
