"""The trainer's own picture: what ai-toolkit computes when it draws samples during training.

`quantizers` are the weight quantizers a training config can name, `forward` is the transformer in the trainer's
sequence of operations, with adapters beside the quantized weights. Facts and formulas were read from the trainer and
its libraries and are proven by vectors that the trainer's own code recorded.
"""
