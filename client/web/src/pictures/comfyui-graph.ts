/**
 * The graph in a picture of ComfyUI: `prompt`, or `workflow` where that is all.
 *
 * It is `{id: {class_type, inputs}}`; an input is a value or `[id, output]` of the node that gives it.
 */
import { isList, isObject, type Json, type JsonObject, parseJson } from "./json.ts";
import { fractionText } from "./texts.ts";

export interface Node {
  /** Its class. */
  readonly kind: string;
  readonly inputs: JsonObject;
}

export type Graph = ReadonlyMap<string, Node>;

const MAX_NODES = 20_000;
const MAX_FOLLOWED = 2000;
const SAVERS = ["SaveImage", "PreviewImage", "SaveAnimated", "Image Save", "SaveWEBP"];
const VALUES = ["value", "seed", "noise_seed", "int", "float", "number", "text", "string", "width", "height"];
/** What a node's values mean that `workflow` lists without names. */
const WIDGETS: ReadonlyMap<string, readonly string[]> = new Map([
  ["KSampler", ["seed", "", "steps", "cfg", "sampler_name", "scheduler", "denoise"]],
  ["KSamplerAdvanced", ["add_noise", "noise_seed", "", "steps", "cfg", "sampler_name", "scheduler"]],
  ["SamplerCustom", ["add_noise", "noise_seed", "", "cfg"]],
  ["RandomNoise", ["noise_seed"]],
  ["KSamplerSelect", ["sampler_name"]],
  ["BasicScheduler", ["scheduler", "steps", "denoise"]],
  ["CFGGuider", ["cfg"]],
  ["CLIPTextEncode", ["text"]],
  ["EmptyLatentImage", ["width", "height"]],
  ["EmptySD3LatentImage", ["width", "height"]],
  ["LoraLoader", ["lora_name", "strength_model", "strength_clip"]],
  ["LoraLoaderModelOnly", ["lora_name", "strength_model"]],
  ["UNETLoader", ["unet_name", "weight_dtype"]],
  ["UnetLoaderGGUF", ["unet_name"]],
  ["CheckpointLoaderSimple", ["ckpt_name"]],
  ["ModelSamplingAuraFlow", ["shift"]],
  ["ModelSamplingSD3", ["shift"]],
  ["ModelSamplingFlux", ["max_shift", "base_shift", "width", "height"]],
  ["PrimitiveInt", ["value"]],
  ["PrimitiveFloat", ["value"]],
  ["PrimitiveNode", ["value"]],
]);

/** The graph that a picture's texts hold. */
export function graphOf(texts: ReadonlyMap<string, string>): Graph | undefined {
  for (const [keyword, made] of [
    ["prompt", fromPrompt],
    ["workflow", fromWorkflow],
  ] as const) {
    const values = parsed(texts.get(keyword));
    const graph = isObject(values) ? made(values) : undefined;
    if (graph !== undefined && graph.size > 0) return graph;
  }
  return undefined;
}

function parsed(text: string | undefined): Json | undefined {
  try {
    return text === undefined ? undefined : parseJson(text);
  } catch {
    return undefined;
  }
}

function fromPrompt(values: JsonObject): Graph {
  const graph = new Map<string, Node>();
  for (const [id, node] of [...values].slice(0, MAX_NODES)) {
    if (!isObject(node)) continue;
    const [kind, inputs] = [node.get("class_type"), node.get("inputs")];
    if (typeof kind === "string" && isObject(inputs)) graph.set(id, { kind, inputs });
  }
  return graph;
}

/** The same out of what the editor keeps: nodes with values in the order of widgets, and a list of links. */
function fromWorkflow(values: JsonObject): Graph | undefined {
  const [nodes, links] = [values.get("nodes"), values.get("links")];
  if (!isList(nodes) || !isList(links)) return undefined;
  const sources = new Map<bigint, Json>();
  for (const link of links.slice(0, 4 * MAX_NODES)) {
    if (!isList(link)) continue;
    const [id, node, output] = link;
    if (typeof id !== "bigint" || output === undefined) continue;
    sources.set(id, [written(node), output]);
  }
  const graph = new Map<string, Node>();
  for (const node of nodes.slice(0, MAX_NODES)) {
    const kind = isObject(node) ? node.get("type") : undefined;
    if (!isObject(node) || typeof kind !== "string") continue;
    graph.set(written(node.get("id")), { kind, inputs: inputsOf(kind, node, sources) });
  }
  return graph;
}

function inputsOf(kind: string, node: JsonObject, sources: ReadonlyMap<bigint, Json>): JsonObject {
  const inputs = new Map<string, Json>();
  const widgets = node.get("widgets_values");
  if (isList(widgets)) {
    for (const [at, name] of (WIDGETS.get(kind) ?? []).entries()) {
      const value = widgets[at];
      if (value !== undefined) inputs.set(name, value);
    }
  } else if (isObject(widgets)) {
    for (const [name, value] of widgets) inputs.set(name, value);
  }
  const joined = node.get("inputs");
  for (const input of isList(joined) ? joined : []) {
    const link = isObject(input) ? input.get("link") : undefined;
    const source = typeof link === "bigint" ? sources.get(link) : undefined;
    if (isObject(input) && source !== undefined) inputs.set(written(input.get("name")), source);
  }
  return inputs;
}

/** The node that gives an input. */
export function nodeAt(graph: Graph, link: Json | undefined): Node | undefined {
  if (!isList(link) || link.length !== 2) return undefined;
  const [id] = link;
  return typeof id === "string" || typeof id === "bigint" ? graph.get(String(id)) : undefined;
}

/** A node and all that lead to it, the nearest first, each once. */
export function* upstream(graph: Graph, first: Node): Generator<Node> {
  const waiting = [first];
  const seen = new Set(waiting);
  for (const node of waiting) {
    yield node;
    for (const link of node.inputs.values()) {
      const found = nodeAt(graph, link);
      if (found === undefined || seen.has(found) || waiting.length >= MAX_FOLLOWED) continue;
      seen.add(found);
      waiting.push(found);
    }
  }
}

/** The nodes that the model goes through, the nearest to the sampler first, up to where it is loaded. */
export function upstreamModel(graph: Graph, first: Node): Node[] {
  const found: Node[] = [];
  const seen = new Set([first]);
  for (;;) {
    const node = nodeAt(graph, (found.at(-1) ?? first).inputs.get("model"));
    if (node === undefined || seen.has(node)) return found;
    seen.add(node);
    found.push(node);
  }
}

/** The sampler nearest to where the picture is saved, or any. */
export function samplerOf(graph: Graph): Node | undefined {
  for (const saver of graph.values()) {
    if (!SAVERS.some((kind) => saver.kind.includes(kind))) continue;
    for (const node of upstream(graph, saver)) if (isSampler(node)) return node;
  }
  return [...graph.values()].find(isSampler);
}

function isSampler({ inputs }: Node): boolean {
  const has = (...names: readonly string[]): boolean => names.every((name) => inputs.has(name));
  return has("steps", "cfg", "positive") || (has("sigmas") && (has("guider") || has("positive")));
}

/** A value, or that of the node that gives it where it holds just one. */
export function valueAt(graph: Graph, value: Json | undefined): string | bigint | number | undefined {
  let found = value;
  for (let count = 0; count < 20; count++) {
    const node = nodeAt(graph, found);
    if (node === undefined) break;
    found = node.inputs.get(VALUES.find((name) => node.inputs.has(name)) ?? "");
  }
  if (typeof found === "number" && !Number.isFinite(found)) return undefined;
  return typeof found === "string" || typeof found === "bigint" || typeof found === "number"
    ? found
    : undefined;
}

export function textAt(graph: Graph, value: Json | undefined): string | undefined {
  const found = valueAt(graph, value);
  return typeof found === "string" ? found : undefined;
}

/** A value as part of a name. */
function written(value: Json | undefined): string {
  return typeof value === "number" ? fractionText(value) : String(value ?? "None");
}
