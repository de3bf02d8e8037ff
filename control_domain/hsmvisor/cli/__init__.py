"""The `hsmvisor` command."""
