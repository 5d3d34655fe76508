"""Programs: a job's configuration and main(); the only place where concrete objects are built and wired."""
