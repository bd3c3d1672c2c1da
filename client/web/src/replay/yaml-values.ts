/**
 * YAML as ai-toolkit's loader understands it: YAML 1.1 as PyYAML resolves it, and `1e-4` is a number.
 *
 * The library only finds out where texts, lists and mappings are. What a text means, what an alias stands for and how
 * much there may be of it is decided here.
 */
import {
  type Alias,
  isAlias,
  isMap as isMapping,
  isScalar,
  isSeq,
  Lexer,
  type ParsedNode,
  parseDocument,
  type Scalar,
  type YAMLMap,
} from "yaml";
import { ConfigError, MAX_DEPTH, MAX_NODES, MAX_NUMBER_CHARS, oneLine } from "./config-limits.ts";
import { type Plain, shownOf } from "./python-values.ts";

type Kind = "bool" | "float" | "int" | "merge" | "null" | "str" | "timestamp" | "value";
type YamlNode = ParsedNode | null;
/** Anything but an alias. */
type Meant = Exclude<YamlNode, Alias.Parsed>;

/** What the library's lexer takes a text apart into; a config of `MAX_NODES` values has fewer. */
const MAX_PARTS = 300_000;
/** The lexer's mark before a single value. */
const SCALAR_FOLLOWS = "\u001f";
const TAG = "tag:yaml.org,2002:";
/** Explicit tags of single values; of these alone the meaning is known. */
const SCALAR_TAGS: readonly Kind[] = ["bool", "float", "int", "null", "str", "timestamp"];
/** In the order in which they are tried. */
const IMPLICIT: readonly (readonly [Kind, RegExp])[] = [
  ["bool", /^(?:yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF)$/],
  [
    "float",
    /^(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+][0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+][0-9]+)?|[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+\.[0-9_]*|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$/,
  ],
  [
    "int",
    /^(?:[-+]?0b[0-1_]+|[-+]?0[0-7_]+|[-+]?(?:0|[1-9][0-9_]*)|[-+]?0x[0-9a-fA-F_]+|[-+]?[1-9][0-9_]*(?::[0-5]?[0-9])+)$/,
  ],
  ["merge", /^<<$/],
  ["null", /^(?:~|null|Null|NULL|)$/],
  [
    "timestamp",
    /^(?:\d{4}-\d\d-\d\d|\d{4}-\d\d?-\d\d?(?:[Tt]|[ \t]+)\d\d?:\d\d:\d\d(?:\.\d*)?(?:[ \t]*(?:Z|[-+]\d\d?(?::\d\d)?))?)$/,
  ],
  ["value", /^=$/],
  // YAML 1.1 takes `1e-4` for text; ai-toolkit takes it for a number.
  ["float", /^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9_]+)[eE][-+]?[0-9]+$/],
];

/**
 * The value of a YAML text.
 *
 * @throws ConfigError it is none, or more or deeper than allowed.
 * @throws RangeError it is so deep that the stack is full.
 */
export function yamlValue(text: string): Plain {
  checkAmount(text);
  const document = parseDocument(text, {
    version: "1.1",
    schema: "failsafe",
    customTags: SCALAR_TAGS.map((name) => ({ tag: `${TAG}${name}`, resolve: (found: string) => found })),
    merge: false,
    uniqueKeys: false,
    prettyErrors: false,
    logLevel: "error",
  });
  const [error] = [
    ...document.errors,
    ...document.warnings.filter(({ code }) => code === "TAG_RESOLVE_FAILED"),
  ];
  if (error !== undefined) {
    if (/call stack/.test(error.message)) throw new RangeError(error.message);
    throw unreadable(oneLine(error));
  }
  const root = document.contents;
  if (root === null) return null;
  return new Values(root).value();
}

/** Gives up early on what would take the library long to read, and be refused then. */
function checkAmount(text: string): void {
  let [parts, values, flows, inLine] = [0, 0, 0, 0];
  for (const part of new Lexer().lex(text)) {
    parts += 1;
    if (parts > MAX_PARTS) throw new ConfigError("more lines and marks than a config has");
    if (part === SCALAR_FOLLOWS || part === "[" || part === "{" || part.startsWith("*")) values += 1;
    if (values > MAX_NODES) throw new ConfigError(`more than ${MAX_NODES} values`);
    if (part === "[" || part === "{") flows += 1;
    if (part === "]" || part === "}") flows -= 1;
    if (flows < 0) throw unreadable(`unexpected '${part}'`);
    inLine = part === "\n" || part === "\r\n" ? 0 : inLine + Number(part === "-" || part === "?");
    if (flows > MAX_DEPTH || inLine > MAX_DEPTH)
      throw new ConfigError(`nested more than ${MAX_DEPTH} levels deep`);
  }
}

/** A document's nodes, with what their aliases stand for. */
class Values {
  readonly #root: ParsedNode;
  readonly #anchors = new Map<string, Meant>();
  readonly #meant = new Map<Alias.Parsed, Meant>();
  readonly #sizes = new Map<Meant, number>();
  readonly #open = new Set<Meant>();
  #nodes = 0;

  constructor(root: ParsedNode) {
    this.#root = root;
    this.#look(root, 1);
    this.#size(root, 0);
  }

  value(): Plain {
    return this.#value(this.#root);
  }

  /** Counts what is written, and notes what each alias stands for. */
  #look(node: YamlNode, depth: number): void {
    if (depth > MAX_DEPTH) throw new ConfigError(`nested more than ${MAX_DEPTH} levels deep`);
    this.#nodes += 1;
    if (this.#nodes > MAX_NODES) throw new ConfigError(`more than ${MAX_NODES} values`);
    if (isAlias(node)) {
      const meant = this.#anchors.get(node.source);
      if (meant === undefined) throw unreadable(`found undefined alias '${node.source}'`);
      this.#meant.set(node, meant);
      return;
    }
    if (node?.anchor) {
      if (this.#anchors.has(node.anchor)) throw unreadable(`found duplicate anchor '${node.anchor}'`);
      this.#anchors.set(node.anchor, node);
    }
    for (const child of childrenOf(node)) this.#look(child, depth + 1);
  }

  /** How many values a node stands for, aliases spelt out. */
  #size(written: YamlNode, depth: number): number {
    const node = this.#resolved(written);
    const known = this.#sizes.get(node);
    if (known !== undefined) return known;
    if (this.#open.has(node)) throw new ConfigError("a value holds itself");
    if (depth > MAX_DEPTH) throw new ConfigError(`nested more than ${MAX_DEPTH} levels deep`);
    if (node === null) return 1;
    if (isScalar(node)) {
      const kind = kindOf(node);
      if ((kind === "int" || kind === "float") && String(node.value).length > MAX_NUMBER_CHARS)
        throw new ConfigError("a number of more digits than a setting has");
      return 1;
    }
    this.#open.add(node);
    let total = 1;
    for (const child of childrenOf(node)) {
      total += this.#size(child, depth + 1);
      if (total > MAX_NODES) throw new ConfigError(`aliases that stand for more than ${MAX_NODES} values`);
    }
    this.#open.delete(node);
    this.#sizes.set(node, total);
    return total;
  }

  #resolved(node: YamlNode): Meant {
    return isAlias(node) ? (this.#meant.get(node) ?? null) : node;
  }

  #value(written: YamlNode): Plain {
    const node = this.#resolved(written);
    if (node === null) return null;
    if (isScalar(node)) return scalarValue(String(node.value ?? ""), kindOf(node));
    if (isSeq(node)) {
      checkTag(node, "seq");
      return node.items.map((item) => this.#value(item as YamlNode));
    }
    checkTag(node, "map");
    return new Map(
      this.#pairs(node).map(([key, value]) => {
        const name = this.#value(key);
        if (typeof name === "object" && name !== null) throw unreadable("found unhashable key");
        return [keyOf(name), this.#value(value)];
      }),
    );
  }

  /** A mapping's pairs, merged ones first: own ones come later and count. */
  #pairs(node: YAMLMap.Parsed): (readonly [YamlNode, YamlNode])[] {
    const own: (readonly [YamlNode, YamlNode])[] = [];
    const merged: (readonly [YamlNode, YamlNode])[] = [];
    for (const { key, value } of node.items) {
      if (isScalar(key) && kindOf(key as Scalar.Parsed) === "merge") {
        const from = this.#resolved(value);
        const parts = isSeq(from)
          ? from.items.map((item) => this.#resolved(item as YamlNode)).reverse()
          : [from];
        for (const part of parts) {
          if (!isMapping(part)) throw unreadable("expected a mapping for merging");
          merged.push(...this.#pairs(part as YAMLMap.Parsed));
        }
      } else {
        own.push([key, value]);
      }
    }
    return [...merged, ...own];
  }
}

function childrenOf(node: Meant): YamlNode[] {
  if (isMapping(node)) return node.items.flatMap(({ key, value }) => [key as YamlNode, value as YamlNode]);
  return isSeq(node) ? (node.items as YamlNode[]) : [];
}

function checkTag(node: { tag?: string | undefined }, wanted: string): void {
  if (node.tag && node.tag !== `${TAG}${wanted}` && node.tag !== "!") throw unknownTag(node.tag);
}

function kindOf(node: Scalar.Parsed): Kind {
  if (node.tag === "!") return "str";
  if (node.tag) {
    const kind = SCALAR_TAGS.find((name) => node.tag === `${TAG}${name}`);
    if (kind === undefined) throw unknownTag(node.tag);
    return kind;
  }
  if (node.type !== "PLAIN") return "str";
  const text = String(node.value ?? "");
  return IMPLICIT.find(([, pattern]) => pattern.test(text))?.[0] ?? "str";
}

function scalarValue(text: string, kind: Kind): Plain {
  switch (kind) {
    case "str":
      return text;
    case "null":
      return null;
    case "bool":
      return /^(?:yes|true|on)$/i.test(text);
    case "int":
      return wholeValue(text.replaceAll("_", ""));
    case "float":
      return floatValue(text.replaceAll("_", "").toLowerCase());
    case "timestamp":
      return timeText(text);
    default:
      throw unknownTag(`${TAG}${kind}`);
  }
}

function wholeValue(text: string): bigint {
  const sign = text.startsWith("-") ? -1n : 1n;
  const digits = text.replace(/^[-+]/, "");
  try {
    if (digits.includes(":"))
      return sign * digits.split(":").reduce((sum, part) => sum * 60n + BigInt(part), 0n);
    const isOctal = /^0\d/.test(digits);
    return sign * BigInt(isOctal ? `0o${digits.slice(1)}` : digits);
  } catch {
    throw new ConfigError(`invalid literal for a whole number: ${shownOf(text)}`);
  }
}

function floatValue(text: string): number {
  const sign = text.startsWith("-") ? -1 : 1;
  const digits = text.replace(/^[-+]/, "");
  if (digits === ".inf") return sign * Number.POSITIVE_INFINITY;
  if (digits === ".nan") return Number.NaN;
  const parts = digits.split(":").map(Number);
  if (parts.some(Number.isNaN)) throw new ConfigError(`could not convert to a number: ${shownOf(text)}`);
  return sign * parts.reduce((sum, part) => sum * 60 + part, 0);
}

/** A date or a time as Python writes it. */
function timeText(text: string): string {
  const found =
    /^(\d{4})-(\d\d?)-(\d\d?)(?:(?:[Tt]|[ \t]+)(\d\d?):(\d\d):(\d\d)(?:\.(\d*))?(?:[ \t]*(Z|([-+])(\d\d?)(?::(\d\d))?))?)?$/.exec(
      text,
    );
  const [
    ,
    year = "",
    month = "",
    day = "",
    hour,
    minute,
    second,
    fraction,
    zone,
    zoneSign,
    zoneHour,
    zoneMinute,
  ] = found ?? [];
  const two = (part: string | undefined): string => (part ?? "0").padStart(2, "0");
  const date = `${year}-${two(month)}-${two(day)}`;
  const time = `${two(hour)}:${two(minute)}:${two(second)}`;
  const read = new Date(`${date}T${time}Z`);
  if (found === null || Number.isNaN(read.getTime()) || !read.toISOString().startsWith(date))
    throw new ConfigError(`${text} is no date`);
  if (hour === undefined) return date;
  const micros = (fraction ?? "").slice(0, 6).padEnd(6, "0");
  const offset = zone === undefined ? "" : `${zoneSign ?? "+"}${two(zoneHour)}:${two(zoneMinute)}`;
  return `${date} ${time}${micros === "000000" ? "" : `.${micros}`}${offset}`;
}

/** A key as JSON would write it. */
function keyOf(key: Plain): string {
  if (typeof key === "string") return key;
  return key === null || typeof key === "boolean" ? String(key) : shownOf(key);
}

function unreadable(why: string): ConfigError {
  return new ConfigError(`no YAML that can be read: ${why}`);
}

function unknownTag(tag: string): ConfigError {
  return unreadable(`could not determine a constructor for the tag '${tag}'`);
}
