"""The trainer's own image: what ai-toolkit computes when it draws samples during training.

`forward` is the transformer in the trainer's sequence of operations, and `paths` are adapters beside the quantized
weights; the quantizers that a training config can name are in `weights.quantizers`. `exact` and `fused` are
the two profiles. Facts and formulas were read from the trainer and its libraries, and vectors that the trainer's
own code recorded prove them.
"""
