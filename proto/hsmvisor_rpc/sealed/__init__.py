"""What a manager signs and seals and a module verifies and opens: records, commands, envelopes, identities.

The host relays these bytes and never rebuilds them.  This package is imported by both ends and imports
neither of them.
"""
