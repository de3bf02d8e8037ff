"""The issuer: a process of its own that makes private keys which several modules share, or opens those that owners import.

It seals each to its modules at once; the manager itself never sees one.
"""
