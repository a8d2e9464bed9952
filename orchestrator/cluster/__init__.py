"""Ray's cluster, for driver, controller and workers: joining it, what has room on it, who answers."""
