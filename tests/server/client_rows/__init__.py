"""Rows of the clients' tables: each module runs in an environment that has its client.

A row is a function `row_...(url)` that raises where a feature fails. The modules import nothing of
this project.
"""
