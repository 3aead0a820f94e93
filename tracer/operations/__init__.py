"""What an operator sees of a running process: metrics, health, the line it starts with.

Reads what the stages tell of themselves; no stage knows of it.
"""
