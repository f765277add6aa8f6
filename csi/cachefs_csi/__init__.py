"""The CSI driver: volumes of Kubernetes on a cachefs cluster. It asks the master for volumes, and the node's mount
service for mounts; it holds neither.
"""
