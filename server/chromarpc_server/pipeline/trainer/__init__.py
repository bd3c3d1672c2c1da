"""The trainer's own picture: what ai-toolkit computes when it draws samples during training.

`quantizers` are the weight quantizers that a training config can name, `forward` is the transformer in the
trainer's sequence of operations, and `paths` are adapters beside the quantized weights. `exact` and `fused` are
the two profiles. Facts and formulas were read from the trainer and its libraries, and vectors that the trainer's
own code recorded prove them.
"""
