/** What is known of how a picture was drawn, by the request's names, in the order of how much each explains. */
import type { JsonObject } from "./json.ts";
import { compareTexts, fractionText } from "./texts.ts";

/** A whole number is a bigint, a fraction a number. */
export type Value = string | bigint | number | boolean;

/** One thing that is known, or known to be unknown. */
export interface Fact {
  /** Undefined where nobody says. */
  readonly value: Value | undefined;
  /** What else there is to know, such as why it is unknown. */
  readonly note: string;
  /** What is compared instead of the value, where programs have different words for the same thing. */
  readonly sameAs: Value | undefined;
}

export type Facts = ReadonlyMap<string, Fact>;

/** What is known of one picture. */
export interface PictureFacts {
  /** That drew it, for people; empty where nobody says. */
  readonly program: string;
  /** By the request's names; `loras.0.path` and so on for adapters. */
  readonly facts: Facts;
  /** A body that draws it again, as far as that can be said. */
  readonly request: JsonObject | undefined;
  /** What the request cannot hold, and what was assumed; each a sentence. */
  readonly remarks: readonly string[];
  /** From which the request has a server fetch adapters. */
  readonly urls: readonly string[];
}

export const OURS = "chromarpc";
const ORDER = [
  /^model$/,
  /^served_model$/,
  /^model_revision$/,
  /^loras\.\d+\.sha256$/,
  /^loras\.\d+\.path$/,
  /^prompt$/,
  /^tokens$/,
  /^profile$/,
  /^settings$/,
  /^dtype$/,
  /^trainer\..*$/,
  /^width$/,
  /^height$/,
  /^seed$/,
  /^noise_draw$/,
  /^sample_steps$/,
  /^sampler$/,
  /^scheduler$/,
  /^shift$/,
  /^guidance_scale$/,
  /^guidance$/,
  /^guidance_on_two_devices$/,
  /^loras\.\d+\.network_multiplier$/,
  /^loras\.\d+\.placement$/,
  /^loras\.\d+\..*$/,
  /^neg$/,
  /^tiled$/,
  /^output\..*$/,
  /^versions$/,
  /^versions\..*$/,
  /^stored_as$/,
  /^device$/,
];
/** Of every picture; where nobody says, it is unknown rather than not there. */
const ALWAYS_ASKED = [
  "model",
  "model_revision",
  "prompt",
  "profile",
  "dtype",
  "width",
  "height",
  "seed",
  "noise_draw",
  "sample_steps",
  "sampler",
  "scheduler",
  "guidance_scale",
  "guidance",
  "neg",
  "versions",
  "device",
];

export function fact(value: Value | undefined, note = "", sameAs?: Value): Fact {
  return { value, note, sameAs };
}

export const UNKNOWN = fact(undefined);

/** A file's name as a fact, compared without its folder and ending. */
export function named(path: string, note = ""): Fact {
  return fact(path, note, nameOfFile(path));
}

/** What two pictures are compared by. */
export function compared({ value, sameAs }: Fact): Value | undefined {
  return sameAs ?? value;
}

/** Whether two values are equal, be one a whole number and the other a fraction. */
export function isSame(one: Value | undefined, other: Value | undefined): boolean {
  if (one === undefined || other === undefined || typeof one === "string" || typeof other === "string")
    return one === other;
  // biome-ignore lint/suspicious/noDoubleEquals: between a bigint and a number it compares what they are worth
  return one == other;
}

/** Whether a server of this project drew it and says so by its record. */
export function isOurs({ program }: PictureFacts): boolean {
  return program.startsWith(OURS);
}

/** A fact; undefined where there is no such thing, rather than nobody who says. */
export function getFact(picture: PictureFacts, name: string): Fact | undefined {
  const known = picture.facts.get(name);
  if (known !== undefined) return known;
  const isOpen = isOurs(picture)
    ? ALWAYS_ASKED.includes(name)
    : !(picture.program !== "" && name.startsWith("loras."));
  return isOpen && !isTold(picture, name) ? UNKNOWN : undefined;
}

/** Of all facts, in order. */
export function namesOf(picture: PictureFacts): string[] {
  return inOrder([...picture.facts.keys(), ...ALWAYS_ASKED.filter((name) => !isTold(picture, name))]);
}

function isTold({ facts }: PictureFacts, name: string): boolean {
  return name === "versions" && [...facts.keys()].some((other) => other.startsWith("versions."));
}

/** Names of facts, the most telling first, each once. */
export function inOrder(names: Iterable<string>): string[] {
  return [...new Set(names)]
    .map((name) => ({ name, place: placeOf(name), parts: name.split(".") }))
    .sort((one, other) => one.place - other.place || compareParts(one.parts, other.parts))
    .map(({ name }) => name);
}

function placeOf(name: string): number {
  const place = ORDER.findIndex((pattern) => pattern.test(name));
  return place < 0 ? ORDER.length : place;
}

function compareParts(one: readonly string[], other: readonly string[]): number {
  for (const [at, part] of one.entries()) {
    const counterpart = other[at];
    if (counterpart === undefined) return 1;
    const step = numberOf(part) - numberOf(counterpart) || compareTexts(wordOf(part), wordOf(counterpart));
    if (step !== 0) return step;
  }
  return one.length - other.length;
}

function numberOf(part: string): number {
  return /^\d{1,9}$/.test(part) ? Number(part) : -1;
}

function wordOf(part: string): string {
  return numberOf(part) < 0 ? part : "";
}

/** The value for people, on one line. */
export function shown({ value }: Fact): string {
  return value === undefined ? "unknown" : show(value);
}

export function show(value: Value): string {
  if (value === "") return '""';
  const text = typeof value === "number" ? fractionText(value) : String(value);
  return text
    .replaceAll("\\", "\\\\")
    .replaceAll("\n", "\\n")
    .replaceAll("\r", "\\r")
    .replaceAll("\t", "\\t");
}

/** What a model or an adapter is called, whatever folder it lies in and whatever its file ends in. */
export function nameOfFile(path: string): string {
  const parts = path.replaceAll("\\", "/").split("/");
  const name = parts.filter((part) => part !== "" && part !== ".").at(-1) ?? "";
  return name.replace(/\.(safetensors|sft|gguf|ckpt|pt|bin)(?=\n?$)/i, "");
}
