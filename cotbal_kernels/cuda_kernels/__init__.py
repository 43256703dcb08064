"""The kernels of csrc/ for Python: ``build`` compiles them, ``library`` loads and launches them; ``head`` puts launches
and ``products`` of the library together for a linear head, ``gradients`` and ``slices`` plan its dX and dW.
"""
