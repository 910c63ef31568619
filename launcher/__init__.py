"""The launcher: parent of every Headgate process. It starts, watches, restarts and drains them.

It never handles a request and imports neither the router nor the shard.
"""
