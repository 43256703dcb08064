"""Raw data sets to records: see docs/data.md.

``base`` says what a converter is, one module per data set says what its raw records mean, ``staging`` reads them
into a database on disk, ``writing`` makes the output files of it, and ``conversion`` is the whole.
"""
