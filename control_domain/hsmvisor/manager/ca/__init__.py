"""Certification authorities as plugs (interface.py): built-in, an external command, ACME.  One contract suite holds all of them."""
