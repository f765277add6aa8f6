"""The file systems that are compared: one adapter each, in a module of its own, all over the same S3 server."""
