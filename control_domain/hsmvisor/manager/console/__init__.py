"""The web console: pages for owners and operators, rendered here, with nothing loaded from elsewhere.

It asks the same objects that the control API asks, of which each says for itself who may see and change what.
"""
