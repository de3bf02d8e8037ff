"""The management plane of a fleet: who may have which key and certificate, where they come from, and that they are renewed."""
