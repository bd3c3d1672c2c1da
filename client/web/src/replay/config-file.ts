/**
 * Reads a training run's config, which strangers wrote: YAML or JSON within limits, as plain values.
 *
 * The same limits and values as the Python client's `replay/config_file.py`. A page has no environment: `${NAME}`
 * stays as written.
 */
import {
  ConfigError,
  MAX_CONFIG_BYTES,
  MAX_DEPTH,
  MAX_NODES,
  MAX_NUMBER_CHARS,
  oneLine,
} from "./config-limits.ts";
import { isMap, type Plain, type PlainMap } from "./python-values.ts";
import { yamlValue } from "./yaml-values.ts";

/**
 * The values of a config file.
 *
 * @param name what it is called; `.json` is read as JSON, everything else as YAML.
 * @throws ConfigError it is too large, too deep, or no mapping.
 */
export function readConfig(content: Uint8Array, name: string): PlainMap {
  if (content.length > MAX_CONFIG_BYTES)
    throw new ConfigError(
      `${name} has more than ${MAX_CONFIG_BYTES} bytes; a training config has a few thousand`,
    );
  let text: string;
  try {
    text = new TextDecoder("utf-8", { fatal: true }).decode(content);
  } catch {
    throw new ConfigError(`${name} is no text in UTF-8`);
  }
  let values: Plain;
  try {
    values = name.endsWith(".json") ? jsonValue(text) : yamlValue(text);
  } catch (error) {
    // Engines say by a RangeError that the stack is full.
    if (error instanceof RangeError)
      throw new ConfigError(`${name} is nested more than ${MAX_DEPTH} levels deep`);
    throw new ConfigError(`${name}: ${oneLine(error)}`);
  }
  if (!isMap(values)) throw new ConfigError(`${name} holds no settings`);
  return values;
}

/** All texts with `[name]` replaced by the job's name, keys included. */
export function withName(values: Plain, name: string): Plain {
  if (typeof values === "string") return values.replaceAll("[name]", () => name);
  if (Array.isArray(values)) return values.map((value: Plain) => withName(value, name));
  if (isMap(values))
    return new Map(
      [...values].map(([key, value]) => [key.replaceAll("[name]", () => name), withName(value, name)]),
    );
  return values;
}

/** The names of `${NAME}` that stand in a text. */
export function unresolvedIn(text: string): readonly string[] {
  return [...new Set([...text.matchAll(/\$\{([^}]+)\}/g)].map((found) => found[1] ?? ""))];
}

/** Stands before a number while the text is parsed: `JSON.parse` alone would not tell 4 from 4.0. */
const NUMBER_MARK = "\0number ";

function jsonValue(text: string): Plain {
  const marked = text.replace(
    /"(?:[^"\\]|\\[\s\S])*"?|-?(?:Infinity|NaN|\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)/g,
    (token) => (token.startsWith('"') ? token : `"\\u0000number ${token}"`),
  );
  return plainOf(JSON.parse(marked), { left: MAX_NODES }, 0);
}

function plainOf(value: unknown, budget: { left: number }, depth: number): Plain {
  budget.left -= 1;
  if (budget.left < 0) throw new ConfigError(`more than ${MAX_NODES} values`);
  if (depth > MAX_DEPTH) throw new ConfigError(`nested more than ${MAX_DEPTH} levels deep`);
  if (typeof value === "string") {
    if (!value.startsWith(NUMBER_MARK)) return value;
    const digits = value.slice(NUMBER_MARK.length);
    if (digits.length > MAX_NUMBER_CHARS) throw new ConfigError("a number of more digits than a setting has");
    return /^-?\d+$/.test(digits) ? BigInt(digits) : Number(digits);
  }
  if (value === null || typeof value === "boolean") return value;
  if (Array.isArray(value)) return value.map((item) => plainOf(item, budget, depth + 1));
  return new Map(
    Object.entries(value as object).map(([key, item]) => {
      if (key.startsWith(NUMBER_MARK)) throw new ConfigError("a name that is no text");
      return [key, plainOf(item, budget, depth + 1)];
    }),
  );
}
