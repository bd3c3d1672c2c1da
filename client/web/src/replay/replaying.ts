/** The replay that this page shows: its folder, how far it is, and the pictures by sample. */
import { computed, effect, type Signal, signal } from "@preact/signals";
import type { GenerationEvent } from "chromarpc/web";
import { client, noteFailure, whenLeaving } from "../connection.ts";
import type { DrawnHere } from "../pictures/state.ts";
import { decode } from "../pixels/decoding.ts";
import { duration } from "../words.ts";
import { oneLine } from "./config-limits.ts";
import { type Drawing, type Drawn, Interrupted } from "./drawing.ts";
import type { Row } from "./pairing.ts";
import type { Ignored, RunFolder } from "./run-folder.ts";
import { ModelWanted, type Server, Unusable } from "./serving.ts";
import { type Kept, keyOf, type Options, pending, type Result, replay, type Watcher } from "./session.ts";
import type { TrainingRun } from "./settings.ts";

/** A sample as the page shows it. */
export interface Shown {
  readonly result: Result;
  /** Object URLs; undefined where there is no picture. */
  readonly theirsUrl: string | undefined;
  readonly oursUrl: string | undefined;
}

export type Phase = "working" | "done" | "stopped" | "failed" | "unusable";

/** A replay. */
export interface Replaying {
  readonly name: string;
  readonly phase: Phase;
  /** What ended it early, or keeps it from beginning; empty otherwise. */
  readonly error: string;
  /** Models to choose one of, where none fits the config. */
  readonly models: readonly string[];
  readonly options: Options;
  readonly run: TrainingRun | undefined;
  readonly server: Server | undefined;
  readonly assumptions: readonly string[];
  readonly ignored: readonly Ignored[];
  /** What the calibration said; undefined before. */
  readonly matches: boolean | null | undefined;
  /** By step and index. */
  readonly samples: ReadonlyMap<string, Signal<Shown>>;
}

/** How far the drawing is. */
export interface Progress {
  readonly line: string;
  readonly done: number;
  readonly total: number;
  /** What the samples that are being drawn are at, by step and index. */
  readonly drawing: ReadonlyMap<string, string>;
}

const NO_PROGRESS: Progress = { line: "", done: 0, total: 0, drawing: new Map() };

export const replaying = signal<Replaying | undefined>(undefined);
export const progress = signal<Progress>(NO_PROGRESS);
/** The pair that is open in full size. */
export const openedKey = signal<string | undefined>(undefined);
/** The one that was opened last. */
export const latestKey = signal<string | undefined>(undefined);
/** How often a folder was given: the view is brought into sight each time. */
export const starts = signal(0);

/** All samples, by step and index. */
export const shownSamples = computed(() =>
  [...(replaying.value?.samples.values() ?? [])].map(({ value }) => value),
);

let folder: RunFolder | undefined;
let kept: Kept = { pictures: new Map() };
let abort = new AbortController();

whenLeaving(stop);
effect(() => {
  if (openedKey.value !== undefined) latestKey.value = openedKey.value;
});

/** Redraws a folder; one that is being redrawn is stopped. */
export async function begin(given: RunFolder | Promise<RunFolder>): Promise<void> {
  close();
  starts.value += 1;
  replaying.value = newReplay("", { model: undefined, drawAnyway: false });
  const own = abort;
  try {
    const opened = await given;
    if (own.signal.aborted) return; // another folder came meanwhile
    folder = opened;
  } catch (error) {
    if (!own.signal.aborted) change({ phase: "unusable", error: oneLine(error) });
    return;
  }
  await work(newReplay(folder.name, { model: undefined, drawAnyway: false }));
}

/** Draws what is missing; also otherwise than before. */
export async function goOn(options: Partial<Options> = {}): Promise<void> {
  const before = replaying.value;
  if (before === undefined || before.phase === "working") return;
  forgetPictures(before);
  await work(newReplay(before.name, { ...before.options, ...options }));
}

/** Stops drawing; the jobs that are on their way are cancelled. */
export function stop(): void {
  abort.abort();
}

/** Stops it, and takes it off the page. */
export function close(): void {
  stop();
  abort = new AbortController();
  if (replaying.value !== undefined) forgetPictures(replaying.value);
  replaying.value = undefined;
  progress.value = NO_PROGRESS;
  openedKey.value = undefined;
  latestKey.value = undefined;
  folder = undefined;
  kept = { pictures: new Map() };
}

/** Our picture of a sample, to compare others with; undefined where there is none. */
export function drawnOf(key: string | undefined): DrawnHere | undefined {
  const result = key === undefined ? undefined : replaying.value?.samples.get(key)?.value.result;
  if (result?.drawn === undefined) return undefined;
  const { data, plan, prepared } = result.drawn;
  return { name: `${nameOf(result.row.file)}, redrawn`, data, index: 0, plan, prepared };
}

function newReplay(name: string, options: Options): Replaying {
  return {
    name,
    phase: "working",
    error: "",
    models: [],
    options,
    run: undefined,
    server: undefined,
    assumptions: [],
    ignored: [],
    matches: undefined,
    samples: new Map(),
  };
}

function change(values: Partial<Replaying>): void {
  if (replaying.value !== undefined) replaying.value = { ...replaying.value, ...values };
}

async function work(begun: Replaying): Promise<void> {
  const given = folder;
  if (given === undefined) return;
  abort = new AbortController();
  const own = abort;
  replaying.value = begun;
  progress.value = { ...NO_PROGRESS, line: "Reading the folder …" };
  const urls = new Urls(given);
  try {
    await replay(client, given, begun.options, kept, decode, watcherOf(own.signal, urls), own.signal);
    if (abort === own) change({ phase: "done" });
  } catch (error) {
    if (abort !== own) return; // another folder is here
    noteFailure(error);
    const isStopped = error instanceof Interrupted || own.signal.aborted;
    change({
      phase: isStopped ? "stopped" : error instanceof Unusable ? "unusable" : "failed",
      error: isStopped ? "" : oneLine(error),
      models: error instanceof ModelWanted ? error.models : [],
    });
  } finally {
    if (abort === own) progress.value = { ...progress.value, line: "", drawing: new Map() };
  }
}

function watcherOf(given: AbortSignal, urls: Urls): Watcher {
  /** Does nothing any more once it was stopped: another folder may be here. */
  function unlessStopped<T extends unknown[]>(action: (...said: T) => void): (...said: T) => void {
    return (...said) => {
      if (!given.aborted) action(...said);
    };
  }
  return {
    say: unlessStopped((line) => {
      progress.value = { ...progress.value, line };
    }),
    opened: unlessStopped((run, { rows, ignored }) => {
      const shown = (row: Row): Shown => ({ result: pending(row), theirsUrl: undefined, oursUrl: undefined });
      const samples = new Map(rows.map((row) => [keyOf(row.file), signal(shown(row))]));
      change({ run, ignored, assumptions: run.assumptions, samples });
    }),
    chosen: unlessStopped((server, assumptions) => change({ server, assumptions })),
    calibrated: unlessStopped(({ matches }, said) =>
      change({ matches, assumptions: [...(replaying.value?.assumptions ?? []), ...said] }),
    ),
    started: unlessStopped((total) => {
      progress.value = { ...NO_PROGRESS, total };
    }),
    event: unlessStopped((drawing, event) => {
      const text = textOf(event);
      if (text === undefined) return;
      progress.value = {
        ...progress.value,
        line: "",
        drawing: new Map(progress.value.drawing).set(keyOf(drawing), text),
      };
    }),
    // What came out before it was stopped is shown, unless the view was closed.
    result(result) {
      const key = keyOf(result.row.file);
      const known = replaying.value?.samples.get(key);
      if (known === undefined || abort.signal !== given) return;
      const isEnded =
        result.drawn !== undefined || (result.reason !== null && known.value.result.reason === null);
      known.value = { ...known.value, result, oursUrl: urls.ours(known.value, result.drawn) };
      if (result.isReadable) urls.theirs(known);
      if (!isEnded) return;
      const drawing = new Map(progress.value.drawing);
      drawing.delete(key);
      progress.value = { ...progress.value, done: progress.value.done + 1, drawing };
    },
  };
}

/** Object URLs of the pictures of one replay. */
class Urls {
  readonly #folder: RunFolder;
  readonly #asked = new Set<Signal<Shown>>();

  constructor(given: RunFolder) {
    this.#folder = given;
  }

  /** Shows the trainer's picture, once. */
  theirs(shown: Signal<Shown>): void {
    if (this.#asked.has(shown)) return;
    this.#asked.add(shown);
    void this.#folder.file(shown.value.result.row.file.name).then(
      (file) => {
        shown.value = { ...shown.value, theirsUrl: URL.createObjectURL(file) };
      },
      () => undefined, // it was read a moment ago, and is gone
    );
  }

  ours(shown: Shown, drawn: Drawn | undefined): string | undefined {
    if (drawn === undefined || drawn === shown.result.drawn) return shown.oursUrl;
    if (shown.oursUrl !== undefined) URL.revokeObjectURL(shown.oursUrl);
    return URL.createObjectURL(new Blob([drawn.data], { type: drawn.mediaType }));
  }
}

function forgetPictures({ samples }: Replaying): void {
  for (const { value } of samples.values()) {
    if (value.theirsUrl !== undefined) URL.revokeObjectURL(value.theirsUrl);
    if (value.oursUrl !== undefined) URL.revokeObjectURL(value.oursUrl);
  }
}

/** What a drawing is at, for people; undefined for events that say nothing of it. */
function textOf(event: GenerationEvent): string | undefined {
  switch (event.type) {
    case "queued":
      return event.estimatedWaitMs === undefined
        ? `waits, number ${event.position}`
        : `waits, number ${event.position}, about ${duration(event.estimatedWaitMs)}`;
    case "loading":
      return event.stage;
    case "step":
      return `step ${event.step} of ${event.totalSteps}`;
    default:
      return undefined;
  }
}

/** Names the drawing for a line of progress. */
export function nameOf({ step, index }: Pick<Drawing, "step" | "index">): string {
  return `step ${step}, sample ${index}`;
}
