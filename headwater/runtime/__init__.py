"""The processes of a cluster: coordinator, servers and workers, each startable in a thread as well.

Here is what members of every role share; a folder has what one role alone consists of.
"""
