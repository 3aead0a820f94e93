"""A miniature cluster on this machine: real namespaces, real kube-proxy rules, real connections.

It serves `vip-tracer demo`, the tests and the benchmarks. It knows nothing of tracing. This file imports
nothing, because the processes inside the pods import this package and must start quickly.
"""
