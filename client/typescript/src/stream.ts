/**
 * A job's messages to typed events, and the proof that the stream kept its contract.
 *
 * Knows no call and no channel. Its state outlives a connection: after a lost one, the messages that follow
 * `sequence` are read on as if nothing had happened.
 */

import { Code } from "@connectrpc/connect";
import { sha256 } from "@noble/hashes/sha2.js";
import { bytesToHex } from "@noble/hashes/utils.js";
import { Cancelled, ProtocolError, type StatusError, statusCode, statusError } from "./errors.js";
import type {
  AdapterPlacement,
  Completed,
  GenerationEvent,
  ImageFormat,
  ImageReady,
  JobWarning,
  LoadingStage,
  LokrForm,
  Plan,
  PlannedPrompt,
  Prepared,
  TrainerOptions,
  WeightsSource,
} from "./events.js";
import * as pb from "./gen/chromarpc/v1/job_event_pb.js";
import * as options from "./gen/chromarpc/v1/options_pb.js";
import { GeneratedImage } from "./images.js";
import { FLOWMATCH, REFERENCE } from "./sampling.js";
import { date, milliseconds, optionalMilliseconds } from "./units.js";

/** A 4096×4096 PNG of noise is about 50 MB; a server that announces more than this is not believed. */
export const MAX_IMAGE_BYTES = 512 * 2 ** 20;

const STAGES: Readonly<Record<pb.LoadingStage, LoadingStage>> = {
  [pb.LoadingStage.UNSPECIFIED]: "unknown",
  [pb.LoadingStage.DOWNLOADING]: "downloading",
  [pb.LoadingStage.READING]: "reading",
  [pb.LoadingStage.MERGING]: "merging",
  [pb.LoadingStage.QUANTIZING]: "quantizing",
  [pb.LoadingStage.COMPILING]: "compiling",
};
const WEIGHTS_SOURCES: Readonly<Record<pb.WeightsSource, WeightsSource>> = {
  [pb.WeightsSource.UNSPECIFIED]: "unknown",
  [pb.WeightsSource.RESIDENT]: "resident",
  [pb.WeightsSource.SWITCHED]: "switched",
  [pb.WeightsSource.BUILT]: "built",
};
const PLACEMENTS: Readonly<Record<pb.AdapterPlacement, AdapterPlacement>> = {
  [pb.AdapterPlacement.UNSPECIFIED]: "unknown",
  [pb.AdapterPlacement.MERGED]: "merged",
  [pb.AdapterPlacement.BESIDE]: "beside",
};
const LOKR_FORMS: Readonly<Record<options.LokrForm, LokrForm | undefined>> = {
  [options.LokrForm.UNSPECIFIED]: undefined,
  [options.LokrForm.FACTORIZED]: "factorized",
  [options.LokrForm.WEIGHT]: "weight",
};

interface OpenImage {
  readonly header: pb.ImageHeader;
  readonly data: Uint8Array<ArrayBuffer>;
  have: number;
}

/** Puts an image together from its header and its parts. */
export class ImageAssembler {
  #open: OpenImage | undefined;

  /** Begins an image. */
  begin(header: pb.ImageHeader): void {
    this.assertNoneOpen("another image began");
    const size = Number(header.sizeBytes);
    if (size <= 0 || size > MAX_IMAGE_BYTES)
      throw new ProtocolError(`an image of ${size} bytes was announced`);
    this.#open = { header, data: new Uint8Array(size), have: 0 };
  }

  /** Forgets an image whose rest will not come. */
  reset(): void {
    this.#open = undefined;
  }

  /** Whether a header came whose parts did not. */
  get isOpen(): boolean {
    return this.#open !== undefined;
  }

  /** Bytes of the open image that are here. */
  get have(): number {
    return this.#open?.have ?? 0;
  }

  /** Takes a part; the image once it is whole and its hash is right. */
  add(chunk: pb.ImageChunk): { header: pb.ImageHeader; data: Uint8Array<ArrayBuffer> } | undefined {
    const open = this.#open;
    if (open === undefined || chunk.promptIndex !== open.header.promptIndex) {
      throw new ProtocolError(`a part of image ${chunk.promptIndex} came without its header`);
    }
    if (Number(chunk.offsetBytes) !== open.have) {
      throw new ProtocolError(`a part of an image starts at byte ${chunk.offsetBytes}, not at ${open.have}`);
    }
    if (chunk.data.length === 0 || open.have + chunk.data.length > open.data.length) {
      throw new ProtocolError(`parts of an image do not add up to its ${open.data.length} bytes`);
    }
    open.data.set(chunk.data, open.have);
    open.have += chunk.data.length;
    if (open.have < open.data.length) return undefined;
    const digest = bytesToHex(sha256(open.data));
    if (digest !== open.header.sha256.toLowerCase()) {
      throw new ProtocolError(
        `image ${open.header.promptIndex} has SHA-256 ${digest}, not ${open.header.sha256}`,
      );
    }
    this.#open = undefined;
    return { header: open.header, data: open.data };
  }

  /** Refuses what may not happen in the middle of an image. */
  assertNoneOpen(happened: string): void {
    if (this.#open === undefined) return;
    const { have, data, header } = this.#open;
    throw new ProtocolError(
      `${happened} after ${have} of ${data.length} bytes of image ${header.promptIndex}`,
    );
  }
}

/** Reads one job's messages in order: `read` each, then `finish` once the stream has ended. */
export class StreamReader {
  /** The error that a `failed` or `cancelled` event told of; a call's own status may follow it. */
  ending: StatusError | undefined;
  /** The request as it is run, once it is known. */
  plan: Plan | undefined;
  /** Position of the last event. */
  sequence: number;
  /** Whether the job is done. */
  isCompleted = false;
  readonly #isPartial: boolean;
  readonly #images = new ImageAssembler();
  #prepared: Prepared | undefined;
  #imagesRead = 0;

  /**
   * @param afterSequence where reading begins; 0 for all of it.
   * @param plan the job's plan, where reading does not begin with `accepted`.
   */
  constructor(afterSequence = 0, plan?: Plan) {
    this.sequence = afterSequence;
    this.plan = plan;
    this.#isPartial = afterSequence > 0;
  }

  /**
   * The event of a message; undefined for a part of an image, or for news this client does not know.
   *
   * @throws ProtocolError the message cannot be true, or cannot come here.
   */
  read(message: pb.JobEvent | undefined): GenerationEvent | undefined {
    if (message === undefined) throw new ProtocolError("a message holds no event");
    const base = { sequence: Number(message.sequence), time: date(message.time) };
    const { event } = message;
    this.#checkOrder(base.sequence, event.case);
    switch (event.case) {
      case "accepted":
        this.plan = planOf(event.value);
        return { type: "accepted", ...base, ...this.plan };
      case "queued":
        return {
          type: "queued",
          ...base,
          position: event.value.position,
          estimatedWaitMs: optionalMilliseconds(event.value.estimatedWait),
        };
      case "loading":
        return {
          type: "loading",
          ...base,
          stage: STAGES[event.value.stage] ?? "unknown",
          fraction: event.value.fraction,
          doneBytes: Number(event.value.doneBytes),
          totalBytes: Number(event.value.totalBytes),
        };
      case "prepared":
        this.#prepared = { type: "prepared", ...base, ...preparedOf(event.value) };
        return this.#prepared;
      case "step":
        return {
          type: "step",
          ...base,
          promptIndex: event.value.promptIndex,
          step: event.value.step,
          totalSteps: event.value.totalSteps,
          sigma: event.value.sigma,
          timestep: event.value.timestep,
          durationMs: milliseconds(event.value.duration),
          estimatedRemainingMs: optionalMilliseconds(event.value.estimatedRemaining),
          sigmas: event.value.sigmas,
        };
      case "preview":
        return {
          type: "preview",
          ...base,
          promptIndex: event.value.promptIndex,
          step: event.value.step,
          mediaType: event.value.mediaType,
          width: event.value.width,
          height: event.value.height,
          data: new Uint8Array(event.value.data),
        };
      case "imageHeader":
        this.#promptOf(event.value.promptIndex);
        this.#images.begin(event.value);
        return undefined;
      case "imageChunk":
        return this.#addChunk(base, event.value);
      case "completed":
        return this.#complete(base, event.value);
      case "failed":
        this.ending = failureOf(event.value);
        return undefined;
      case "cancelled":
        this.ending = new Cancelled(event.value.message || "the server cancelled the job", {
          code: Code.Canceled,
          reason: "CANCELLED",
        });
        return undefined;
      case "heartbeat":
        return { type: "heartbeat", ...base };
      case "restarted":
        this.#prepared = undefined;
        this.#imagesRead = 0;
        this.#images.reset();
        return {
          type: "restarted",
          ...base,
          attempt: event.value.attempt,
          movedFrom: event.value.movedFrom,
          bitsMayDiffer: event.value.bitsMayDiffer,
        };
      case undefined:
        return undefined;
    }
  }

  /**
   * The stream ended without an error status.
   *
   * @throws StatusError its last event told of one.
   * @throws ProtocolError it had no last event.
   */
  finish(): void {
    if (this.ending !== undefined) throw this.ending;
    if (!this.isCompleted) throw new ProtocolError("the stream ended before the job did");
  }

  #checkOrder(sequence: number, kind: string | undefined): void {
    if (this.isCompleted || this.ending !== undefined) {
      throw new ProtocolError(`an event (${kind}) came after the last one`);
    }
    if (kind === "heartbeat") {
      if (sequence < this.sequence) {
        throw new ProtocolError(`a heartbeat says ${sequence} after event ${this.sequence}`);
      }
      return;
    }
    if (sequence <= this.sequence) {
      throw new ProtocolError(`event ${sequence} (${kind}) came after event ${this.sequence}`);
    }
    this.sequence = sequence;
    const isFirst = this.plan === undefined;
    if (isFirst !== (kind === "accepted") && !(isFirst && (kind === "failed" || kind === "cancelled"))) {
      throw new ProtocolError(isFirst ? `the first event is ${kind}` : "the job was accepted twice");
    }
  }

  #promptOf(index: number): Plan {
    if (this.plan === undefined || this.plan.prompts[index] === undefined) {
      throw new ProtocolError(`an image for prompt ${index}, which was not asked for`);
    }
    return this.plan;
  }

  #addChunk(base: { sequence: number; time: Date }, chunk: pb.ImageChunk): ImageReady | undefined {
    // Who begins to watch in the middle of an image missed its header; `getImage` has it whole.
    if (this.#isPartial && !this.#images.isOpen) return undefined;
    const whole = this.#images.add(chunk);
    if (whole === undefined) return undefined;
    this.#imagesRead += 1;
    const plan = this.#promptOf(whole.header.promptIndex);
    const image = imageOf(whole.header, whole.data, plan, this.#prepared);
    return { type: "imageReady", ...base, promptIndex: image.promptIndex, image };
  }

  #complete(base: { sequence: number; time: Date }, message: pb.Completed): Completed {
    this.#images.assertNoneOpen("the job completed");
    if (!this.#isPartial && message.imageCount !== this.#imagesRead) {
      throw new ProtocolError(`${message.imageCount} images were sent, ${this.#imagesRead} arrived`);
    }
    this.isCompleted = true;
    const { timings } = message;
    return {
      type: "completed",
      ...base,
      timings: {
        queuedMs: milliseconds(timings?.queued),
        loadingMs: milliseconds(timings?.loading),
        textEncodingMs: milliseconds(timings?.textEncoding),
        denoisingMs: milliseconds(timings?.denoising),
        decodingMs: milliseconds(timings?.decoding),
        imageEncodingMs: milliseconds(timings?.imageEncoding),
        totalMs: milliseconds(timings?.total),
      },
      peakMemoryBytes: Number(message.peakMemoryBytes),
      imageCount: message.imageCount,
    };
  }
}

/** A header and its bytes as an image. */
export function imageOf(
  header: pb.ImageHeader,
  data: Uint8Array<ArrayBuffer>,
  plan: Plan,
  prepared?: Prepared,
): GeneratedImage {
  const { promptIndex, mediaType, width, height, sha256: digest, seed } = header;
  return new GeneratedImage({
    promptIndex,
    data,
    mediaType,
    width,
    height,
    sha256: digest.toLowerCase(),
    seed,
    plan,
    prepared,
  });
}

/** A plan as the server told it. */
export function planOf(message: pb.Accepted): Plan {
  return {
    jobId: message.jobId,
    model: message.model,
    servedModel: message.servedModel,
    profile: message.profile,
    noiseDraw: message.noiseDraw === options.NoiseDraw.LEGACY ? "legacy" : "float32",
    prompts: message.prompts.map(plannedOf),
    loras: message.loras.map(({ path, networkMultiplier, expectedSha256 }) => ({
      path,
      networkMultiplier,
      expectedSha256,
    })),
    outputFormat: formatOf(message.output?.format),
    outputQuality: message.output?.quality,
    pictureRecord: message.output?.pictureRecord,
    trainer: message.trainer && trainerOf(message.trainer),
    settings: message.settings || REFERENCE,
    warnings: warningsOf(message.warnings),
  };
}

function plannedOf(message: pb.PlannedPrompt): PlannedPrompt {
  const { prompt, width, height, sampleSteps, guidanceScale, seed, neg, sampler, schedule, shift } = message;
  return {
    ...{ prompt, width, height, sampleSteps, guidanceScale, seed, neg, shift },
    sampler: sampler || FLOWMATCH,
    schedule: schedule || FLOWMATCH,
  };
}

function trainerOf({ quantize, qtype, quantizeTe, dtype, lokrForm }: options.TrainerOptions): TrainerOptions {
  return { quantize, qtype, quantizeTe, dtype, lokrForm: LOKR_FORMS[lokrForm ?? 0] };
}

/** Warnings as the server told them. */
export function warningsOf(messages: readonly pb.Warning[]): JobWarning[] {
  return messages.map(({ code, field, message }) => ({ code, field, message }));
}

/** Why a job failed, as the error that says so. */
export function failureOf(message: pb.Failed): StatusError {
  const code = statusCode(message.code);
  return statusError(message.message || `the job failed with ${Code[code]}`, {
    code,
    reason: message.reason,
    violations: message.violations.map(({ field, description }) => ({ field, description })),
    metadata: { ...message.metadata },
    retryAfterMs: optionalMilliseconds(message.retryAfter),
  });
}

function formatOf(format: options.ImageFormat | undefined): ImageFormat {
  switch (format) {
    case options.ImageFormat.JPEG:
      return "jpeg";
    case options.ImageFormat.WEBP:
      return "webp";
    case options.ImageFormat.JPEG_TRAINER:
      return "jpeg-trainer";
    default:
      return "png";
  }
}

function preparedOf(message: pb.Prepared): Omit<Prepared, "type" | "sequence" | "time"> {
  const { weights } = message;
  return {
    adapters: message.adapters.map((adapter) => ({
      path: adapter.path,
      sha256: adapter.sha256,
      format: adapter.format,
      networkMultiplier: adapter.networkMultiplier,
      rank: adapter.rank,
      matchedKeyCount: adapter.matchedKeyCount,
      unmatchedKeyCount: adapter.unmatchedKeyCount,
      unmatchedKeys: adapter.unmatchedKeys,
      metadata: { ...adapter.metadata },
      placement: PLACEMENTS[adapter.placement] ?? "unknown",
    })),
    modelRevision: message.modelRevision,
    tokenCounts: message.tokenCounts.map(({ used, cut }) => ({ used, cut })),
    versions: { ...message.versions },
    device: message.device,
    deviceId: message.deviceId,
    secondDevice: message.secondDevice,
    storedAs: message.storedAs,
    weights: {
      source: WEIGHTS_SOURCES[weights?.source ?? 0] ?? "unknown",
      rewrittenTensorCount: weights?.rewrittenTensorCount ?? 0,
      durationMs: milliseconds(weights?.duration),
      residentSetCount: weights?.residentSetCount ?? 0,
      residentBytes: Number(weights?.residentBytes ?? 0n),
    },
    warnings: warningsOf(message.warnings),
  };
}
