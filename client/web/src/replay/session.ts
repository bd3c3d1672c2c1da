/** One replay from the folder to the results: resolves, calibrates, draws, compares. Knows no page. */
import type { BaseClient, GenerationEvent, LokrForm, NoiseDraw } from "chromarpc/web";
import { NoPicture } from "../pixels/picture-file.ts";
import { compare, type Pixels, type Similarity } from "../pixels/similarity.ts";
import {
  type Calibration,
  DRAWS,
  decides,
  judge,
  MOST_TRIED,
  sentenceOf,
  type Trial,
} from "./calibration.ts";
import { readConfig } from "./config-file.ts";
import { ConfigError, oneLine } from "./config-limits.ts";
import {
  Artist,
  type Drawing,
  type DrawingClient,
  type Drawn,
  Interrupted,
  type Outcome,
} from "./drawing.ts";
import {
  FLOAT32_DRAW_SINCE_MS,
  hasFactorizedLokr,
  likelyDraw,
  type Pairing,
  pair,
  type Row,
} from "./pairing.ts";
import { MAX_PICTURE_BYTES, type RunFolder, Unreadable } from "./run-folder.ts";
import { choose, type Server, Unusable } from "./serving.ts";
import { requestSeed, resolveRun, type TrainingRun } from "./settings.ts";

export const IN_FLIGHT = 4;
export const MIN_PSNR_DB = 30;

/** What a replay asks of a client. */
export type ReplayClient = DrawingClient & Pick<BaseClient, "listModels" | "serverInfo">;

/** What the person asks for. */
export interface Options {
  /** Undefined finds the run's. */
  readonly model: string | undefined;
  /** Whether to draw all although the calibration matched nothing. */
  readonly drawAnyway: boolean;
}

/** A sample beside its redrawing. */
export interface Result {
  readonly row: Row;
  /** Whether the trainer's file is a picture. */
  readonly isReadable: boolean;
  readonly noiseDraw: NoiseDraw;
  readonly lokrForm: LokrForm | undefined;
  readonly drawn: Drawn | undefined;
  readonly similarity: Similarity | undefined;
  /** Why there is no picture of ours beside the trainer's; null where there is, or where one is to come. */
  readonly reason: string | null;
}

/** Sees a replay go on. */
export interface Watcher {
  /** A line for people. */
  say(text: string): void;
  /** The config is understood, and the folder holds these samples. */
  opened(run: TrainingRun, pairing: Pairing): void;
  /** Where it is drawn. */
  chosen(server: Server, assumptions: readonly string[]): void;
  calibrated(calibration: Calibration, assumptions: readonly string[]): void;
  /** So many samples are to be drawn. */
  started(total: number): void;
  event(drawing: Drawing, event: GenerationEvent): void;
  /** A sample as it is now. */
  result(result: Result): void;
}

/** What outlives an interruption: whoever goes on draws only what is missing. */
export interface Kept {
  readonly pictures: Map<string, Drawn>;
}

/**
 * Draws a run's samples again and compares them with the trainer's.
 *
 * @param decode a picture file's pixels; throws `NoPicture`.
 * @returns what the calibration said; undefined where nothing could be drawn.
 * @throws Unusable nothing can be drawn.
 * @throws ChromarpcError the server cannot be asked.
 * @throws Interrupted the signal was raised; no job is left running.
 */
export async function replay(
  client: ReplayClient,
  folder: RunFolder,
  options: Options,
  kept: Kept,
  decode: (data: Uint8Array<ArrayBuffer>) => Promise<Pixels>,
  watcher: Watcher,
  signal: AbortSignal,
): Promise<Calibration | undefined> {
  let run: TrainingRun;
  let pairing: Pairing;
  try {
    const { name, content } = await folder.config();
    run = resolveRun(readConfig(content, name));
    pairing = await pair(run, folder);
  } catch (error) {
    if (error instanceof ConfigError || error instanceof Unreadable) throw new Unusable(oneLine(error));
    throw error;
  }
  if (pairing.rows.length === 0)
    throw new Unusable("there is no sample of ai-toolkit in the folder's “samples”");
  watcher.opened(run, pairing);
  const assumptions = [...run.assumptions];
  const { server, inFlight } = await choose(client, run, options.model, IN_FLIGHT, assumptions, signal);
  watcher.chosen(server, assumptions);
  const artist = new Artist(client, folder, kept.pictures, watcher);
  return new Session({ artist, folder, run, pairing, server, decode, watcher }, inFlight, signal).replay(
    options.drawAnyway,
  );
}

interface Parts {
  readonly artist: Artist;
  readonly folder: RunFolder;
  readonly run: TrainingRun;
  readonly pairing: Pairing;
  readonly server: Server;
  readonly decode: (data: Uint8Array<ArrayBuffer>) => Promise<Pixels>;
  readonly watcher: Watcher;
}

class Session {
  readonly #parts: Parts;
  readonly #inFlight: number;
  readonly #signal: AbortSignal;
  readonly #results = new Map<string, Result>();

  constructor(parts: Parts, inFlight: number, signal: AbortSignal) {
    this.#parts = parts;
    this.#inFlight = inFlight;
    this.#signal = signal;
  }

  async replay(drawAnyway: boolean): Promise<Calibration | undefined> {
    const { pairing, run, watcher } = this.#parts;
    for (const row of pairing.rows) {
      if (this.#signal.aborted) throw new Interrupted();
      this.#note(await this.#begin(row));
    }
    const calibration = await this.#calibrate();
    if (calibration !== undefined) watcher.calibrated(calibration, eras(calibration, pairing.rows, run));
    for (const result of this.#results.values()) this.#note(this.#withEra(result, calibration));
    if (calibration?.matches === false && !drawAnyway) {
      const tried = new Set(calibration.trials.map(({ step, index }) => `${step} ${index}`));
      const differs = calibration.withAdapter
        ? "base, settings or adapter differ"
        : "base or settings differ";
      const reason = `${differs} (neither noise draw gives the trainer's picture where both were tried)`;
      for (const [key, result] of this.#results)
        if (result.reason === null && !tried.has(key)) this.#note({ ...result, reason });
    }
    await this.#draw();
    return calibration;
  }

  #note(result: Result): void {
    this.#results.set(keyOf(result.row.file), result);
    this.#parts.watcher.result(result);
  }

  /** A sample with the trainer's picture, checked; nothing is drawn yet. */
  async #begin(row: Row): Promise<Result> {
    const result = pending(row);
    let size: Pixels;
    try {
      size = await this.#parts.decode(await this.#theirs(row));
    } catch (error) {
      if (error instanceof Unreadable) return { ...result, reason: oneLine(error) };
      if (error instanceof NoPicture) return { ...result, reason: `the trainer's file ${error.message}` };
      throw error;
    }
    const { settings } = row;
    const isOther = settings && (size.width !== settings.width || size.height !== settings.height);
    if (result.reason !== null || !isOther) return { ...result, isReadable: true };
    const said = `${settings.width}×${settings.height}`;
    const reason = `it has ${size.width}×${size.height} pixels and the config says ${said}: the config was changed since`;
    return { ...result, isReadable: true, reason };
  }

  #theirs(row: Row): Promise<Uint8Array<ArrayBuffer>> {
    return this.#parts.folder.read(row.file.name, MAX_PICTURE_BYTES);
  }

  /** Draws samples of step 0 with both draws until one matches; without any, those of the first adapter. */
  async #calibrate(): Promise<Calibration | undefined> {
    const drawable = [...this.#results.values()].filter(({ reason }) => reason === null);
    if (drawable.length === 0) return undefined;
    const firstStep = Math.min(...drawable.map(({ row }) => row.file.step));
    const candidates = drawable
      .filter(({ row }) => row.file.step === firstStep)
      .sort((a, b) => workOf(a) - workOf(b) || a.row.file.index - b.row.file.index)
      .slice(0, MOST_TRIED);
    this.#parts.watcher.say(
      "Calibrating: which noise draw is the trainer's, and is the base model the same?",
    );
    const trials: Trial[] = [];
    for (const candidate of candidates) {
      const psnrDb = new Map<NoiseDraw, number>();
      const both = DRAWS.map((draw) => this.#drawing(this.#inEra(candidate, draw)));
      await this.#drawAll(both, async (drawing, outcome) => {
        const { similarity } = await this.#compared(candidate, outcome);
        if (similarity !== undefined) psnrDb.set(drawing.noiseDraw, similarity.psnrDb);
      });
      const trial = { step: candidate.row.file.step, index: candidate.row.file.index, psnrDb };
      trials.push(trial);
      if (decides(trial)) break;
    }
    const [first] = candidates;
    return judge(trials, first ? likelyDraw(first.row) : "float32", firstStep > 0);
  }

  /** The sample with its noise draw: the calibrated one, unless the trainer was renewed since. */
  #withEra(result: Result, calibration: Calibration | undefined): Result {
    if (calibration === undefined) return this.#inEra(result, likelyDraw(result.row));
    const tried = new Set(calibration.trials.map(({ step, index }) => `${step} ${index}`));
    const first = this.#parts.pairing.rows.find(({ file }) => tried.has(keyOf(file)));
    const isOld = first !== undefined && likelyDraw(first) === "legacy" && calibration.noiseDraw === "legacy";
    return this.#inEra(result, calibration.matches && isOld ? likelyDraw(result.row) : calibration.noiseDraw);
  }

  #inEra(result: Result, noiseDraw: NoiseDraw): Result {
    const isNew = noiseDraw === "float32" || hasFactorizedLokr(result.row);
    const lokrForm = this.#parts.run.networkType === "lokr" ? (isNew ? "factorized" : "weight") : undefined;
    return { ...result, noiseDraw, lokrForm };
  }

  #drawing({ row, noiseDraw, lokrForm }: Result): Drawing {
    const { file, settings } = row;
    const { run, server } = this.#parts;
    if (settings === undefined || settings.seed === null) throw new Error("a sample that cannot be drawn");
    return {
      step: file.step,
      index: file.index,
      model: server.model,
      profile: server.profile,
      prompt: settings.prompt,
      negativePrompt: settings.negativePrompt,
      width: settings.requestedWidth,
      height: settings.requestedHeight,
      seed: requestSeed(settings.seed),
      steps: settings.steps,
      guidanceScale: settings.guidanceScale,
      adapter: row.checkpoint,
      networkMultiplier: settings.networkMultiplier,
      trainer: { ...run.trainer, lokrForm },
      noiseDraw,
      suffix: file.name.split(".").at(-1) ?? "",
    };
  }

  async #draw(): Promise<void> {
    const wanted = [...this.#results.values()].filter(({ reason }) => reason === null);
    this.#parts.watcher.started(wanted.length);
    const byKey = new Map(wanted.map((result) => [keyOf(result.row.file), result]));
    await this.#drawAll(
      wanted.map((result) => this.#drawing(result)),
      async (drawing, outcome) => {
        const result = byKey.get(keyOf(drawing));
        if (result !== undefined) this.#note(await this.#compared(result, outcome));
      },
    );
  }

  #drawAll(
    drawings: readonly Drawing[],
    onOutcome: (drawing: Drawing, outcome: Outcome) => Promise<void>,
  ): Promise<void> {
    return this.#parts.artist.drawAll(drawings, this.#inFlight, this.#signal, onOutcome);
  }

  async #compared(result: Result, outcome: Outcome): Promise<Result> {
    if (typeof outcome === "string") return { ...result, reason: outcome };
    try {
      const theirs = await this.#theirs(result.row);
      const [ours, trainers] = await Promise.all([this.#oursOf(outcome), this.#parts.decode(theirs)]);
      return { ...result, drawn: outcome, similarity: compare(ours, trainers, isSame(outcome.data, theirs)) };
    } catch (error) {
      if (error instanceof Unreadable) return { ...result, reason: oneLine(error) };
      if (error instanceof NoPicture) return { ...result, reason: error.message };
      if (error instanceof RangeError)
        return { ...result, reason: `the server drew another size: ${error.message}` };
      throw error;
    }
  }

  async #oursOf({ data }: Drawn): Promise<Pixels> {
    try {
      return await this.#parts.decode(data);
    } catch (error) {
      if (error instanceof NoPicture) throw new NoPicture(`what the server drew ${error.message}`);
      throw error;
    }
  }
}

function eras(calibration: Calibration, rows: readonly Row[], run: TrainingRun): string[] {
  const said = [sentenceOf(calibration)];
  if (run.networkType === "lokr")
    said.push(
      "LoKr: by its factors for samples of 2026-07-15 or later and for today's noise; before, added to the weight.",
    );
  if (calibration.noiseDraw === "legacy" && rows.some(({ file }) => file.timeMs >= FLOAT32_DRAW_SINCE_MS))
    said.push("Samples of 2026-07-27 or later may be of a newer trainer than step 0.");
  return said;
}

/** A sample of which nothing is known but what the folder says. */
export function pending(row: Row): Result {
  return {
    row,
    isReadable: false,
    noiseDraw: likelyDraw(row),
    lokrForm: undefined,
    drawn: undefined,
    similarity: undefined,
    reason: row.reason,
  };
}

/** What tells a sample of a run from the others. */
export function keyOf({ step, index }: { readonly step: number; readonly index: number }): string {
  return `${step} ${index}`;
}

function workOf({ row: { settings } }: Result): number {
  return settings ? settings.width * settings.height * settings.steps : 0;
}

function isSame(first: Uint8Array, second: Uint8Array): boolean {
  return first.length === second.length && first.every((value, at) => value === second[at]);
}
