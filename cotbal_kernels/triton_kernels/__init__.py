"""The kernels, each with its cost; ``head`` launches those of a linear head; ``tiles``, ``configs`` and ``slices``
choose sizes; ``ahead_of_time`` and ``sass`` say what kernels take. Imported only where they are launched.
"""
