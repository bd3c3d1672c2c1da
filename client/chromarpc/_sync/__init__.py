"""The blocking client's parts: generated from `chromarpc._async`, but for the two modules that differ."""
