/**
 * What happens to a generation, as typed values: the order they come in, what each one carries.
 *
 * `accepted`, `queued`*, `loading`*, `prepared`, then for each prompt `step`*, `preview`*, `imageReady`, and
 * `completed` last; `heartbeat` whenever nothing else was said for a while. A generation that fails or is cancelled
 * throws instead (see errors.ts), so `completed` is the only last event.
 */
import type { GeneratedImage } from "./images.js";

/** How finished images are encoded; `jpeg-trainer` as ai-toolkit writes its samples. */
export type ImageFormat = "png" | "jpeg" | "webp" | "jpeg-trainer";
/** What a seed means: today's draw, or that of torch up to 2.11 for LoRAs whose previews are older. */
export type NoiseDraw = "float32" | "legacy";
/** How a LoKr is added: beside the product by its factors, or, as before 2026-07-15, to the dequantized weight. */
export type LokrForm = "factorized" | "weight";
/** Where an adapter's change is computed: merged into the weights, or beside them. */
export type AdapterPlacement = "merged" | "beside" | "unknown";
/** What is being done before denoising can start. */
export type LoadingStage = "downloading" | "reading" | "merging" | "quantizing" | "compiling" | "unknown";
/** Where a job's weights came from: they were in memory, were switched in place, or were made anew. */
export type WeightsSource = "resident" | "switched" | "built" | "unknown";

/** Something to know that did not stop the job. */
export interface JobWarning {
  /** Stable name, such as `SIZE_SNAPPED`. */
  readonly code: string;
  /** Dotted path of the field it is about, such as `prompts.0.width`; may be empty. */
  readonly field: string;
  /** A sentence for people. */
  readonly message: string;
}

/** What ai-toolkit's training config decides about its samples; what is left out is the server's default. */
export interface TrainerOptions {
  /** `model.quantize`: whether the transformer is quantized. */
  readonly quantize?: boolean | undefined;
  /** `model.qtype`: the quantizer, such as `qfloat8`. */
  readonly qtype?: string | undefined;
  /** `model.quantize_te`: whether the text encoder is quantized; as `quantize` where nobody says. */
  readonly quantizeTe?: boolean | undefined;
  /** `train.dtype`: `bf16` or `float32`. */
  readonly dtype?: string | undefined;
  readonly lokrForm?: LokrForm | undefined;
}

/** One image to draw, with nothing left open. */
export interface PlannedPrompt {
  /** After `[trigger]` was replaced. */
  readonly prompt: string;
  /** Pixels. */
  readonly width: number;
  /** Pixels. */
  readonly height: number;
  readonly sampleSteps: number;
  readonly guidanceScale: number;
  /** Up to 2^63 - 1. */
  readonly seed: bigint;
  /** Negative prompt, where it is honoured. */
  readonly neg?: string | undefined;
  readonly sampler: string;
  readonly schedule: string;
  /** Fixed shift of the schedule; undefined where the schedule has its own. */
  readonly shift?: number | undefined;
}

/** One adapter, with nothing left open. */
export interface PlannedLora {
  readonly path: string;
  readonly networkMultiplier: number;
  /** What the file must be, hexadecimal, where the request says so. */
  readonly expectedSha256?: string | undefined;
}

/** The request as it is run, every default filled in. */
export interface Plan {
  readonly jobId: string;
  /** Id that was asked for. */
  readonly model: string;
  /** Id that serves it: another one where the server has an alias. */
  readonly servedModel: string;
  /** Numerics profile. */
  readonly profile: string;
  readonly noiseDraw: NoiseDraw;
  readonly prompts: readonly PlannedPrompt[];
  readonly loras: readonly PlannedLora[];
  readonly outputFormat: ImageFormat;
  /** Of JPEG and WebP, 1 to 100; undefined for PNG and the trainer's JPEG. */
  readonly outputQuality: number | undefined;
  /** Whether each picture carries what it was drawn with; undefined where the server does not say. */
  readonly pictureRecord?: boolean | undefined;
  /** What the trainer's config decides, where the profile takes it. */
  readonly trainer?: TrainerOptions | undefined;
  /** Whose way of drawing is followed: `reference` or `comfyui`. */
  readonly settings: string;
  /** Those known so far; more may come with `prepared`. */
  readonly warnings: readonly JobWarning[];
}

/** What an adapter file turned out to be. */
export interface AdapterReport {
  readonly path: string;
  /** Of the file, hexadecimal. */
  readonly sha256: string;
  /** Name of the recognised format. */
  readonly format: string;
  readonly networkMultiplier: number;
  /** Of its low-rank pairs; the largest where they differ; 0 where it has none. */
  readonly rank: number;
  readonly matchedKeyCount: number;
  readonly unmatchedKeyCount: number;
  /** The first 20. */
  readonly unmatchedKeys: readonly string[];
  /** The file's own header (name, trainer, step), shortened. */
  readonly metadata: Readonly<Record<string, string>>;
  readonly placement: AdapterPlacement;
}

/** What it took to have the weights with the job's adapters merged. */
export interface WeightsReport {
  readonly source: WeightsSource;
  /** Of the transformer; 0 where the set was in memory. */
  readonly rewrittenTensorCount: number;
  readonly durationMs: number;
  /** Adapter sets in memory now. */
  readonly residentSetCount: number;
  /** Their size together. */
  readonly residentBytes: number;
}

/** How long each stage of a job took. */
export interface Timings {
  readonly queuedMs: number;
  readonly loadingMs: number;
  readonly textEncodingMs: number;
  readonly denoisingMs: number;
  readonly decodingMs: number;
  readonly imageEncodingMs: number;
  /** From admission to the end. */
  readonly totalMs: number;
}

interface EventBase {
  /** Position in the job's log, from 1; gaps mean that progress was left out for a slow reader. */
  readonly sequence: number;
  /** When it happened, by the server's clock. */
  readonly time: Date;
}

/** The request was understood and admitted: always the first event. */
export interface Accepted extends EventBase, Plan {
  readonly type: "accepted";
}

/** The job waits; again whenever its position changes. */
export interface Queued extends EventBase {
  readonly type: "queued";
  /** 1 is next. */
  readonly position: number;
  /** Undefined while the server has measured nothing. */
  readonly estimatedWaitMs: number | undefined;
}

/** Weights or adapters are being made ready. */
export interface Loading extends EventBase {
  readonly type: "loading";
  readonly stage: LoadingStage;
  /** How much of the stage is done, 0 to 1. */
  readonly fraction: number;
  readonly doneBytes: number;
  readonly totalBytes: number;
}

/** Everything is ready; denoising starts. */
export interface Prepared extends EventBase {
  readonly type: "prepared";
  readonly adapters: readonly AdapterReport[];
  /** Content hash of the model's weights, hexadecimal. */
  readonly modelRevision: string;
  /** One for each prompt: tokens the text encoder sees, and those cut off beyond the model's 512. */
  readonly tokenCounts: readonly { readonly used: number; readonly cut: number }[];
  /** Of everything that the numbers depend on: `torch`, `diffusers`, `transformers`, `chromarpc`. */
  readonly versions: Readonly<Record<string, string>>;
  /** Name of the device that computes: the model of the GPU or CPU. */
  readonly device: string;
  /** Id of the device, as `getServerInfo` lists it; of a pair, the pair's. Empty where an older server does not say. */
  readonly deviceId: string;
  /**
   * Where guidance is computed on two devices: the one that computes the unconditional pass, such as `cuda:1`; else
   * empty.
   */
  readonly secondDevice: string;
  /** How the file of the model's weights stores them, such as `fp8 scaled`; empty from an older server. */
  readonly storedAs: string;
  readonly weights: WeightsReport;
  /** Those that needed files or the tokenizer, such as `PROMPT_TRUNCATED`. */
  readonly warnings: readonly JobWarning[];
}

/** One denoising step is done. */
export interface Step extends EventBase {
  readonly type: "step";
  readonly promptIndex: number;
  /** From 1. */
  readonly step: number;
  /** Of this image. */
  readonly totalSteps: number;
  /** Noise level the step started from. */
  readonly sigma: number;
  /** As the transformer saw it, 0 to 1000. */
  readonly timestep: number;
  readonly durationMs: number;
  /** For the rest of the job, not of this image alone. */
  readonly estimatedRemainingMs: number | undefined;
  /** The whole schedule, `totalSteps` + 1 values, with the first step of an image; empty afterwards. */
  readonly sigmas: readonly number[];
}

/** A small picture of what the model predicts the finished image to be. */
export interface Preview extends EventBase {
  readonly type: "preview";
  readonly promptIndex: number;
  /** The step after which it was taken, from 1. */
  readonly step: number;
  readonly mediaType: string;
  /** Pixels. */
  readonly width: number;
  /** Pixels. */
  readonly height: number;
  /** The encoded picture. */
  readonly data: Uint8Array<ArrayBuffer>;
}

/** An image has arrived whole, its length and SHA-256 as announced. */
export interface ImageReady extends EventBase {
  readonly type: "imageReady";
  readonly promptIndex: number;
  readonly image: GeneratedImage;
}

/** The job is done: the last event. */
export interface Completed extends EventBase {
  readonly type: "completed";
  readonly timings: Timings;
  /** Most device memory in use at once; host memory of the process where the device is a CPU. */
  readonly peakMemoryBytes: number;
  readonly imageCount: number;
}

/** Nothing happened for a while; the job is alive. Repeats the sequence of the event before it. */
export interface Heartbeat extends EventBase {
  readonly type: "heartbeat";
}

/**
 * The server was stopped, or the job's device was lost, and the job runs again: what came before is void, steps count
 * from 1, images come again.
 */
export interface Restarted extends EventBase {
  readonly type: "restarted";
  /** The attempt that is to come, from 1. */
  readonly attempt: number;
  /** Id of the device that was lost or hung; empty where the server itself was restarted. */
  readonly movedFrom: string;
  /** Whether the job goes on on a device of another model, so that images may differ by roundings. */
  readonly bitsMayDiffer: boolean;
}

/** Anything that `generate` yields. */
export type GenerationEvent =
  | Accepted
  | Queued
  | Loading
  | Prepared
  | Step
  | Preview
  | ImageReady
  | Completed
  | Heartbeat
  | Restarted;
