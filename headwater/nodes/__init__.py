"""The processes of a cluster: coordinator, servers and workers, each startable in a thread as well."""
