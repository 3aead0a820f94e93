"""vip-tracer: which pod did each connection to a virtual IP really go to, and why is the load uneven."""

__version__ = "0.1.0"
