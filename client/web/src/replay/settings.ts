/**
 * What a training config decides about its samples, resolved as ai-toolkit resolves it, with its defaults.
 *
 * The same as the Python client's `replay/settings.py`; `tests/client/replay_cases.json` holds both to it.
 */
import { unresolvedIn, withName } from "./config-file.ts";
import { ConfigError } from "./config-limits.ts";
import {
  isMap,
  isTruthy,
  numberOf,
  type Plain,
  type PlainMap,
  shownOf,
  textOf,
  wholeOf,
} from "./python-values.ts";

export const ARCHITECTURE = "chroma";
const SIZE_DIVISOR = 16;
const MIN_SIZE_PX = 64;
/** As much of a seed as the generator on a CPU looks at. */
const SEED_MODULUS = 2n ** 32n;
const NOTHING: PlainMap = new Map();
const UNHONOURED: readonly (readonly [string, string])[] = [
  ["lora_path", "an adapter merged into the base"],
  ["inference_lora_path", "an adapter that only samples use"],
  ["assistant_lora_path", "an assistant adapter"],
  ["unconditional_lora_path", "an adapter of the unconditional pass"],
];

/** What decides how the trainer computes. */
export interface TrainerSettings {
  readonly quantize: boolean;
  readonly qtype: string;
  readonly quantizeTe: boolean;
  /** As written; `fp32` where nobody says. */
  readonly dtype: string;
}

/** One sample, with nothing left open. */
export interface SampleSettings {
  readonly prompt: string;
  readonly negativePrompt: string;
  readonly requestedWidth: number;
  readonly requestedHeight: number;
  /** Pixels of the picture. */
  readonly width: number;
  /** Pixels of the picture. */
  readonly height: number;
  /** As written; null where the trainer drew one and told nobody. */
  readonly seed: bigint | null;
  readonly steps: number;
  readonly guidanceScale: number;
  readonly networkMultiplier: number;
}

/** A sample's settings, or why the trainer could not have drawn it. */
export type SampleOrReason = SampleSettings | string;

/** A run's config, resolved. */
export interface TrainingRun {
  /** The job's, which its files are called by. */
  readonly name: string;
  readonly trainer: TrainerSettings;
  /** `model.name_or_path`; empty where there is none. */
  readonly baseModel: string;
  /** `lora`, `lokr`, …; empty where the run trains no adapter. */
  readonly networkType: string;
  /** Whether the run went on from another adapter, so that step 0 is not the bare model. */
  readonly isPretrained: boolean;
  /** By index. */
  readonly samples: readonly SampleOrReason[];
  /** Those of step 0 that have settings of their own, by index. */
  readonly firstSamples: readonly SampleOrReason[];
  /** Whether step 0 has only those. */
  readonly firstReplaces: boolean;
  readonly sampleEvery: number | null;
  readonly saveEvery: number | null;
  readonly savesKept: number | null;
  readonly totalSteps: number | null;
  /** What the config leaves open or what cannot be honoured, each a sentence. */
  readonly assumptions: readonly string[];
  /** Names of `${NAME}`, which nothing replaces here. */
  readonly unresolved: readonly string[];
}

/** The sample of an index at a step; a text says why not; undefined where the config has no such sample. */
export function sampleOf(run: TrainingRun, step: number, index: number): SampleOrReason | undefined {
  if (step === 0 && (run.firstReplaces || index >= run.samples.length)) return run.firstSamples[index];
  return run.samples[index];
}

/** Pixels of a picture for what was asked: at least 64, floored to 8, then to 16. */
export function effectiveSize(asked: number): number {
  const floored = Math.max(MIN_SIZE_PX, Math.floor(asked / 8) * 8);
  return Math.floor(floored / SIZE_DIVISOR) * SIZE_DIVISOR;
}

/** The seed that draws the same noise and that a request can hold. */
export function requestSeed(seed: bigint): bigint {
  if (seed >= 0n && seed < 2n ** 63n) return seed;
  return ((seed % SEED_MODULUS) + SEED_MODULUS) % SEED_MODULUS;
}

/**
 * The run of a config.
 *
 * @throws ConfigError it is none of ai-toolkit, or not of a Chroma model.
 */
export function resolveRun(config: PlainMap): TrainingRun {
  const job = config.get("config");
  if (!isMap(job) || !job.has("process"))
    throw new ConfigError("this is no training config of ai-toolkit: it has no config.process");
  const said = job.get("name");
  const isName = typeof said === "string" || typeof said === "bigint" || typeof said === "boolean";
  const name = isName ? textOf(said) : "";
  if (name === "") throw new ConfigError("this is no training config of ai-toolkit: it has no config.name");
  const named = withName(job, name);
  const process = processOf(isMap(named) ? named : NOTHING);
  const model = mapping(process, "model");
  checkArchitecture(model);
  const assumptions: string[] = [];
  const [train, save, network] = [
    mapping(process, "train"),
    mapping(process, "save"),
    mapping(process, "network"),
  ];
  const samples = samplesOf(process, "sample", assumptions);
  const first = isTruthy(process.get("first_sample")) ? samplesOf(process, "first_sample", assumptions) : [];
  assumptions.push(...unhonoured(process, model));
  return {
    name,
    trainer: trainerOf(model, train, assumptions),
    baseModel: asText(model.get("name_or_path")),
    networkType: isTruthy(process.get("network")) ? asText(get(network, "type", "lora")).toLowerCase() : "",
    isPretrained: isTruthy(network.get("pretrained_lora_path")),
    samples,
    firstSamples: first,
    firstReplaces: first.length > 0 && isTruthy(train.get("skip_first_sample")),
    sampleEvery: whole(get(mapping(process, "sample"), "sample_every", 100n)),
    saveEvery: whole(get(save, "save_every", 1000n)),
    savesKept: whole(get(save, "max_step_saves_to_keep", 5n)),
    totalSteps: whole(get(train, "steps", 1000n)),
    assumptions: [...new Set(assumptions)],
    unresolved: unresolvedOf(process),
  };
}

function processOf(job: PlainMap): PlainMap {
  const processes = job.get("process");
  const found = Array.isArray(processes) ? processes.filter((item: Plain) => isMap(item)) : [];
  const trained = found.find((item: PlainMap) => isMap(item.get("model")));
  if (trained === undefined)
    throw new ConfigError("this is no training config of ai-toolkit: none of its processes names a model");
  return trained;
}

function checkArchitecture(model: PlainMap): void {
  let architecture = asText(model.get("arch")).split(":")[0] ?? "";
  if (architecture === ARCHITECTURE) return;
  if (architecture === "") {
    const flag = [...model].find(([key, value]) => key.startsWith("is_") && value === true)?.[0] ?? "";
    architecture = flag.replace(/^is_/, "");
  }
  const said = architecture
    ? `the run trains ${shownOf(architecture)}`
    : "the config names no architecture (model.arch)";
  throw new ConfigError(`${said}; only '${ARCHITECTURE}' can be redrawn`);
}

function trainerOf(model: PlainMap, train: PlainMap, assumptions: string[]): TrainerSettings {
  const quantize = isTruthy(model.get("quantize"));
  let qtype = asText(get(model, "qtype", "qfloat8"));
  if (isTruthy(get(model, "layer_offloading", model.get("auto_memory") ?? false)) && qtype === "qfloat8") {
    qtype = "float8";
    assumptions.push(
      "layer_offloading: the trainer then quantizes by torchao; taken for torchao 0.10, which it had until 2026-07-27",
    );
  }
  if (qtype.includes("|")) {
    qtype = qtype.split("|")[0] ?? "";
    assumptions.push("the accuracy recovery adapter in model.qtype has no effect on Chroma");
  }
  if (!train.has("dtype")) assumptions.push("train.dtype is not set: the trainer computes in float32 then");
  return {
    quantize,
    qtype,
    quantizeTe: isTruthy(get(model, "quantize_te", quantize)),
    dtype: asText(get(train, "dtype", "fp32")),
  };
}

function unhonoured(process: PlainMap, model: PlainMap): string[] {
  const said = UNHONOURED.filter(([key]) => isTruthy(model.get(key))).map(
    ([key, what]) => `model.${key} cannot be honoured: ${what}`,
  );
  if (isTruthy(model.get("quantize_kwargs")))
    said.push("model.quantize_kwargs cannot be honoured: the trainer left some layers as they are");
  for (const key of ["embedding", "adapter", "decorator"])
    if (isTruthy(process.get(key)))
      said.push(`process.${key} cannot be honoured: it changes the samples too`);
  if (isTruthy(mapping(process, "train").get("train_text_encoder")))
    said.push("train.train_text_encoder: what the adapter changes in the text encoder cannot be honoured");
  return said;
}

function samplesOf(process: PlainMap, key: string, assumptions: string[]): SampleOrReason[] {
  const config = mapping(process, key);
  let listed = config.get("samples");
  if (!Array.isArray(listed)) {
    const prompts = config.get("prompts");
    listed = Array.isArray(prompts) ? prompts.map((prompt: Plain) => new Map([["prompt", prompt]])) : [];
  }
  const items: PlainMap[] = (listed as Plain[]).map((item) =>
    isMap(item) ? item : new Map([["prompt", item]]),
  );
  if (!config.has("neg") && items.some((item) => !item.has("neg")))
    assumptions.push(`${key}.neg is not set, which ends today's trainer with an error: taken as empty`);
  // The trainer counts prompts without those that are null, and items with them.
  const prompts = items.map((item) => item.get("prompt") ?? null).filter((prompt) => prompt !== null);
  const triggerWord = process.get("trigger_word") ?? null;
  const startSeed = integer(get(config, "seed", 0n), "seed");
  let current = startSeed;
  return prompts.map((prompt, index) => {
    const item = items[index] ?? NOTHING;
    if (isTruthy(config.get("walk_seed")) && typeof startSeed === "bigint")
      current = startSeed + BigInt(index);
    const own = item.get("seed") ?? null;
    if (own !== null) current = integer(own, "seed");
    return sampleFrom(prompt, item, config, current, triggerWord);
  });
}

/** A sample's values before they are looked at: each a number, or a text that says why it is none. */
interface Values {
  negativePrompt: string;
  requestedWidth: bigint | string;
  requestedHeight: bigint | string;
  seed: bigint | string | null;
  steps: bigint | string;
  guidanceScale: number | string;
  networkMultiplier: number | string;
}

function sampleFrom(
  prompt: Plain,
  item: PlainMap,
  config: PlainMap,
  seed: bigint | string,
  triggerWord: Plain,
): SampleOrReason {
  const said = (key: string, otherwise: Plain): Plain => get(item, key, get(config, key, otherwise));
  const neg = said("neg", "");
  let text = asText(prompt);
  if (triggerWord !== null) {
    const word = textOf(triggerWord);
    text = text.replaceAll("[name]", () => word).replaceAll("[trigger]", () => word);
  }
  const [width, height] = [said("width", 512n), said("height", 512n)];
  const values: Values = {
    negativePrompt: neg === false ? "" : asText(neg),
    requestedWidth: integer(width, "width"),
    requestedHeight: integer(height, "height"),
    seed: seed === -1n ? null : seed,
    steps: integer(said("sample_steps", 20n), "sample_steps"),
    guidanceScale: number(said("guidance_scale", 7n), "guidance_scale"),
    networkMultiplier: multiplier(said("network_multiplier", 1n)),
  };
  const split = splitFlags(text);
  Object.assign(values, split.found);
  const { requestedWidth, requestedHeight, steps, guidanceScale, networkMultiplier } = values;
  for (const value of [requestedWidth, requestedHeight, values.seed, steps, guidanceScale, networkMultiplier])
    if (typeof value === "string") return value;
  return {
    prompt: split.text,
    negativePrompt: values.negativePrompt,
    requestedWidth: Number(requestedWidth),
    requestedHeight: Number(requestedHeight),
    width: effectiveSize(Number(requestedWidth)),
    height: effectiveSize(Number(requestedHeight)),
    seed: values.seed as bigint | null,
    steps: Number(steps),
    guidanceScale: Number(guidanceScale),
    networkMultiplier: Number(networkMultiplier),
  };
}

const FLAGS: Readonly<Record<string, keyof Values>> = {
  n: "negativePrompt",
  w: "requestedWidth",
  h: "requestedHeight",
  d: "seed",
  seed: "seed",
  s: "steps",
  steps: "steps",
  l: "guidanceScale",
  cfg: "guidanceScale",
  m: "networkMultiplier",
  network_multiplier: "networkMultiplier",
};
const WHOLE: ReadonlySet<keyof Values> = new Set([
  "requestedWidth",
  "requestedHeight",
  "seed",
  "steps",
] as const);

/**
 * A prompt's text and what its flags (`--w 320`) override.
 *
 * Flags that have no effect on Chroma are left out, as are those that the trainer does not know; their text is gone
 * all the same.
 */
export function splitFlags(prompt: string): { text: string; found: Partial<Values> } {
  const [text = "", ...parts] = prompt.trim().split("--");
  const found: Record<string, unknown> = {};
  for (const part of parts) {
    const flag = (part.split(" ")[0] ?? "").trim();
    const content = part.slice(flag.length).trim();
    const name = Object.hasOwn(FLAGS, flag) ? FLAGS[flag] : undefined;
    if (name === undefined) continue;
    if (name === "negativePrompt") found[name] = content;
    else if (WHOLE.has(name)) found[name] = integer(content, `--${flag}`);
    else found[name] = number(content, `--${flag}`);
  }
  return { text: text.trim(), found };
}

function multiplier(value: Plain): number | string {
  return typeof value === "string" ? (numberOf(value) ?? 1) : number(value, "network_multiplier");
}

/** A whole number, or why it is none. */
function integer(value: Plain, name: string): bigint | string {
  if (typeof value === "bigint") return value;
  if (typeof value === "number" && Number.isInteger(value)) return BigInt(value);
  const read = typeof value === "string" ? wholeOf(value) : undefined;
  return read ?? `${name} is no whole number: ${shown(value)}`;
}

/** A number, or why it is none. */
function number(value: Plain, name: string): number | string {
  if (typeof value === "bigint" || typeof value === "number") return Number(value);
  const read = typeof value === "string" ? numberOf(value) : undefined;
  return read ?? `${name} is no number: ${shown(value)}`;
}

function shown(value: Plain): string {
  return shownOf(value).slice(0, 60);
}

function whole(value: Plain): number | null {
  const found = integer(value, "");
  return typeof found === "bigint" ? Number(found) : null;
}

/** A mapping's value, which may be null, or another where there is none. */
function get(from: PlainMap, key: string, otherwise: Plain): Plain {
  return from.has(key) ? (from.get(key) ?? null) : otherwise;
}

function mapping(parent: PlainMap, key: string): PlainMap {
  const value = parent.get(key);
  return isMap(value) ? value : NOTHING;
}

function asText(value: Plain | undefined): string {
  return value === undefined || value === null ? "" : textOf(value);
}

function unresolvedOf(value: Plain): readonly string[] {
  if (typeof value === "string") return unresolvedIn(value);
  const children = Array.isArray(value) ? value : isMap(value) ? [...value.values()] : [];
  return [...new Set(children.flatMap((child: Plain) => unresolvedOf(child)))];
}
