"""Task-balancing methods: the interface is `method`, the names are in `registry`, one file per method.

CoTBal's weights (Eq. 3-11) are in `cotbal`; they are computed before a training and fixed in it.
"""
