"""The kernel's side of the tracer: load, attach, map the ring buffer, read what was there before.

The only place that imports bcc, and it does so in a child process (`loader`, by `compiler`).
"""
