"""What happened in the fleet: written in the transaction of what it tells, read back in pages, followed as a stream."""
