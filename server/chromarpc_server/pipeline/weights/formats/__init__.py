"""Formats in which people keep Chroma's weights: from the tensors of files to those of the model, as recipes.

`codes` resolves how single tensors are quantized, `prefixes` finds a part in a file that holds several, and each
part has a module that maps the names its files may have to the model's own.
"""
