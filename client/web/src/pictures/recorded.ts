/** Facts of this project's pictures: of the server's record, and of the older one that the client wrote. */
import { type Fact, fact, named, OURS, type PictureFacts, UNKNOWN } from "./facts.ts";
import { isList, isObject, isTruthy, type Json, type JsonObject, parseJson } from "./json.ts";
import { COMFYUI, FLOWMATCH, REFERENCE } from "./sampling.ts";
import { compareTexts, fractionText } from "./texts.ts";

const MAX_ADAPTERS = 100;
/** Of versions, and of a trainer's options. */
const MAX_NAMES = 50;
const LARGEST_SCALE = 10n ** 300n;
const ON_TWO_DEVICES = "a pass on each, which changes no bit in exact and rounds otherwise in other profiles";
const PREVIEW_PROFILES: readonly Json[] = ["preview", "preview-exact"];
const SCALES: readonly string[] = ["guidance_scale", "network_multiplier", "shift"];
const SHIFTED = "evenly spaced, shifted by the picture's size";
const PLACED: Readonly<Record<string, string>> = {
  merged: "merged into the weights",
  beside: "computed beside the weights",
};
/** The trainer's other words for types. */
const DTYPES: ReadonlyMap<string, string> = new Map([
  ["bf16", "bfloat16"],
  ["fp32", "float32"],
  ["float", "float32"],
]);
const NOTHING: JsonObject = new Map();

/** A record that is none; a sentence for people. */
export class Unreadable extends Error {}

/**
 * What a record says.
 *
 * @throws Unreadable it is no record.
 */
export function recordedFacts(text: string): PictureFacts {
  const { record, request } = readRecord(text);
  const prompts = request.get("prompts");
  const prompt = objectOr(isList(prompts) ? prompts[0] : undefined);
  const versions = objectOr(record.get("versions"));
  const profile = request.get("profile");
  const settings = request.has("settings") ? request.get("settings") : REFERENCE;
  const isPreview = profile !== undefined && PREVIEW_PROFILES.includes(profile);
  const facts = new Map<string, Fact>([
    ["model", known(record.has("served_model") ? record.get("served_model") : request.get("model"))],
    ["model_revision", known(record.get("model_revision"))],
    ["profile", known(profile)],
    ["settings", known(settings)],
    ["dtype", known(record.get("dtype"))],
    ["device", known(record.get("device"))],
    ["sampler", namedOr(prompt.get("sampler"), fact(FLOWMATCH, "Euler steps along the flow", "euler"))],
    ["scheduler", namedOr(prompt.get("schedule"), fact(FLOWMATCH, prompt.has("shift") ? "" : SHIFTED))],
    [
      "guidance",
      fact("classifier-free", settings === COMFYUI ? "one pass at 1 alone" : "one pass at 1 and below"),
    ],
    ["noise_draw", known(short(request.get("noise_draw"), "NOISE_DRAW_"))],
    ["neg", fact("", isPreview ? "" : "none that had an effect")],
  ]);
  for (const name of [
    "prompt",
    "width",
    "height",
    "seed",
    "sample_steps",
    "guidance_scale",
    "shift",
    "neg",
  ]) {
    if (prompt.has(name)) facts.set(name, known(scaled(name, prompt.get(name))));
  }
  noteAdapters(request, record, facts);
  const sorted = [...versions].sort(([one], [other]) => compareTexts(one, other)).slice(0, MAX_NAMES);
  for (const [name, value] of sorted) facts.set(`versions.${name}`, known(value));
  for (const [name, value] of [...objectOr(request.get("trainer"))].slice(0, MAX_NAMES)) {
    facts.set(`trainer.${name}`, trainerFact(name, value));
  }
  const output = request.get("output");
  if (isObject(output)) {
    facts.set("output.format", known(short(output.get("format"), "IMAGE_FORMAT_")));
    if (output.has("quality")) facts.set("output.quality", known(output.get("quality")));
  }
  const tokens = objectOr(record.get("tokens"));
  if (isTruthy(tokens.get("cut"))) {
    facts.set("tokens", fact(`${written(tokens.get("used"))} read, ${written(tokens.get("cut"))} cut off`));
  }
  if (isTruthy(record.get("stored_as"))) {
    facts.set("stored_as", known(record.get("stored_as"), "how the file of its weights stores them"));
  }
  if (isTruthy(record.get("tiled"))) {
    facts.set("tiled", fact(true, "decoded in tiles, which changes pixels a little"));
  }
  if (isTruthy(record.get("guidance_on_two_devices"))) {
    facts.set("guidance_on_two_devices", fact(true, ON_TWO_DEVICES));
  }
  const version = versions.has("chromarpc")
    ? versions.get("chromarpc")
    : (record.get("client_version") ?? "");
  return {
    program: `${OURS} ${written(version)}`.trimEnd(),
    facts,
    request,
    remarks: [],
    urls: urlsOf(request),
  };
}

/** A sampler or a schedule; older records name none, since there was one. */
function namedOr(value: Json | undefined, usual: Fact): Fact {
  return value === undefined || value === null || value === usual.value ? usual : known(value);
}

function readRecord(text: string): { record: JsonObject; request: JsonObject } {
  let record: Json;
  try {
    record = parseJson(text);
  } catch {
    throw new Unreadable("its record cannot be read: no JSON");
  }
  const request = isObject(record) ? record.get("request") : undefined;
  if (!isObject(record) || !isObject(request)) {
    throw new Unreadable("its record cannot be read: there is no request in it");
  }
  return { record, request };
}

/** SHA-256 of each adapter by the path that the request names, as far as a record tells. */
export function recordedHashes(text: string): ReadonlyMap<string, string> {
  const { record, request } = readRecord(text);
  const hashes = new Map<string, string>();
  for (const { lora, adapter } of paired(request, record)) {
    const [path, sha256] = [lora.get("path"), adapter.get("sha256")];
    if (typeof path === "string" && typeof sha256 === "string") hashes.set(path, sha256);
  }
  return hashes;
}

function paired(request: JsonObject, record: JsonObject): { lora: JsonObject; adapter: JsonObject }[] {
  const [loras, adapters] = [request.get("loras"), record.get("adapters")];
  const all = isList(loras) ? loras.slice(0, MAX_ADAPTERS) : [];
  return all.map((lora, number) => ({
    lora: objectOr(lora),
    adapter: objectOr(isList(adapters) ? adapters[number] : undefined),
  }));
}

function noteAdapters(request: JsonObject, record: JsonObject, facts: Map<string, Fact>): void {
  for (const [number, { lora, adapter }] of paired(request, record).entries()) {
    const at = `loras.${number}`;
    const path = lora.get("path");
    facts.set(`${at}.path`, typeof path === "string" ? named(path) : UNKNOWN);
    facts.set(`${at}.sha256`, known(adapter.get("sha256")));
    const multiplier = lora.has("network_multiplier") ? lora.get("network_multiplier") : 1;
    facts.set(`${at}.network_multiplier`, known(scaled("network_multiplier", multiplier)));
    const placement = adapter.get("placement");
    facts.set(
      `${at}.placement`,
      known(placement, (typeof placement === "string" && PLACED[placement]) || ""),
    );
    const unmatched = adapter.get("unmatched_key_count");
    if (isTruthy(unmatched)) {
      const note = "keys of the file that the model does not have";
      facts.set(`${at}.unmatched_key_count`, known(unmatched, note));
    }
  }
}

function urlsOf(request: JsonObject): string[] {
  return paired(request, NOTHING).flatMap(({ lora }) => {
    const path = lora.get("path");
    return typeof path === "string" && isUrl(path) ? [path] : [];
  });
}

/** Whether a server fetches an adapter from there. */
export function isUrl(path: string): boolean {
  return /^https?:\/\//i.test(path);
}

/** Scales as fractions, so that 4 and 4.0 are shown alike; undefined where one is beyond them. */
function scaled(name: string, value: Json | undefined): Json | undefined {
  if (!SCALES.includes(name) || typeof value !== "bigint") return value;
  return value > -LARGEST_SCALE && value < LARGEST_SCALE ? Number(value) : undefined;
}

function short(value: Json | undefined, prefix: string): Json | undefined {
  if (typeof value !== "string") return value;
  return (value.startsWith(prefix) ? value.slice(prefix.length) : value).toLowerCase().replaceAll("_", "-");
}

function trainerFact(name: string, value: Json): Fact {
  if (name === "dtype" && typeof value === "string") return fact(value, "", DTYPES.get(value));
  return known(name === "lokr_form" ? short(value, "LOKR_FORM_") : value);
}

function known(value: Json | undefined, note = ""): Fact {
  const isKnown = typeof value !== "object" && !(typeof value === "number" && Number.isNaN(value));
  return fact(isKnown ? value : undefined, note);
}

/** A value within a sentence. */
function written(value: Json | undefined): string {
  return typeof value === "number" ? fractionText(value) : String(value ?? "None");
}

function objectOr(value: Json | undefined): JsonObject {
  return isObject(value) ? value : NOTHING;
}
