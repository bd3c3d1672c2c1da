"""Cuts: the process, and the power, at every write of the store; then a start has to hold what was acknowledged.

`recorder` records what a process does to files; `scenario` is that process; `disk` computes what a cut leaves;
`promises` is what was acknowledged by then; `judge` starts on what is left; `explore` does it for every operation.
"""
