/** Names of what pictures are sampled with: those that requests of this service may hold. */

/** The reference's sampler, and its schedule. */
export const FLOWMATCH = "flowmatch";
/** The settings that follow the reference, and no other program. */
export const REFERENCE = "reference";
/** The settings that follow ComfyUI. */
export const COMFYUI = "comfyui";

export const SAMPLERS: readonly string[] = [
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
];
export const SCHEDULES: readonly string[] = [
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
];
