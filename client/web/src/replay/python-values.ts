/** Values as Python holds them (whole numbers apart from others), and as it writes them into texts: the trainer is Python. */

/** A value of a config: a whole number is a `bigint`, any other number a `number`. */
export type Plain = null | boolean | bigint | number | string | readonly Plain[] | PlainMap;
export type PlainMap = ReadonlyMap<string, Plain>;

/** Longer texts are no numbers of a setting. */
const MAX_NUMBER_CHARS = 64;

/** Whether a value is a mapping. */
export function isMap(value: Plain | undefined): value is PlainMap {
  return value instanceof Map;
}

/** Whether Python takes a value for true. */
export function isTruthy(value: Plain | undefined): boolean {
  if (value === undefined || value === null || value === false || value === "") return false;
  if (typeof value === "bigint") return value !== 0n;
  if (typeof value === "number") return value !== 0;
  if (Array.isArray(value)) return value.length > 0;
  return isMap(value) ? value.size > 0 : true;
}

/** A value inside a text, as `f"{value}"` writes it. */
export function textOf(value: Plain): string {
  return typeof value === "string" ? value : shownOf(value);
}

/** A value as `repr` shows it. */
export function shownOf(value: Plain): string {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value === "bigint") return value.toString();
  if (typeof value === "number") return floatText(value);
  if (typeof value === "string") return quoted(value);
  if (isMap(value))
    return `{${[...value].map(([key, one]) => `${quoted(key)}: ${shownOf(one)}`).join(", ")}}`;
  return `[${value.map(shownOf).join(", ")}]`;
}

function quoted(text: string): string {
  const mark = text.includes("'") && !text.includes('"') ? '"' : "'";
  const known: Readonly<Record<string, string>> = { "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t" };
  const inner = [...text].map((char) => {
    if (known[char] !== undefined) return known[char];
    if (char === mark) return `\\${char}`;
    const code = char.codePointAt(0) ?? 0;
    return code < 32 || code === 127 ? `\\x${code.toString(16).padStart(2, "0")}` : char;
  });
  return `${mark}${inner.join("")}${mark}`;
}

function floatText(value: number): string {
  if (Number.isNaN(value)) return "nan";
  if (!Number.isFinite(value)) return value < 0 ? "-inf" : "inf";
  const [digits = "", exponent = "0"] = value.toExponential().split("e");
  const power = Number(exponent);
  if (power < -4 || power >= 16)
    return `${digits}e${power < 0 ? "-" : "+"}${Math.abs(power).toString().padStart(2, "0")}`;
  const text = Object.is(value, -0) ? "-0" : value.toString();
  return text.includes(".") ? text : `${text}.0`;
}

/** What `int(text)` gives; undefined where it is no whole number. */
export function wholeOf(text: string): bigint | undefined {
  const found = text.length <= MAX_NUMBER_CHARS ? /^\s*([-+]?)(\d+(?:_\d+)*)\s*$/.exec(text) : null;
  if (found?.[2] === undefined) return undefined;
  const size = BigInt(found[2].replaceAll("_", ""));
  return found[1] === "-" ? -size : size;
}

/** What `float(text)` gives; undefined where it is no number. */
export function numberOf(text: string): number | undefined {
  if (text.length > MAX_NUMBER_CHARS) return undefined;
  const bare = text.trim().toLowerCase();
  const special = /^([-+]?)(inf|infinity|nan)$/.exec(bare);
  if (special !== null) {
    if (special[2] === "nan") return Number.NaN;
    return special[1] === "-" ? Number.NEGATIVE_INFINITY : Number.POSITIVE_INFINITY;
  }
  const digits = String.raw`\d+(?:_\d+)*`;
  const isNumber = new RegExp(`^[-+]?(?:${digits}\\.?(?:${digits})?|\\.${digits})(?:e[-+]?${digits})?$`);
  return isNumber.test(bare) ? Number(bare.replaceAll("_", "")) : undefined;
}
