"""The commands that talk to a fleet's manager: hsmvisor fleet, request, and half of policy."""
