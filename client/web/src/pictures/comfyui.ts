/**
 * Facts of pictures of ComfyUI, out of the graph in them. The picture is followed from where it is saved back to its
 * sampler, and from there to model, adapters, texts and size.
 */
import {
  type Graph,
  graphOf,
  type Node,
  nodeAt,
  samplerOf,
  textAt,
  upstream,
  upstreamModel,
  valueAt,
} from "./comfyui-graph.ts";
import {
  type Fact,
  type Facts,
  fact,
  isSame,
  named,
  type PictureFacts,
  shown,
  UNKNOWN,
  type Value,
} from "./facts.ts";
import { isObject, isTruthy, type Json } from "./json.ts";
import { requestOf } from "./requests.ts";
import { COMFYUI, SAMPLERS, SCHEDULES } from "./sampling.ts";
import { fractionText } from "./texts.ts";

const PROGRAM = "ComfyUI";
const LOADED = ["unet_name", "ckpt_name", "model_name", "gguf_name"];

/** What a picture's texts say; undefined where they hold no graph. */
export function comfyuiFacts(texts: ReadonlyMap<string, string>): PictureFacts | undefined {
  const graph = graphOf(texts);
  return graph === undefined ? undefined : factsOf(graph);
}

function factsOf(graph: Graph): PictureFacts {
  const sampler = samplerOf(graph);
  if (sampler === undefined) {
    const remark = "its workflow has no sampler that is known here, so most of it is unknown";
    return { program: PROGRAM, facts: new Map(), request: undefined, remarks: [remark], urls: [] };
  }
  const of = (name: string): Node => nodeAt(graph, sampler.inputs.get(name)) ?? sampler;
  const [guider, sigmas, noise, selected] = [of("guider"), of("sigmas"), of("noise"), of("sampler")];
  const conditioning = first(guider, "positive", "conditioning");
  const model = upstreamModel(graph, guider.inputs.has("model") ? guider : sampler);
  const latent = sizeNode(graph, sampler.inputs.get("latent_image"));
  const name = textAt(graph, selected.inputs.get("sampler_name"));
  const facts = new Map<string, Fact>([
    ["prompt", words(graph, conditioning)],
    ["neg", guider.inputs.has("negative") ? words(graph, guider.inputs.get("negative")) : fact("")],
    ["seed", numberAt(graph, first(noise, "noise_seed", "seed"))],
    ["noise_draw", fact(undefined, "drawn on the CPU in float32, in a layout of its own")],
    ["sample_steps", numberAt(graph, sigmas.inputs.get("steps"))],
    ["sampler", name === undefined ? UNKNOWN : fact(name)],
    ["scheduler", schedulerOf(graph, sigmas, model)],
    ["settings", fact(COMFYUI)],
    ["guidance_scale", fractionAt(graph, guider.inputs.get("cfg"))],
    ["guidance", guidanceOf(graph, guider, conditioning)],
  ]);
  noteShift(graph, model, facts);
  noteLoaded(model, facts);
  noteAdapters(graph, model, facts);
  for (const side of latent === undefined ? [] : ["width", "height"]) {
    facts.set(side, numberAt(graph, latent?.inputs.get(side)));
  }
  return {
    program: PROGRAM,
    facts,
    request: requestOf(facts),
    remarks: [...remarksOf(graph, sampler, sigmas, facts)],
    urls: [],
  };
}

function* remarksOf(graph: Graph, sampler: Node, sigmas: Node, facts: Facts): Generator<string> {
  const denoise = numberAt(graph, sigmas.inputs.get("denoise")).value;
  if (denoise !== undefined && !isSame(denoise, 1)) {
    const written = typeof denoise === "number" ? fractionText(denoise) : String(denoise);
    yield `denoise ${written}: it began from another picture, which is not known here`;
  }
  if ([...graph.values()].filter(({ kind }) => kind === sampler.kind).length > 1) {
    yield "the workflow has several samplers; the one nearest to the saved picture is taken";
  }
  for (const [name, known] of [
    ["sampler", SAMPLERS],
    ["scheduler", SCHEDULES],
  ] as const) {
    const told = facts.get(name) ?? UNKNOWN;
    if (told.value !== undefined && !(known as readonly Value[]).includes(told.value)) {
      yield `the ${name} ${shown(told)} has no counterpart here`;
    }
  }
}

/** The first of these inputs that a node has. */
function first({ inputs }: Node, ...names: readonly string[]): Json | undefined {
  return inputs.get(names.find((name) => inputs.has(name)) ?? "");
}

function noteLoaded(model: readonly Node[], facts: Map<string, Fact>): void {
  for (const { inputs } of model) {
    for (const name of LOADED) {
      const value = inputs.get(name);
      if (typeof value !== "string") continue;
      facts.set("model", named(value, "a file's name; what is in it is not told"));
      const weights = inputs.get("weight_dtype");
      if (typeof weights === "string") {
        facts.set("dtype", fact(undefined, `its weights are loaded as ${weights}`));
      }
      return;
    }
  }
}

function noteAdapters(graph: Graph, model: readonly Node[], facts: Map<string, Fact>): void {
  let number = 0;
  // In the order in which they are applied.
  for (const { name, multiplier } of model.toReversed().flatMap((node) => [...lorasOf(graph, node)])) {
    const at = `loras.${number++}`;
    facts.set(`${at}.path`, named(name));
    facts.set(`${at}.sha256`, UNKNOWN);
    facts.set(`${at}.network_multiplier`, multiplier);
    const note = "merged as the model is loaded, or at each call where memory is short";
    facts.set(`${at}.placement`, fact(undefined, note));
  }
}

function* lorasOf(graph: Graph, node: Node): Generator<{ name: string; multiplier: Fact }> {
  const name = node.inputs.get("lora_name");
  if (typeof name === "string") {
    yield { name, multiplier: fractionAt(graph, first(node, "strength_model", "strength")) };
  }
  for (const value of node.inputs.values()) {
    // Nodes that hold a list of adapters.
    const listed = isObject(value) ? value.get("lora") : undefined;
    if (!isObject(value) || typeof listed !== "string" || isOff(value.get("on"))) continue;
    yield { name: listed, multiplier: fractionAt(graph, value.get("strength")) };
  }
}

function words(graph: Graph, link: Json | undefined): Fact {
  const start = nodeAt(graph, link);
  for (const node of start === undefined ? [] : upstream(graph, start)) {
    if (node.kind.includes("Zero")) return fact("", "zeros in place of a text");
    const name = ["text", "t5xxl", "prompt"].find((known) => node.inputs.has(known));
    if (name !== undefined) return fact(textAt(graph, node.inputs.get(name)));
  }
  return UNKNOWN;
}

function sizeNode(graph: Graph, link: Json | undefined): Node | undefined {
  const start = nodeAt(graph, link);
  if (start === undefined) return undefined;
  for (const node of upstream(graph, start)) {
    if (node.inputs.has("width") && node.inputs.has("height")) return node;
  }
  return undefined;
}

function schedulerOf(graph: Graph, sigmas: Node, model: readonly Node[]): Fact {
  const name = textAt(graph, sigmas.inputs.get("scheduler"));
  if (name === undefined) return fact(undefined, `its steps come from ${sigmas.kind}`);
  const shifting = shiftingIn(model);
  if (shifting === undefined) return fact(name, "with the model's own shift");
  const shift = shown(numberAt(graph, first(shifting, "shift", "max_shift")));
  return fact(name, `shift ${shift} (${shifting.kind})`);
}

/** The fixed shift, where a node says one; that of ModelSamplingFlux depends on the size. */
function noteShift(graph: Graph, model: readonly Node[], facts: Map<string, Fact>): void {
  const shifting = shiftingIn(model);
  if (shifting?.inputs.has("shift")) facts.set("shift", fractionAt(graph, shifting.inputs.get("shift")));
}

function shiftingIn(model: readonly Node[]): Node | undefined {
  return model.find(({ kind }) => kind.startsWith("ModelSampling"));
}

function guidanceOf(graph: Graph, guider: Node, conditioning: Json | undefined): Fact {
  const start = nodeAt(graph, conditioning);
  for (const node of start === undefined ? [] : upstream(graph, start)) {
    if (node.kind !== "FluxGuidance") continue;
    const scale = shown(numberAt(graph, node.inputs.get("guidance")));
    return fact("classifier-free", `and a distilled guidance of ${scale}, which Chroma has not`);
  }
  if (!guider.inputs.has("cfg")) return fact(`as ${guider.kind} does it`);
  return fact("classifier-free", "one pass at 1, without negative text");
}

function numberAt(graph: Graph, value: Json | undefined): Fact {
  const found = valueAt(graph, value);
  return typeof found === "string" ? UNKNOWN : fact(found);
}

function fractionAt(graph: Graph, value: Json | undefined): Fact {
  const found = valueAt(graph, value);
  const isFraction = typeof found !== "string" && found !== undefined && found < 1e300 && found > -1e300;
  return isFraction ? fact(Number(found)) : UNKNOWN;
}

function isOff(value: Json | undefined): boolean {
  return value !== undefined && !isTruthy(value);
}
