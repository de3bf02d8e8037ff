"""The host's half of the management plane: it joins a manager, tells it of its guests, and carries out what it signs.

The manager is believed as far as signatures go: each module judges by itself what it is told (hsmvisor_rpc.sealed.commands).
"""
