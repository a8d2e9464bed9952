"""The user's own process: it checks, starts or joins a cluster, hands the run to Ray Train, shows what comes."""
