"""A TPM 2.0 in a process of its own: libtpms behind what a hypervisor speaks with it."""
