"""SparseGrad (arXiv:2410.07383): a few entries of a matrix are trained, chosen in a rotated basis.

`staircase` says which entries, `basis` finds the rotation, `linear` has the gradient of the entries, `targets` finds
the matrices in a model. Nothing here knows ZeRO: what it sees is one parameter of K values for each matrix.
"""
