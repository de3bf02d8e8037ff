"""What the processes of one host say to each other: supervisor, launcher, key provider, workers."""
