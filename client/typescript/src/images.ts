/** A finished image: its bytes, and everything that is needed to draw it again. */
import type { JobWarning, Plan, PlannedPrompt, Prepared, TrainerOptions } from "./events.js";
import { REFERENCE } from "./sampling.js";

/** What an image is made of. */
export interface ImageFacts {
  readonly promptIndex: number;
  readonly data: Uint8Array<ArrayBuffer>;
  readonly mediaType: string;
  readonly width: number;
  readonly height: number;
  readonly sha256: string;
  readonly seed: bigint;
  readonly plan: Plan;
  readonly prepared: Prepared | undefined;
}

/** One image as the server encoded it, checked against the SHA-256 it announced. */
export class GeneratedImage implements ImageFacts {
  readonly promptIndex: number;
  /** The encoded file, exactly as sent. */
  readonly data: Uint8Array<ArrayBuffer>;
  /** `image/png`, `image/jpeg` or `image/webp`. */
  readonly mediaType: string;
  /** Pixels. */
  readonly width: number;
  /** Pixels. */
  readonly height: number;
  /** Of `data`, hexadecimal. */
  readonly sha256: string;
  readonly seed: bigint;
  /** The request as it was run. */
  readonly plan: Plan;
  /** What adapters, weights and versions it was run with; undefined where the watcher came later than that. */
  readonly prepared: Prepared | undefined;

  constructor(facts: ImageFacts) {
    this.promptIndex = facts.promptIndex;
    this.data = facts.data;
    this.mediaType = facts.mediaType;
    this.width = facts.width;
    this.height = facts.height;
    this.sha256 = facts.sha256;
    this.seed = facts.seed;
    this.plan = facts.plan;
    this.prepared = facts.prepared;
  }

  /** What was drawn. */
  get prompt(): PlannedPrompt {
    const prompt = this.plan.prompts[this.promptIndex];
    if (prompt === undefined) throw new RangeError(`the plan has no prompt ${this.promptIndex}`);
    return prompt;
  }

  /** Warnings about this image or about the whole request, not those about its other prompts. */
  get warnings(): readonly JobWarning[] {
    const own = `prompts.${this.promptIndex}.`;
    return [...this.plan.warnings, ...(this.prepared?.warnings ?? [])].filter(
      ({ field }) => !field.startsWith("prompts.") || `${field}.`.startsWith(own),
    );
  }

  /** The file's extension, without a dot. */
  get extension(): string {
    return this.mediaType.replace(/^image\//, "");
  }

  /** The bytes as a `Blob`, for `URL.createObjectURL`, uploads and downloads. */
  blob(): Blob {
    return new Blob([this.data], { type: this.mediaType });
  }

  /** The body that draws this one image again: a request of the reference's HTTP API, and of `chromarpc generate --json`. */
  repeatRequest(): RequestJson {
    return repeatRequest(this.plan, this.promptIndex, this.seed);
  }
}

/** A request body; seeds beyond 2^53 are text, as protobuf's JSON mapping allows. */
export interface RequestJson {
  readonly model: string;
  readonly loras: readonly {
    readonly path: string;
    readonly network_multiplier: number;
    readonly expected_sha256?: string;
  }[];
  readonly prompts: readonly {
    readonly prompt: string;
    readonly width: number;
    readonly height: number;
    readonly sample_steps: number;
    readonly guidance_scale: number;
    readonly seed: number | string;
    readonly neg?: string;
    readonly use_neg?: boolean;
    readonly sampler: string;
    readonly schedule: string;
    readonly shift?: number;
  }[];
  readonly output: { readonly format: string; readonly quality?: number; readonly picture_record?: boolean };
  readonly profile: string;
  readonly noise_draw: string;
  readonly trainer?: {
    readonly quantize?: boolean;
    readonly qtype?: string;
    readonly quantize_te?: boolean;
    readonly dtype?: string;
    readonly lokr_form?: string;
  };
  readonly settings?: string;
}

/** The body that draws one image of a plan again. */
export function repeatRequest(plan: Plan, promptIndex: number, seed?: bigint): RequestJson {
  const prompt = plan.prompts[promptIndex];
  if (prompt === undefined) throw new RangeError(`the plan has no prompt ${promptIndex}`);
  const drawn = seed ?? prompt.seed;
  const hasRecord = plan.outputFormat !== "jpeg-trainer";
  const record = plan.pictureRecord ?? hasRecord;
  return {
    model: plan.model,
    loras: plan.loras.map(({ path, networkMultiplier, expectedSha256 }) => ({
      path,
      network_multiplier: networkMultiplier,
      ...(expectedSha256 === undefined ? {} : { expected_sha256: expectedSha256 }),
    })),
    prompts: [
      {
        prompt: prompt.prompt,
        width: prompt.width,
        height: prompt.height,
        sample_steps: prompt.sampleSteps,
        guidance_scale: prompt.guidanceScale,
        seed: drawn <= BigInt(Number.MAX_SAFE_INTEGER) ? Number(drawn) : drawn.toString(),
        ...(prompt.neg ? { neg: prompt.neg, use_neg: true } : {}),
        sampler: prompt.sampler,
        schedule: prompt.schedule,
        ...(prompt.shift === undefined ? {} : { shift: prompt.shift }),
      },
    ],
    output: {
      format: `IMAGE_FORMAT_${plan.outputFormat.toUpperCase().replace("-", "_")}`,
      ...(plan.outputQuality === undefined ? {} : { quality: plan.outputQuality }),
      ...(record === hasRecord ? {} : { picture_record: record }),
    },
    profile: plan.profile,
    noise_draw: `NOISE_DRAW_${plan.noiseDraw.toUpperCase()}`,
    ...(plan.trainer && { trainer: trainerJson(plan.trainer) }),
    ...(plan.settings === REFERENCE ? {} : { settings: plan.settings }),
  };
}

function trainerJson({
  quantize,
  qtype,
  quantizeTe,
  dtype,
  lokrForm,
}: TrainerOptions): NonNullable<RequestJson["trainer"]> {
  return {
    ...(quantize === undefined ? {} : { quantize }),
    ...(qtype === undefined ? {} : { qtype }),
    ...(quantizeTe === undefined ? {} : { quantize_te: quantizeTe }),
    ...(dtype === undefined ? {} : { dtype }),
    ...(lokrForm && { lokr_form: `LOKR_FORM_${lokrForm.toUpperCase()}` }),
  };
}
