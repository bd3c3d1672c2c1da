"""Names of what images are sampled with: those that requests may hold, and those that nobody needs to say."""

from __future__ import annotations

from typing import Final

FLOWMATCH: Final = "flowmatch"
"""The reference's sampler, and its schedule; all that older servers have."""
REFERENCE: Final = "reference"
"""The settings that follow the reference, and no other program."""
COMFYUI: Final = "comfyui"
"""The settings that follow ComfyUI."""
SAMPLERS: Final = (
    FLOWMATCH,
    "euler",
    "heun",
    "heunpp2",
    "dpm_2",
    "lms",
    "dpmpp_2m",
    "ipndm",
    "ipndm_v",
    "deis",
    "res_multistep",
    "gradient_estimation",
    "ddim",
    "uni_pc",
    "uni_pc_bh2",
)
"""All but the reference's are ComfyUI's. A newer server may have more of them, and lists them."""
SCHEDULES: Final = (
    FLOWMATCH,
    "simple",
    "beta",
    "normal",
    "sgm_uniform",
    "ddim_uniform",
    "kl_optimal",
    "linear_quadratic",
    "karras",
    "exponential",
)
"""All but the reference's are ComfyUI's."""
