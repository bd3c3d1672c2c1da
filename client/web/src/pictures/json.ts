/** JSON as Python reads and writes it: whole numbers of any size stay apart from fractions, keys keep their order. */
import { fractionText } from "./texts.ts";

/** A whole number is a bigint, a fraction (`4.0`) a number. */
export type Json = null | boolean | bigint | number | string | readonly Json[] | JsonObject;
export type JsonObject = ReadonlyMap<string, Json>;

const MAX_DEPTH = 900;
/** Of one whole number, as in Python. */
const MAX_DIGITS = 4300;
const PLAIN = /[^"\\\p{Cc}]*/uy;
const NUMBER = /(-?(?:0|[1-9]\d*))(\.\d+)?([eE][-+]?\d+)?/y;
const SPACE = /[ \t\n\r]*/y;
const WORDS: ReadonlyMap<string, Json> = new Map<string, Json>([
  ["null", null],
  ["true", true],
  ["false", false],
  ["NaN", Number.NaN],
  ["Infinity", Number.POSITIVE_INFINITY],
  ["-Infinity", Number.NEGATIVE_INFINITY],
]);
const ESCAPED: Readonly<Record<string, string>> = {
  '"': '"',
  "\\": "\\",
  "/": "/",
  b: "\b",
  f: "\f",
  n: "\n",
  r: "\r",
  t: "\t",
};

/** @throws SyntaxError it is no JSON, or nested too deeply. */
export function parseJson(text: string): Json {
  const reader = new Reader(text);
  const value = reader.value(0);
  reader.end();
  return value;
}

export function isObject(value: Json | undefined): value is JsonObject {
  return value instanceof Map;
}

export function isList(value: Json | undefined): value is readonly Json[] {
  return Array.isArray(value);
}

/** Where Python takes a value for true. */
export function isTruthy(value: Json | undefined): boolean {
  if (value === undefined || value === null) return false;
  if (isList(value)) return value.length > 0;
  if (isObject(value)) return value.size > 0;
  return typeof value === "number" && Number.isNaN(value) ? true : Boolean(value);
}

/** The text of a value, two spaces for each level. */
export function jsonText(value: Json, indent = ""): string {
  const deeper = `${indent}  `;
  if (value === null) return "null";
  if (typeof value === "string") return quoted(value);
  if (typeof value === "number") return numberText(value);
  if (isList(value)) {
    if (value.length === 0) return "[]";
    return `[\n${value.map((item) => deeper + jsonText(item, deeper)).join(",\n")}\n${indent}]`;
  }
  if (isObject(value)) {
    if (value.size === 0) return "{}";
    const lines = [...value].map(([key, item]) => `${deeper}${quoted(key)}: ${jsonText(item, deeper)}`);
    return `{\n${lines.join(",\n")}\n${indent}}`;
  }
  return String(value);
}

/** A value as plain JavaScript has it; large whole numbers as text, which the API's JSON takes as well. */
export function fromPlain(value: unknown): Json {
  if (Array.isArray(value)) return value.map(fromPlain);
  if (typeof value === "object" && value !== null) {
    return new Map(Object.entries(value).map(([key, item]) => [key, fromPlain(item)]));
  }
  if (typeof value === "number") return Number.isInteger(value) ? BigInt(value) : value;
  return typeof value === "string" || typeof value === "boolean" || typeof value === "bigint" ? value : null;
}

function numberText(value: number): string {
  if (Number.isNaN(value)) return "NaN";
  if (!Number.isFinite(value)) return value > 0 ? "Infinity" : "-Infinity";
  return fractionText(value);
}

function quoted(text: string): string {
  let written = "";
  for (let at = 0; at < text.length; at++) {
    const unit = text.charAt(at);
    // As Python writes it: DEL and halves of pairs as they are.
    written += unit < " " || unit === '"' || unit === "\\" ? JSON.stringify(unit).slice(1, -1) : unit;
  }
  return `"${written}"`;
}

class Reader {
  private at = 0;
  private readonly text: string;

  constructor(text: string) {
    this.text = text;
  }

  value(depth: number): Json {
    if (depth > MAX_DEPTH) throw new SyntaxError("nested too deeply");
    this.skip(SPACE);
    const begin = this.text[this.at];
    if (begin === '"') return this.string();
    if (begin === "{") return this.object(depth);
    if (begin === "[") return this.list(depth);
    for (const [word, value] of WORDS) {
      if (this.text.startsWith(word, this.at)) {
        this.at += word.length;
        return value;
      }
    }
    return this.number();
  }

  end(): void {
    this.skip(SPACE);
    if (this.at !== this.text.length) throw new SyntaxError("more than one value");
  }

  private skip(pattern: RegExp): string {
    pattern.lastIndex = this.at;
    const found = pattern.exec(this.text)?.[0] ?? "";
    this.at += found.length;
    return found;
  }

  private take(wanted: string): boolean {
    if (this.text[this.at] !== wanted) return false;
    this.at += 1;
    return true;
  }

  private number(): Json {
    NUMBER.lastIndex = this.at;
    const found = NUMBER.exec(this.text);
    if (found === null) throw new SyntaxError("no value");
    this.at += found[0].length;
    if (found[2] !== undefined || found[3] !== undefined) return Number(found[0]);
    if (found[0].replace("-", "").length > MAX_DIGITS) throw new SyntaxError("a number of too many digits");
    return BigInt(found[0]);
  }

  private string(): string {
    this.at += 1;
    const parts: string[] = [];
    for (;;) {
      parts.push(this.skip(PLAIN));
      const next = this.text[this.at];
      if (this.take('"')) return parts.join("");
      if (this.take("\\")) parts.push(this.escaped());
      else if (next !== undefined && next >= "\u007f") {
        parts.push(next); // controls that JSON allows
        this.at += 1;
      } else throw new SyntaxError("a string that does not end");
    }
  }

  private escaped(): string {
    const kind = this.text[this.at++] ?? "";
    const plain = ESCAPED[kind];
    if (plain !== undefined) return plain;
    const code = this.text.slice(this.at, this.at + 4);
    if (kind !== "u" || !/^[0-9A-Fa-f]{4}$/.test(code)) throw new SyntaxError("an unknown escape");
    this.at += 4;
    return String.fromCharCode(Number.parseInt(code, 16));
  }

  private list(depth: number): Json {
    this.at += 1;
    const items: Json[] = [];
    this.skip(SPACE);
    if (this.take("]")) return items;
    for (;;) {
      items.push(this.value(depth + 1));
      this.skip(SPACE);
      if (this.take("]")) return items;
      if (!this.take(",")) throw new SyntaxError("a list that does not end");
    }
  }

  private object(depth: number): Json {
    this.at += 1;
    const items = new Map<string, Json>();
    this.skip(SPACE);
    if (this.take("}")) return items;
    for (;;) {
      this.skip(SPACE);
      if (this.text[this.at] !== '"') throw new SyntaxError("an object without a name");
      const name = this.string();
      this.skip(SPACE);
      if (!this.take(":")) throw new SyntaxError("an object without a value");
      items.set(name, this.value(depth + 1));
      this.skip(SPACE);
      if (this.take("}")) return items;
      if (!this.take(",")) throw new SyntaxError("an object that does not end");
    }
  }
}
