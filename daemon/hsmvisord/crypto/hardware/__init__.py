"""The cryptoprocessor that is an HSM of the host, as a worker has it: a socket that ends in the module's helper (hsmvisord.hsm)."""
