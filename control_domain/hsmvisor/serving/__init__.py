"""What every service of ours is made of: listeners, who calls and may, errors, requests, events, the audit log.

It knows none of the services.  Where one speaks of itself, to people or in the audit log, it was told its name (`service`).
"""
