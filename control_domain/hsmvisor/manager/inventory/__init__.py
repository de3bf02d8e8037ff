"""Hosts and the resources that they report: first contact, identity certificates, what an exchange tells."""
