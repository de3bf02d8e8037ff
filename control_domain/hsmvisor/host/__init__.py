"""The supervisor of one host: authenticates, launches, stores, audits.  It parses no guest's byte and opens no envelope."""
