"""What files hold that is known and not supported, so that it can be named rather than counted."""

from __future__ import annotations

TEXT_ENCODER = "text encoder"
_PREFIXES = {
    "lora_te": TEXT_ENCODER,
    "lora_prior_te": TEXT_ENCODER,
    "lycoris_te": TEXT_ENCODER,
    "text_encoder": TEXT_ENCODER,
    "text_encoders.": TEXT_ENCODER,
    "text_model.": TEXT_ENCODER,
    "t5.": TEXT_ENCODER,
    "t5xxl.": TEXT_ENCODER,
    "clip_l.": TEXT_ENCODER,
    "clip_g.": TEXT_ENCODER,
    "conditioner.": TEXT_ENCODER,
    "cond_stage_model.": TEXT_ENCODER,
    "bundle_emb": "embeddings",
    "emb_params": "embeddings",
}
_MODULATION = "modulation layers, which Chroma does not have"
_WITHIN = {
    **dict.fromkeys(("img_mod", "txt_mod", "modulation", "norm1.linear", "norm1_linear"), _MODULATION),
    **dict.fromkeys(("norm1_context", ".norm.linear", "_norm_linear", "norm_out"), _MODULATION),
    **dict.fromkeys(("time_in", "guidance_in", "vector_in", "time_text_embed", "adaLN"), _MODULATION),
}
SUFFIXES = {
    **dict.fromkeys((".oft_blocks", ".oft_diag", ".oft_R", ".oft_R.weight", ".rescale"), "OFT"),
    **dict.fromkeys((".boft_R", ".boft_s", ".boft_blocks"), "BOFT"),
    **dict.fromkeys((".a1.weight", ".a2.weight", ".b1.weight", ".b2.weight", ".bm.weight"), "GLoRA"),
    **dict.fromkeys((".lora_mid.weight", ".hada_t1", ".hada_t2", ".lokr_t1", ".lokr_t2"), "Tucker factors"),
    **dict.fromkeys((".vera_lambda_b", ".vera_lambda_d"), "VeRA"),
    **dict.fromkeys((".on_input", ".ia3_l"), "IA3"),
    ".scalar": "scalars",
    ".w_norm": "norms",
    ".b_norm": "norms",
    ".reshape_weight": "reshaped weights",
    ".set_weight": "replaced weights",
}
"""How the keys of methods end that change a module in a way that is not built here."""


def reason(key: str) -> str | None:
    """Why a key that belongs to no module of this model is there, where that is known by its name."""
    for prefix, name in _PREFIXES.items():
        if key.startswith(prefix):
            return name
    for fragment, name in _WITHIN.items():
        if fragment in key:
            return name
    return None
