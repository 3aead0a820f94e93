"""One module per family of causes. A detector takes a `Situation` and a measure, and yields hypotheses.

The principle: a factor explains a skew as far as the rest is even once the factor is taken out (or accounted for).
"""
