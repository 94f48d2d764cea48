"""Processes of a simulated cluster: what real nodes do with threads and sockets, without either."""
