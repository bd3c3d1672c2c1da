/** What would have to be said to a server to draw a picture of another program, as far as that can be said. */
import { DEFAULT_MODEL } from "chromarpc/web";
import type { Facts, Value } from "./facts.ts";
import type { Json, JsonObject } from "./json.ts";
import { SAMPLERS, SCHEDULES } from "./sampling.ts";

const PROMPT = ["prompt", "width", "height", "sample_steps", "guidance_scale", "seed"];
const NAMED = [
  ["sampler", "sampler", SAMPLERS],
  ["schedule", "scheduler", SCHEDULES],
] as const;
const LARGEST_SEED = 2n ** 63n - 1n;

/** A request body with what is known; what is not is left to the server's defaults. */
export function requestOf(facts: Facts): JsonObject {
  const prompt = new Map<string, Json>([["prompt", ""]]);
  for (const name of PROMPT) {
    const value = known(facts, name);
    if (value !== undefined && !(name === "seed" && !isSeed(value))) prompt.set(name, value);
  }
  const negative = known(facts, "neg");
  if (negative) prompt.set("neg", negative).set("use_neg", true);
  for (const [name, told, listed] of NAMED) {
    const value = known(facts, told);
    if (typeof value === "string" && listed.includes(value)) prompt.set(name, value);
  }
  const shift = known(facts, "shift");
  if (shift !== undefined) prompt.set("shift", shift);
  const body = new Map<string, Json>([
    ["model", DEFAULT_MODEL],
    ["prompts", [prompt]],
  ]);
  const settings = known(facts, "settings");
  if (settings !== undefined) body.set("settings", settings);
  const loras = lorasOf(facts);
  return loras.length > 0 ? body.set("loras", loras) : body;
}

function lorasOf(facts: Facts): Json[] {
  const loras: Json[] = [];
  for (;;) {
    const path = known(facts, `loras.${loras.length}.path`);
    if (path === undefined) return loras;
    const multiplier = known(facts, `loras.${loras.length}.network_multiplier`);
    const lora = new Map<string, Json>([["path", path]]);
    if (multiplier !== undefined) lora.set("network_multiplier", multiplier);
    loras.push(lora);
  }
}

function isSeed(value: Value): boolean {
  return (typeof value === "bigint" || typeof value === "number") && value >= 0 && value <= LARGEST_SEED;
}

function known(facts: Facts, name: string): Value | undefined {
  return facts.get(name)?.value;
}
