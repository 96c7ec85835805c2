"""The operator as pure functions, one file per axis; `reference` is the definition, `plan` chooses a path.

Letters in shapes: B images, T = P + N tokens (P prefix tokens before N = H*W positions), C channels, h heads of
d = C/h channels, n kernels of the bank, t = size^2 taps, G groups.
"""
