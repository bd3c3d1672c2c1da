/**
 * Has a server draw samples again, several at once, each only once: what was drawn is kept and found again.
 *
 * Knows the client's public calls; nothing of configs and reports.
 */
import {
  AccessDenied,
  type BaseClient,
  buildRequest,
  Cancelled,
  ChromarpcError,
  type GeneratedImage,
  type GenerateRequest,
  type GenerationEvent,
  type ImageFormat,
  type NoiseDraw,
  type Plan,
  type Prepared,
  ProtocolError,
  QueueFull,
  QuotaExceeded,
  ServerUnavailable,
  StatusError,
  type TrainerOptions,
} from "chromarpc/web";
import { oneLine } from "./config-limits.ts";
import { type RunFolder, Unreadable } from "./run-folder.ts";

/** What drawing asks of a client. */
export type DrawingClient = Pick<BaseClient, "deleteJob" | "generateRequest" | "listLoras" | "uploadLora">;

/** Before the tries that follow a lost connection, in milliseconds. */
const RETRY_WAITS_MS = [1000, 2000, 4000, 8000, 15_000];
/** How often a full queue is waited for. */
const MOST_WAITS = 240;
const FULL_WAIT_MS = 15_000;
/** What is asked for, by the suffix of the trainer's file: the encoder that made it, where the server has it. */
const OUTPUTS: Readonly<Record<string, { format: ImageFormat; quality?: number }>> = {
  jpg: { format: "jpeg-trainer" },
  jpeg: { format: "jpeg-trainer" },
  png: { format: "png" },
  webp: { format: "webp", quality: 80 },
};

/** One sample to draw, with nothing left open. */
export interface Drawing {
  readonly step: number;
  readonly index: number;
  readonly model: string;
  readonly profile: string;
  readonly prompt: string;
  readonly negativePrompt: string;
  readonly width: number;
  readonly height: number;
  readonly seed: bigint;
  readonly steps: number;
  readonly guidanceScale: number;
  /** Name of the file in the run's folder; null for the bare model. */
  readonly adapter: string | null;
  readonly networkMultiplier: number;
  readonly trainer: TrainerOptions;
  readonly noiseDraw: NoiseDraw;
  /** Of the trainer's file: `jpg`, `png`, `webp`. */
  readonly suffix: string;
}

/** A picture of ours, and what the server said about it. */
export interface Drawn {
  readonly data: Uint8Array<ArrayBuffer>;
  readonly mediaType: string;
  readonly warnings: readonly string[];
  readonly plan: Plan;
  readonly prepared: Prepared | undefined;
}

/** A picture, or why there is none: a sentence for people. */
export type Outcome = Drawn | string;

/** It was stopped by the person, or because the page is left. */
export class Interrupted extends Error {}

/** What a drawing is told of while it goes on. */
export interface DrawingWatcher {
  /** A line for people. */
  say(text: string): void;
  event(drawing: Drawing, event: GenerationEvent): void;
}

/** Draws on one server, with adapters out of one run folder. */
export class Artist {
  readonly #client: DrawingClient;
  readonly #folder: RunFolder;
  readonly #watcher: DrawingWatcher;
  /** Pictures by all that decided them; they outlive an interruption. */
  readonly #pictures: Map<string, Drawn>;
  /** What the server calls an adapter, or why it has none, by its file's name. */
  readonly #paths = new Map<string, Promise<{ readonly path: string; readonly sha256: string } | string>>();
  #listed: Promise<ReadonlyMap<string, string>> | undefined;
  #lastUpload: Promise<unknown> = Promise.resolve();

  constructor(
    client: DrawingClient,
    folder: RunFolder,
    pictures: Map<string, Drawn>,
    watcher: DrawingWatcher,
  ) {
    this.#client = client;
    this.#folder = folder;
    this.#pictures = pictures;
    this.#watcher = watcher;
  }

  /**
   * Draws them in their order, several at once.
   *
   * @param onOutcome told of each end.
   * @throws ChromarpcError the server cannot be reached any more, or lets nobody in.
   * @throws Interrupted the signal was raised; no job is left running.
   */
  async drawAll(
    drawings: readonly Drawing[],
    inFlight: number,
    signal: AbortSignal,
    onOutcome: (drawing: Drawing, outcome: Outcome) => Promise<void>,
  ): Promise<void> {
    const waiting = [...drawings];
    const stop = new AbortController();
    const forward = (): void => stop.abort();
    signal.addEventListener("abort", forward, { once: true });
    if (signal.aborted) forward();
    const work = async (): Promise<void> => {
      for (let drawing = waiting.shift(); drawing !== undefined; drawing = waiting.shift())
        await onOutcome(drawing, await this.#draw(drawing, stop.signal));
    };
    let first: unknown;
    const workers = Array.from({ length: Math.max(1, inFlight) }, () =>
      work().catch((error: unknown) => {
        first ??= error;
        stop.abort();
      }),
    );
    await Promise.all(workers);
    signal.removeEventListener("abort", forward);
    if (first !== undefined) throw first;
  }

  async #draw(drawing: Drawing, signal: AbortSignal): Promise<Outcome> {
    const facts = JSON.stringify(drawing, (_, value) => (typeof value === "bigint" ? `${value}` : value));
    const known = this.#pictures.get(facts);
    if (known !== undefined) return known;
    try {
      const adapter = drawing.adapter === null ? undefined : await this.#path(drawing.adapter, signal);
      if (typeof adapter === "string") return adapter;
      const request = requestOf(drawing, adapter);
      const drawn = await this.#insist(() => this.#once(drawing, request, signal), signal);
      this.#pictures.set(facts, drawn);
      return drawn;
    } catch (error) {
      return sentenceOf(error);
    }
  }

  async #once(drawing: Drawing, request: GenerateRequest, signal: AbortSignal): Promise<Drawn> {
    let image: GeneratedImage | undefined;
    let jobId: string | undefined;
    try {
      for await (const event of this.#client.generateRequest(request, { signal })) {
        if (event.type === "accepted") jobId = event.jobId;
        if (event.type === "imageReady") image = event.image;
        this.#watcher.event(drawing, event);
      }
    } finally {
      // Hundreds of jobs would push the person's own out of sight. One that was stopped has not ended yet.
      if (jobId !== undefined && !signal.aborted) void this.#client.deleteJob(jobId).catch(() => undefined);
    }
    if (image === undefined) throw new ProtocolError("the server drew no picture");
    const { data, mediaType, plan, prepared, warnings } = image;
    return {
      data,
      mediaType,
      warnings: [...new Set(warnings.map(({ message }) => message))],
      plan,
      prepared,
    };
  }

  /** Repeats what fails because the server is full, or away for a moment. */
  async #insist<T>(call: () => Promise<T>, signal: AbortSignal): Promise<T> {
    let [lost, full, cancelled] = [0, 0, 0];
    for (;;) {
      if (signal.aborted) throw new Interrupted();
      let delayMs = 0;
      try {
        return await call();
      } catch (error) {
        if (signal.aborted) throw new Interrupted();
        if (error instanceof ServerUnavailable) {
          const planned = RETRY_WAITS_MS[lost];
          if (planned === undefined) throw error;
          delayMs = error.retryAfterMs ?? planned;
          lost += 1;
        } else if (error instanceof Cancelled) {
          cancelled += 1;
          if (cancelled > 1) throw error;
        } else if (error instanceof QueueFull || error instanceof QuotaExceeded) {
          const isHopeless = error instanceof QuotaExceeded && error.retryAfterMs === undefined;
          if (full >= MOST_WAITS || isHopeless) throw error;
          if (full === 0) this.#watcher.say(`waiting: ${error.message}`);
          delayMs = error.retryAfterMs ?? FULL_WAIT_MS;
          full += 1;
        } else {
          throw error;
        }
      }
      await pause(delayMs, signal);
    }
  }

  /** What the server calls an adapter; uploaded if it has no file of this content. */
  #path(
    name: string,
    signal: AbortSignal,
  ): Promise<{ readonly path: string; readonly sha256: string } | string> {
    const known = this.#paths.get(name);
    if (known !== undefined) return known;
    // One after the other: an upload takes all of the line.
    const found = this.#lastUpload.then(() => this.#found(name, signal));
    this.#lastUpload = found.catch(() => undefined);
    this.#paths.set(name, found);
    return found;
  }

  async #found(name: string, signal: AbortSignal): Promise<{ path: string; sha256: string } | string> {
    try {
      const sha256 = await this.#folder.sha256(name);
      const path = await this.#insist(async () => {
        const listed = await this.#listedPaths(signal);
        return listed.get(sha256) ?? (await this.#uploaded(name, signal));
      }, signal);
      return { path, sha256 };
    } catch (error) {
      return sentenceOf(error);
    }
  }

  #listedPaths(signal: AbortSignal): Promise<ReadonlyMap<string, string>> {
    this.#listed ??= this.#client
      .listLoras({ signal })
      .then((loras) => new Map(loras.map(({ sha256, path }) => [sha256, path])))
      .catch((error: unknown) => {
        this.#listed = undefined;
        throw error;
      });
    return this.#listed;
  }

  async #uploaded(name: string, signal: AbortSignal): Promise<string> {
    const file = await this.#folder.file(name);
    const lora = await this.#client.uploadLora(file, {
      filename: name,
      signal,
      onProgress: (sent, total) => {
        const percent = total === 0 ? 100 : Math.floor((100 * sent) / total);
        this.#watcher.say(`uploading ${name}: ${percent} %`);
      },
    });
    return lora.path;
  }
}

function requestOf(
  drawing: Drawing,
  adapter: { readonly path: string; readonly sha256: string } | undefined,
): GenerateRequest {
  const { format, quality } = OUTPUTS[drawing.suffix] ?? { format: "png" };
  return buildRequest(
    {
      prompt: drawing.prompt,
      width: drawing.width,
      height: drawing.height,
      guidanceScale: drawing.guidanceScale,
      sampleSteps: drawing.steps,
      seed: drawing.seed,
      neg: drawing.negativePrompt,
    },
    {
      model: drawing.model,
      profile: drawing.profile,
      loras: adapter
        ? [
            {
              path: adapter.path,
              networkMultiplier: drawing.networkMultiplier,
              expectedSha256: adapter.sha256,
            },
          ]
        : [],
      noiseDraw: drawing.noiseDraw,
      trainer: drawing.trainer,
      outputFormat: format,
      outputQuality: quality,
      pictureRecord: false,
    },
  );
}

/**
 * Why there is no picture: what happened, and which fields.
 *
 * @throws whatever ends more than one picture.
 */
function sentenceOf(error: unknown): string {
  if (error instanceof Unreadable) return oneLine(error);
  const endsAll = error instanceof AccessDenied || error instanceof ServerUnavailable;
  if (endsAll || !(error instanceof ChromarpcError)) throw error;
  if (!(error instanceof StatusError)) return error.message;
  const blamed = error.violations.map(({ field, description }) =>
    field ? `${field}: ${description}` : description,
  );
  const extra = blamed.filter((text) => !error.message.includes(text));
  if (extra.length === 1 && extra[0]?.endsWith(error.message)) return extra[0];
  return [error.message, ...extra].join("; ");
}

function pause(durationMs: number, signal: AbortSignal): Promise<void> {
  return new Promise((resolve, reject) => {
    const stop = (): void => {
      clearTimeout(timer);
      reject(new Interrupted());
    };
    const timer = setTimeout(() => {
      signal.removeEventListener("abort", stop);
      resolve();
    }, durationMs);
    signal.addEventListener("abort", stop, { once: true });
    if (signal.aborted) stop();
  });
}
