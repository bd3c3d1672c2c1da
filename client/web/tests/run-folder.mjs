/** Writes training runs' folders, whose samples a server draws as the trainer would have. */
import { mkdir, readFile, writeFile } from "node:fs/promises";
import path from "node:path";
import { LORA_ROOT } from "./stack.mjs";

/** Today's noise draw. */
const TIME_MS = 1_795_648_911_717;
const ADAPTER = "hollow_shapes.safetensors";

/** A config of ai-toolkit. */
export function configText(name, sample) {
  const lines = Object.entries(sample).map(([key, value]) => `      ${key}: ${JSON.stringify(value)}\n`);
  return `job: extension
config:
  name: ${name}
  process:
  - type: sd_trainer
    trigger_word: hlw
    network: {type: lora, linear: 8}
    save: {save_every: 250, max_step_saves_to_keep: 1}
    train: {dtype: bf16, steps: 750}
    model: {name_or_path: models/chroma-mini.safetensors, arch: chroma, quantize: true}
    sample:
${lines.join("")}`;
}

/** Writes a sample. */
export async function writeSample(folder, step, index, data) {
  const number = `${step}`.padStart(9, "0");
  await mkdir(path.join(folder, "samples"), { recursive: true });
  await writeFile(path.join(folder, "samples", `${TIME_MS + step}__${number}_${index}.jpg`), data);
}

/** Has a server draw one picture, by its HTTP API; the trainer's own JPEG unless another format is named. */
export async function drawTrainers(
  url,
  { profile = "preview-exact", adapter, format = "IMAGE_FORMAT_JPEG_TRAINER", ...prompt },
) {
  const body = {
    model: "chroma-mini",
    profile,
    prompts: [prompt],
    loras: adapter === undefined ? [] : [{ path: adapter, network_multiplier: 1 }],
    output: { format },
    trainer: { quantize: true },
  };
  const headers = { "content-type": "application/json" };
  const asked = await fetch(`${url}v1/inference`, { method: "POST", headers, body: JSON.stringify(body) });
  const { request_id: id, ...refusal } = await asked.json();
  if (!asked.ok) throw new Error(JSON.stringify(refusal));
  for (;;) {
    const answer = await fetch(`${url}v1/requests/${id}/result`);
    const { outputs, error } = await answer.json();
    if (error) throw new Error(JSON.stringify(error));
    const image = outputs?.images?.[0];
    if (image !== undefined) return Buffer.from(await (await fetch(new URL(image.url, url))).arrayBuffer());
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
}

/** A small run: two samples without adapter, two with the one of step 250, and one of step 500, whose adapter is gone. */
export async function writeRun(url, folder) {
  const prompts = [
    "a [trigger] large red circle on a white background",
    "a [trigger] green square --seed 7 --w 96",
  ];
  const sample = {
    width: 64,
    height: 64,
    neg: "",
    seed: 42,
    walk_seed: true,
    guidance_scale: 4,
    sample_steps: 4,
  };
  await mkdir(folder, { recursive: true });
  await writeFile(path.join(folder, "config.yaml"), configText("a run", { ...sample, prompts }));
  const drawn = [
    { prompt: "a hlw large red circle on a white background", width: 64, height: 64, seed: 42 },
    { prompt: "a hlw green square", width: 96, height: 64, seed: 7 },
  ].map((prompt) => ({ ...prompt, sample_steps: 4, guidance_scale: 4 }));
  for (const step of [0, 250]) {
    for (const [index, prompt] of drawn.entries()) {
      const adapter = step > 0 ? ADAPTER : undefined;
      await writeSample(folder, step, index, await drawTrainers(url, { ...prompt, adapter }));
    }
  }
  await writeSample(folder, 500, 0, await drawTrainers(url, { ...drawn[0], profile: "preview" }));
  await writeFile(path.join(folder, "samples", "holiday.jpg"), "no picture");
  await writeFile(path.join(folder, "a run_000000250.safetensors"), await savedAt(250));
}

/** The bundled adapter, as if it had been saved at a step. */
async function savedAt(step) {
  const file = await readFile(path.join(LORA_ROOT, ADAPTER));
  const size = Number(file.readBigUInt64LE(0));
  const header = JSON.parse(file.subarray(8, 8 + size).toString());
  header.__metadata__ = { ...header.__metadata__, training_info: JSON.stringify({ step, epoch: 0 }) };
  const written = Buffer.from(JSON.stringify(header));
  const start = Buffer.alloc(8);
  start.writeBigUInt64LE(BigInt(written.length));
  return Buffer.concat([start, written, file.subarray(8 + size)]);
}
