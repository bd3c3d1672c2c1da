/**
 * Plain arguments to a request message; what is left out stays out. Which values are served is the server's to say;
 * here only what cannot be written into the message is refused.
 */
import { create } from "@bufbuild/protobuf";
import { durationFromMs } from "@bufbuild/protobuf/wkt";
import { invalidRequest } from "./errors.js";
import type {
  ImageFormat as ImageFormatName,
  LokrForm as LokrFormName,
  NoiseDraw as NoiseDrawName,
  TrainerOptions,
} from "./events.js";
import { type GenerateRequest, GenerateRequestSchema } from "./gen/chromarpc/v1/generation_service_pb.js";
import { ImageFormat, LokrForm, NoiseDraw, TrainerOptionsSchema } from "./gen/chromarpc/v1/options_pb.js";

/** The model of calls that name none. */
export const DEFAULT_MODEL = "chroma";

const INT32_MAX = 2 ** 31 - 1;
const INT64_MAX = 2n ** 63n - 1n;
const FORMATS: Readonly<Record<ImageFormatName, ImageFormat>> = {
  png: ImageFormat.PNG,
  jpeg: ImageFormat.JPEG,
  webp: ImageFormat.WEBP,
  "jpeg-trainer": ImageFormat.JPEG_TRAINER,
};
const NOISE_DRAWS: Readonly<Record<NoiseDrawName, NoiseDraw>> = {
  float32: NoiseDraw.FLOAT32,
  legacy: NoiseDraw.LEGACY,
};
const LOKR_FORMS: Readonly<Record<LokrFormName, LokrForm>> = {
  factorized: LokrForm.FACTORIZED,
  weight: LokrForm.WEIGHT,
};

/** An adapter, as `loras[].path` of the API takes it: a path below the server's root, `sha256:…`, or a URL. */
export interface Lora {
  readonly path: string;
  /** Strength, -2 to 2; the server's default (1.0) when left out. */
  readonly networkMultiplier?: number | undefined;
  /** What the file must be, hexadecimal; `LoraContentChanged` where it is another. */
  readonly expectedSha256?: string | undefined;
}

/** What may be said for one prompt, or for all of them at once. */
export interface PromptOptions {
  /** Pixels, 64 to 4096, floored to a multiple of 32; 1 to 4096 and 16 in the trainer's profiles. */
  readonly width?: number | undefined;
  /** Pixels, as the width. */
  readonly height?: number | undefined;
  /** Classifier-free guidance, 0 to 20. */
  readonly guidanceScale?: number | undefined;
  /** Denoising steps, 1 to 150. */
  readonly sampleSteps?: number | undefined;
  /** -1 draws one; 42 plus the prompt's index where nobody says. */
  readonly seed?: number | bigint | undefined;
  /** Negative prompt: honoured with `useNeg` and in the trainer's profiles, else answered by a warning. */
  readonly neg?: string | undefined;
  /** Makes `neg` the unconditional text, in every profile. */
  readonly useNeg?: boolean | undefined;
  /** As `serverInfo` lists them; the model's default where nobody says. */
  readonly sampler?: string | undefined;
  /** As `serverInfo` lists them; the model's default where nobody says. */
  readonly schedule?: string | undefined;
  /**
   * Fixed shift of the schedule, 0.01 to 100. When left out, the model's default where `schedule` is
   * left out too, else the schedule's own.
   */
  readonly shift?: number | undefined;
}

/** One image to draw; what it leaves out is taken from the call's options. */
export interface Prompt extends PromptOptions {
  /** `[trigger]` in it is replaced by the trigger word. */
  readonly prompt: string;
  readonly triggerWord?: string | undefined;
}

/** What a generation may be told besides its prompts; everything has a default. */
export interface GenerateOptions extends PromptOptions {
  /** Id of the model, as `listModels` names them; `chroma` when left out. */
  readonly model?: string | undefined;
  /** Adapters, applied in this order; the bare model without. */
  readonly loras?: string | Lora | readonly (string | Lora)[] | undefined;
  /** Replaces `[trigger]` in every prompt that has no trigger word of its own. */
  readonly triggerWord?: string | undefined;
  /** Numerics profile, as `serverInfo` names them. */
  readonly profile?: string | undefined;
  /** Whose way of drawing is followed where programs differ: `reference` (when left out) or `comfyui`. */
  readonly settings?: string | undefined;
  readonly noiseDraw?: NoiseDrawName | undefined;
  /** How images are encoded; PNG when left out. */
  readonly outputFormat?: ImageFormatName | undefined;
  /** Of JPEG and WebP, 1 to 100; 95 when left out. */
  readonly outputQuality?: number | undefined;
  /** Whether each picture carries what it was drawn with; true when left out, but for `jpeg-trainer`. */
  readonly pictureRecord?: boolean | undefined;
  /** What the trainer's config decides; other profiles than the trainer's answer it by a warning. */
  readonly trainer?: TrainerOptions | undefined;
  /** A preview after every so many steps; none when left out. */
  readonly previewEvery?: number | undefined;
  /** Longer side of a preview in pixels, 16 to 512; 256 when left out. */
  readonly previewMaxSidePx?: number | undefined;
  /** Hugging Face token for adapters that need one. */
  readonly hfToken?: string | undefined;
  /** A UUID that makes the call safe to repeat: the same request under it finds the same job. */
  readonly requestId?: string | undefined;
  /** How long the job may wait in the queue, in milliseconds; for ever when left out. */
  readonly maxQueueTimeMs?: number | undefined;
}

/** A prompt, or just its text; or several. */
export type Prompts = string | Prompt | readonly (string | Prompt)[];

/** A ready message; every field is optional in it. */
export type { GenerateRequest };

/**
 * The message of a generation.
 *
 * @throws InvalidRequest a value that the message cannot hold, naming its field.
 */
export function buildRequest(prompts: Prompts, options: GenerateOptions = {}): GenerateRequest {
  const { loras = [], previewEvery, previewMaxSidePx, outputFormat, outputQuality, pictureRecord } = options;
  const request = create(GenerateRequestSchema, {
    model: options.model ?? DEFAULT_MODEL,
    ...given({
      hfToken: options.hfToken,
      triggerWord: options.triggerWord,
      profile: options.profile,
      settings: options.settings,
      requestId: options.requestId,
      maxQueueTime: options.maxQueueTimeMs === undefined ? undefined : durationFromMs(options.maxQueueTimeMs),
      noiseDraw: options.noiseDraw && choice("noise_draw", options.noiseDraw, NOISE_DRAWS),
      trainer: options.trainer && trainerOptions(options.trainer),
    }),
    loras: list(loras).map((item, index) => {
      const lora = typeof item === "string" ? { path: item } : item;
      return {
        path: lora.path,
        ...given({
          networkMultiplier: number(`loras.${index}.network_multiplier`, lora.networkMultiplier),
          expectedSha256: lora.expectedSha256,
        }),
      };
    }),
    prompts: list(prompts).map((item, index) => prompt(item, options, `prompts.${index}`)),
  });
  if (outputFormat !== undefined || outputQuality !== undefined || pictureRecord !== undefined) {
    request.output = {
      $typeName: "chromarpc.v1.OutputOptions",
      format:
        outputFormat === undefined ? ImageFormat.UNSPECIFIED : choice("output.format", outputFormat, FORMATS),
      ...given({ quality: int32("output.quality", outputQuality), pictureRecord }),
    };
  }
  if (previewEvery !== undefined || previewMaxSidePx !== undefined) {
    request.preview = {
      $typeName: "chromarpc.v1.PreviewOptions",
      everyNSteps: int32("preview.every_n_steps", previewEvery) ?? 0,
      ...given({ maxSidePx: int32("preview.max_side_px", previewMaxSidePx) }),
    };
  }
  return request;
}

function trainerOptions({ quantize, qtype, quantizeTe, dtype, lokrForm }: TrainerOptions) {
  return create(
    TrainerOptionsSchema,
    given({
      quantize,
      qtype,
      quantizeTe,
      dtype,
      lokrForm: lokrForm && choice("trainer.lokr_form", lokrForm, LOKR_FORMS),
    }),
  );
}

function prompt(item: string | Prompt, shared: PromptOptions, at: string) {
  const own: Prompt = typeof item === "string" ? { prompt: item } : item;
  return {
    prompt: own.prompt,
    ...given({
      triggerWord: own.triggerWord,
      width: int32(`${at}.width`, own.width ?? shared.width),
      height: int32(`${at}.height`, own.height ?? shared.height),
      guidanceScale: number(`${at}.guidance_scale`, own.guidanceScale ?? shared.guidanceScale),
      sampleSteps: int32(`${at}.sample_steps`, own.sampleSteps ?? shared.sampleSteps),
      seed: int64(`${at}.seed`, own.seed ?? shared.seed),
      neg: own.neg ?? shared.neg,
      useNeg: own.useNeg ?? shared.useNeg,
      sampler: own.sampler ?? shared.sampler,
      schedule: own.schedule ?? shared.schedule,
      shift: number(`${at}.shift`, own.shift ?? shared.shift),
    }),
  };
}

/** The fields that were said. */
function given<T extends object>(fields: T): { [K in keyof T]?: Exclude<T[K], undefined> } {
  return Object.fromEntries(Object.entries(fields).filter(([, value]) => value !== undefined)) as {
    [K in keyof T]?: Exclude<T[K], undefined>;
  };
}

function list<T extends object | string>(items: T | readonly T[]): readonly T[] {
  return Array.isArray(items) ? items : [items as T];
}

function number(at: string, value: number | undefined): number | undefined {
  if (value !== undefined && !Number.isFinite(value))
    throw invalidRequest(at, `must be a finite number, got ${value}`);
  return value;
}

function int32(at: string, value: number | undefined): number | undefined {
  if (value === undefined) return undefined;
  if (!Number.isInteger(value)) throw invalidRequest(at, `must be a whole number, got ${value}`);
  if (Math.abs(value) > INT32_MAX) throw invalidRequest(at, `cannot be sent: ${value} is out of range`);
  return value;
}

function int64(at: string, value: number | bigint | undefined): bigint | undefined {
  if (value === undefined) return undefined;
  if (typeof value === "number" && !Number.isSafeInteger(value)) {
    throw invalidRequest(at, `must be a whole number (a bigint beyond 2^53), got ${value}`);
  }
  const whole = BigInt(value);
  if (whole > INT64_MAX || whole < -INT64_MAX)
    throw invalidRequest(at, `cannot be sent: ${whole} is out of range`);
  return whole;
}

function choice<K extends string, V>(at: string, value: K, choices: Readonly<Record<K, V>>): V {
  if (!Object.hasOwn(choices, value)) {
    throw invalidRequest(at, `must be one of ${Object.keys(choices).join(", ")}, got ${String(value)}`);
  }
  return choices[value];
}
