"""Which pod, which service, at that time: Kubernetes' names for addresses, ports and cgroups."""
