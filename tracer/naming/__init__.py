"""Which pod, which service, at that time: Kubernetes' names for addresses, ports and cgroups."""

#: What the kubelet tells every container where the API server is.
IN_CLUSTER = "KUBERNETES_SERVICE_HOST"
