/** What images are sampled with where nobody says, which is all that older servers have. */

/** The reference's sampler, and its schedule. */
export const FLOWMATCH = "flowmatch";
/** The settings that follow the reference, and no other program. */
export const REFERENCE = "reference";
