"""Bytes between processes: frames, the sockets that carry them, and shared memory on one machine."""
