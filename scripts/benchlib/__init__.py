"""The bench and the soak: hsmvisor beside SoftHSM2, interleaved in one run."""
