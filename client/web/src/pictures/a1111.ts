/**
 * Facts of pictures of AUTOMATIC1111's web UI and of Forge, out of their text of parameters.
 *
 * The text is the prompt, then `Negative prompt: …`, then one line `Steps: 20, Sampler: Euler, …`. Adapters stand in
 * the prompt as `<lora:NAME:MULTIPLIER>`, and are taken out of it before it is read.
 */
import { type Fact, fact, named, OURS, type PictureFacts, UNKNOWN } from "./facts.ts";
import { parseJson } from "./json.ts";
import { requestOf } from "./requests.ts";
import { REFERENCE } from "./sampling.ts";
import { fractionOf, partition, strip } from "./texts.ts";

type Settings = ReadonlyMap<string, string>;

const MAX_LORAS = 100;
const MAX_SETTINGS_LENGTH = 65_536;
const SETTING =
  /[^\S\ufeff]*([\p{L}\p{N}_][\p{L}\p{N}_ \-/()+.]{0,79}):[^\S\ufeff]*("(?:\\[^\n]|[^"\\])*"|[^,]*)(?:,|$)/gu;
const NETWORK = /<(?:lora|lyco):([^<>]{1,500})>/gu;
const NEGATIVE = "Negative prompt:";
const WITHOUT_COUNTERPART = [
  "Denoising strength",
  "Hires upscale",
  "Clip skip",
  "Shift",
  "Distilled CFG Scale",
];

/** What a text of parameters says; undefined where it is none. */
export function parametersFacts(text: string): PictureFacts | undefined {
  const parsed = parse(text);
  if (parsed === undefined) return undefined;
  const { prompt, negative, settings } = parsed;
  const version = settings.get("Version") ?? "";
  const isOurs = version.startsWith(OURS);
  const facts = new Map<string, Fact>([
    ["prompt", fact(isOurs ? prompt : strip(prompt.replace(NETWORK, "")))],
    ["neg", fact(negative)],
    ["model", modelOf(settings)],
    ["model_revision", fact(undefined, hashNote(settings))],
    ["sample_steps", whole(settings.get("Steps"))],
    ["sampler", samplerOf(settings.get("Sampler"))],
    ["scheduler", textOf(settings.get("Schedule type"))],
    ["seed", whole(settings.get("Seed"))],
    ["guidance_scale", fraction(settings.get("CFG scale"))],
    ["guidance", guidanceOf(settings)],
    ["noise_draw", fact(undefined, randomNote(settings))],
    ["profile", textOf(settings.get("Profile"))],
  ]);
  noteSize(settings, facts);
  if (isOurs) noteOurs(settings, facts);
  else noteNetworks(prompt, settings, facts);
  if (version) facts.set("versions", fact(version));
  const held = settings.get("Diffusion in Low Bits");
  if (held !== undefined) facts.set("dtype", fact(undefined, `its weights are held as ${held}`));
  const remarks = WITHOUT_COUNTERPART.filter(
    (name) => settings.has(name) && !(isOurs && name === "Shift"),
  ).map((name) => `${name} (${settings.get(name)}) has no counterpart here`);
  return {
    program: isOurs ? version : programOf(version),
    facts,
    request: requestOf(facts),
    remarks,
    urls: [],
  };
}

function programOf(version: string): string {
  const isForge = version.startsWith("f") || version.toLowerCase().includes("neo");
  const name = isForge ? "Forge" : "AUTOMATIC1111 or Forge";
  return version ? `${name} ${version}`.trimEnd() : name;
}

function parse(text: string): { prompt: string; negative: string; settings: Settings } | undefined {
  const lines = strip(text).split("\n");
  const last = lines.findLastIndex((line) => /^Steps: \p{Nd}/u.test(strip(line)));
  if (last < 0) return undefined;
  const settings = new Map<string, string>();
  for (const [, name = "", value = ""] of shortened(lines.slice(last).join(" ")).matchAll(SETTING)) {
    settings.set(name, unquoted(value));
  }
  const found = lines.slice(0, last).findIndex((line) => strip(line).startsWith(NEGATIVE));
  const begin = found < 0 ? last : found;
  const negative = strip(lines.slice(begin, last).join("\n"));
  return {
    prompt: strip(lines.slice(0, begin).join("\n")),
    negative: strip(negative.startsWith(NEGATIVE) ? negative.slice(NEGATIVE.length) : negative),
    settings,
  };
}

function shortened(text: string): string {
  if (text.length <= MAX_SETTINGS_LENGTH) return text;
  return [...text.slice(0, 2 * MAX_SETTINGS_LENGTH)].slice(0, MAX_SETTINGS_LENGTH).join("");
}

function unquoted(value: string): string {
  if (!value.startsWith('"')) return strip(value);
  try {
    return String(parseJson(value));
  } catch {
    return value.replace(/^"+|"+$/g, "");
  }
}

function noteNetworks(prompt: string, settings: Settings, facts: Map<string, Fact>): void {
  const hashes = new Map<string, string>();
  for (const part of (settings.get("Lora hashes") ?? "").split(",")) {
    const { before, after = "" } = partition(strip(part), ": ");
    hashes.set(before, after);
  }
  for (const [number, [, body = ""]] of [...prompt.matchAll(NETWORK)].slice(0, MAX_LORAS).entries()) {
    const [name = "", ...given] = body.split(":");
    const placed = given.filter((argument) => !argument.includes("="));
    const unet = given.findLast((argument) => argument.startsWith("unet="))?.slice("unet=".length);
    // The second number, where there is one, is the transformer's; the first is the text encoder's then too.
    const multiplier = unet ?? placed[1] ?? placed[0] ?? "1";
    const hash = hashes.get(name) ?? "";
    const at = `loras.${number}`;
    facts.set(`${at}.path`, named(name));
    const note = hash ? `the hash ${hash} is of its tensors, not of the file` : "";
    facts.set(`${at}.sha256`, fact(undefined, note));
    facts.set(`${at}.network_multiplier`, fraction(multiplier));
    const placement = "merged as it is loaded, or at each call, as its settings say";
    facts.set(`${at}.placement`, fact(undefined, placement));
  }
}

/** Of this project's own text, where its record was lost. */
function noteOurs(settings: Settings, facts: Map<string, Fact>): void {
  facts.set("settings", fact(settings.get("Settings") ?? REFERENCE));
  if (settings.has("Shift")) facts.set("shift", fraction(settings.get("Shift")));
  for (let number = 0; number < MAX_LORAS; number++) {
    const text = settings.get(`Lora ${number}`) ?? "";
    const at = text.lastIndexOf(" x ");
    if (at < 0) return;
    facts.set(`loras.${number}.path`, named(text.slice(0, at)));
    facts.set(`loras.${number}.sha256`, UNKNOWN);
    facts.set(`loras.${number}.network_multiplier`, fraction(text.slice(at + 3)));
  }
}

function noteSize(settings: Settings, facts: Map<string, Fact>): void {
  const { before, after } = partition(settings.get("Size") ?? "", "x");
  if (after === undefined) return;
  facts.set("width", whole(before));
  facts.set("height", whole(after));
}

function modelOf(settings: Settings): Fact {
  const name = settings.get("Model");
  return name ? named(name) : UNKNOWN;
}

function hashNote(settings: Settings): string {
  const hash = settings.get("Model hash") ?? "";
  return hash ? `only the beginning of a hash of its own is told: ${hash}` : "";
}

function samplerOf(name: string | undefined): Fact {
  if (!name) return UNKNOWN;
  const plain = name.toLowerCase();
  return fact(name, "", plain === "flowmatch" ? "euler" : plain);
}

function guidanceOf(settings: Settings): Fact {
  const distilled = settings.get("Distilled CFG Scale");
  if (distilled !== undefined) {
    return fact("classifier-free", `and Distilled CFG Scale ${distilled}, which Chroma has not`);
  }
  return settings.has("CFG scale")
    ? fact("classifier-free", "one pass at 1, without negative text")
    : UNKNOWN;
}

function randomNote(settings: Settings): string {
  const source = settings.get("RNG");
  return source ? `drawn by ${source}` : "drawn on the GPU, unless its settings say CPU";
}

function textOf(value: string | undefined): Fact {
  return value ? fact(value) : UNKNOWN;
}

function whole(value: string | undefined): Fact {
  return value !== undefined && /^\d{1,19}$/.test(value) ? fact(BigInt(value)) : UNKNOWN;
}

function fraction(value: string | undefined): Fact {
  return fact(value === undefined ? undefined : fractionOf(value));
}
