"""Starts, sizes and watches the processes of one server."""
