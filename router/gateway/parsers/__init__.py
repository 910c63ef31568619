"""Parsers of answers: text pieces in, content, reasoning and tool calls out.

deltas.py says what comes out, one file each knows a model family's format, choice.py picks one
for a request. They know neither HTTP nor any API's JSON.
"""
