/** What a config may be, and the error of one that is not. */

export const MAX_CONFIG_BYTES = 1024 ** 2;
export const MAX_DEPTH = 48;
/** Values of a config, an alias counted as all that it stands for. */
export const MAX_NODES = 40_000;
/** Digits of a number of a setting. */
export const MAX_NUMBER_CHARS = 64;

/** The config cannot be read, or is none of ai-toolkit; a sentence for people. */
export class ConfigError extends Error {}

/** An error's text, as one line of a report. */
export function oneLine(error: unknown): string {
  const text = error instanceof Error ? error.message : String(error);
  return text.split(/\s+/).filter(Boolean).join(" ").slice(0, 300);
}
