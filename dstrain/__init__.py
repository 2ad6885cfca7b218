"""dstrain: pretrain an encoder on your own data, on your own cluster, for as little money as possible.

Import from the module that owns a name; this file stays empty on purpose.
"""
