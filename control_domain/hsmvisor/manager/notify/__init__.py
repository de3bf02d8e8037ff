"""Telling of events: webhooks and mail, from a queue in the database that all managers share.

Each notice is sent once; after a kill between the sending and its mark it is sent again, with the same id.  They come in no order.
"""
