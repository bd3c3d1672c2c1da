/** Finds what each sample of a run was drawn with: its settings, and the adapter that was saved at its step. */
import type { NoiseDraw } from "chromarpc/web";
import { oneLine } from "./config-limits.ts";
import { shownOf } from "./python-values.ts";
import {
  type AdapterHeader,
  type Ignored,
  type RunFolder,
  type SampleFile,
  Unreadable,
} from "./run-folder.ts";
import { ARCHITECTURE, type SampleSettings, sampleOf, type TrainingRun } from "./settings.ts";

/** From then on ai-toolkit runs on torch 2.13, which draws bf16 noise as float32 and rounds it. */
export const FLOAT32_DRAW_SINCE_MS = Date.UTC(2026, 6, 27);
/** From then on ai-toolkit adds a LoKr by its factors. */
export const FACTORIZED_LOKR_SINCE_MS = Date.UTC(2026, 6, 15);
/** Later times are no times: the end of the year 9999. */
const LAST_TIME_MS = Date.UTC(10_000, 0, 1);

/** A sample, and what it takes to draw it again. */
export interface Row {
  readonly file: SampleFile;
  /** Undefined where the config does not tell them. */
  readonly settings: SampleSettings | undefined;
  /** Name of the adapter that was saved at this step, whether or not it is still there; null at step 0. */
  readonly checkpoint: string | null;
  readonly checkpointKept: boolean;
  /** Why it cannot be drawn; null where it can. */
  readonly reason: string | null;
}

/** All samples of a run, by step and index, and the files that are none. */
export interface Pairing {
  readonly rows: readonly Row[];
  readonly ignored: readonly Ignored[];
}

/** The noise draw that the date of a sample suggests. */
export function likelyDraw({ file }: Row): NoiseDraw {
  return file.timeMs < FLOAT32_DRAW_SINCE_MS ? "legacy" : "float32";
}

/** Whether a sample was drawn when the trainer added a LoKr by its factors. */
export function hasFactorizedLokr({ file }: Row): boolean {
  return file.timeMs >= FACTORIZED_LOKR_SINCE_MS && file.timeMs < LAST_TIME_MS;
}

/**
 * Pairs a run's samples with its saved adapters.
 *
 * @throws Unreadable the folder holds too many files.
 */
export async function pair(run: TrainingRun, folder: RunFolder): Promise<Pairing> {
  const { samples, ignored } = folder.samples();
  const adapters = new Adapters(run, folder, Math.max(0, ...samples.map(({ step }) => step)));
  const rows: Row[] = [];
  for (const file of samples) rows.push(await rowOf(file, run, adapters));
  return { rows, ignored };
}

async function rowOf(file: SampleFile, run: TrainingRun, adapters: Adapters): Promise<Row> {
  const settings = sampleOf(run, file.step, file.index);
  const found = await adapters.ofStep(file.step);
  let { reason } = found;
  if (settings === undefined) {
    reason = `the config has no sample ${file.index}: it was changed after this was drawn`;
  } else if (typeof settings === "string") {
    reason = settings;
  } else if (settings.seed === null) {
    reason = "its seed was drawn at random (seed: -1), and the trainer writes it down nowhere";
  } else {
    const missing = unresolvedNames(settings, run);
    if (missing.length > 0) {
      const names = missing.map((name) => `\${${name}}`).join(", ");
      reason = `its text holds ${names}, which a page cannot replace: chromarpc replay --allow-env ${missing[0]} can`;
    }
  }
  return {
    file,
    settings: typeof settings === "string" ? undefined : settings,
    checkpoint: found.checkpoint,
    checkpointKept: found.isKept,
    reason,
  };
}

function unresolvedNames(settings: SampleSettings, run: TrainingRun): string[] {
  const texts = [settings.prompt, settings.negativePrompt];
  return run.unresolved.filter((name) => texts.some((text) => text.includes(`\${${name}}`)));
}

/** The adapter of a step, whether it is there, and why it cannot be used. */
interface Found {
  readonly checkpoint: string | null;
  readonly isKept: boolean;
  readonly reason: string | null;
}

/** The adapters that a run saved, by step. */
class Adapters {
  readonly #run: TrainingRun;
  readonly #folder: RunFolder;
  readonly #lastStep: number;
  readonly #present: ReadonlySet<string>;
  readonly #headers = new Map<string, AdapterHeader | string>();
  readonly #answers = new Map<number, Found>();

  constructor(run: TrainingRun, folder: RunFolder, lastStep: number) {
    this.#run = run;
    this.#folder = folder;
    this.#lastStep = lastStep;
    this.#present = new Set(folder.names().filter((name) => name.endsWith(".safetensors")));
  }

  async ofStep(step: number): Promise<Found> {
    const known = this.#answers.get(step) ?? (await this.#find(step));
    this.#answers.set(step, known);
    return known;
  }

  async #find(step: number): Promise<Found> {
    const run = this.#run;
    if (step === 0) {
      const started =
        "the run went on from another adapter (network.pretrained_lora_path), which is not in its folder";
      return { checkpoint: null, isKept: false, reason: run.isPretrained ? started : null };
    }
    if (run.networkType === "")
      return { checkpoint: null, isKept: false, reason: "the run trains the whole model, and no adapter" };
    // The job's name may itself end like a step, so names are built, never taken apart.
    for (const name of [run.name, `${run.name}_LoRA`]) {
      const { numbered, last } = namesOf(name, step);
      for (const file of [numbered, last]) {
        if (!this.#present.has(file)) continue;
        const header = await this.#header(file);
        if (typeof header === "string") {
          if (file === numbered || step === this.#lastStep)
            return { checkpoint: file, isKept: true, reason: header };
        } else if (this.#isOf(header, file === numbered, step)) {
          return { checkpoint: file, isKept: true, reason: foreign(file, header) };
        }
      }
    }
    return this.#missing(step);
  }

  #isOf(header: AdapterHeader, isNumbered: boolean, step: number): boolean {
    return header.step === null ? isNumbered || step === this.#lastStep : header.step === step;
  }

  async #missing(step: number): Promise<Found> {
    const { name, totalSteps, saveEvery, savesKept } = this.#run;
    const { numbered, last } = namesOf(name, step);
    // Else it would have been taken: it says that it is of another step.
    if (this.#present.has(numbered)) {
      const header = await this.#header(numbered);
      const says = typeof header === "string" ? null : header.step;
      return {
        checkpoint: numbered,
        isKept: true,
        reason: `${numbered} says that it was saved at step ${says}`,
      };
    }
    if (step === totalSteps && !this.#present.has(last)) {
      const reason = "checkpoint deleted: the run's last adapter is not in its folder";
      return { checkpoint: last, isKept: false, reason };
    }
    if (saveEvery && step % saveEvery !== 0 && step !== totalSteps) {
      const reason = `no checkpoint was saved at this step (save_every: ${saveEvery})`;
      return { checkpoint: null, isKept: false, reason };
    }
    const kept = savesKept ? ` (max_step_saves_to_keep: ${savesKept})` : "";
    return { checkpoint: numbered, isKept: false, reason: `checkpoint deleted${kept}` };
  }

  async #header(name: string): Promise<AdapterHeader | string> {
    const known = this.#headers.get(name) ?? (await this.#read(name));
    this.#headers.set(name, known);
    return known;
  }

  async #read(name: string): Promise<AdapterHeader | string> {
    try {
      return await this.#folder.adapterHeader(name);
    } catch (error) {
      if (error instanceof Unreadable) return oneLine(error);
      throw error;
    }
  }
}

function namesOf(name: string, step: number): { readonly numbered: string; readonly last: string } {
  const digits = step.toString().padStart(9, "0");
  return { numbered: `${name}_${digits}.safetensors`, last: `${name}.safetensors` };
}

function foreign(file: string, { baseModel }: AdapterHeader): string | null {
  if (baseModel === "" || baseModel === ARCHITECTURE) return null;
  return `${file} is an adapter of another model: ${shownOf(baseModel.slice(0, 40))}`;
}
