/** What is asked for: the form's values, their way into a request, and the errors of each field. */
import { computed, effect, signal } from "@preact/signals";
import {
  buildRequest,
  type GenerateOptions,
  type GenerateRequest,
  type ImageFormat,
  InvalidRequest,
  type LokrForm,
  type Plan,
  type Prompt,
  StatusError,
  type TrainerOptions,
} from "chromarpc/web";
import { models, servedModels, serverInfo } from "./connection.ts";
import { store, stored } from "./storage.ts";
import { remove } from "./undo.ts";

/** An adapter in the form. */
export interface LoraChoice {
  readonly path: string;
  readonly multiplier: number;
  /** What the file must be, where it was taken over from a run that said so. */
  readonly expectedSha256?: string | undefined;
}

/** The form; numbers are as they were typed, so that a wrong one can be shown with its error. */
export interface FormValues {
  readonly model: string;
  readonly prompts: readonly string[];
  readonly triggerWord: string;
  readonly width: string;
  readonly height: string;
  readonly steps: string;
  readonly guidance: string;
  readonly seed: string;
  readonly isSeedRandom: boolean;
  readonly loras: readonly LoraChoice[];
  readonly profile: string;
  readonly format: ImageFormat;
  /** Whether the job goes on when this page is closed. */
  readonly outlivesPage: boolean;
  /** Empty is the model's default, or the settings'. */
  readonly sampler: string;
  readonly schedule: string;
  readonly shift: string;
  /** Whose way of drawing is followed; empty is the reference's. */
  readonly settings: string;
  readonly neg: string;
  /** Whether the negative text counts in profiles that do not honour it anyway. */
  readonly usesNeg: boolean;
  /** From here on, what only profiles that draw as the trainer does take; empty is the trainer's default. */
  readonly isQuantized: boolean;
  readonly qtype: string;
  readonly textQuantized: "" | "yes" | "no";
  readonly dtype: string;
  readonly lokrForm: "" | LokrForm;
}

const EMPTY: FormValues = {
  model: "",
  prompts: [""],
  triggerWord: "",
  width: "",
  height: "",
  steps: "",
  guidance: "",
  seed: "42",
  isSeedRandom: true,
  loras: [],
  profile: "",
  format: "png",
  outlivesPage: true,
  sampler: "",
  schedule: "",
  shift: "",
  settings: "",
  neg: "",
  usesNeg: false,
  isQuantized: true,
  qtype: "",
  textQuantized: "",
  dtype: "",
  lokrForm: "",
};

export const form = signal<FormValues>(stored(localStorage, "form", EMPTY));
/** Sentences by the field's dotted path, as the server names it; `""` is about no field. */
export const fieldErrors = signal<ReadonlyMap<string, string>>(new Map());

/** The model that will draw: the chosen one, or the first that can. */
export const chosenModel = computed(() => {
  const wanted = models.value.find((model) => model.id === form.value.model);
  return wanted?.weightsPresent ? wanted : servedModels.value[0];
});

/** The profile of requests that name none: the model's, or the server's. */
export const defaultProfile = computed(
  () => chosenModel.value?.defaults?.profile || serverInfo.value?.defaultProfile || "",
);

/** What the chosen profile makes of a request. */
export const chosenProfile = computed(() => {
  const wanted = form.value.profile || defaultProfile.value;
  return chosenModel.value?.profiles.find(({ id }) => id === wanted);
});

/** Whether the form asks for another way of sampling than the model's. */
export const isSampledOtherwise = computed(() => {
  const { sampler, schedule, shift, settings, usesNeg } = form.value;
  return sampler !== "" || schedule !== "" || shift !== "" || settings !== "" || usesNeg;
});

effect(() => store(localStorage, "form", form.value));

/** Changes some values; the errors of what changed go away. */
export function change(values: Partial<FormValues>): void {
  form.value = { ...form.value, ...values };
  const changed = new Set(Object.keys(values).flatMap((name) => WIRE_NAMES[name] ?? []));
  if (changed.size === 0 || fieldErrors.value.size === 0) return;
  fieldErrors.value = new Map(
    [...fieldErrors.value].filter(([field]) => !changed.has(field.split(".").at(-1) ?? "") && field !== ""),
  );
}

const WIRE_NAMES: Readonly<Record<string, readonly string[]>> = {
  model: ["model"],
  prompts: ["prompt", "prompts"],
  triggerWord: ["trigger_word"],
  width: ["width"],
  height: ["height"],
  steps: ["sample_steps"],
  guidance: ["guidance_scale"],
  seed: ["seed"],
  isSeedRandom: ["seed"],
  loras: ["path", "network_multiplier", "loras"],
  profile: ["profile"],
  format: ["format", "quality"],
  sampler: ["sampler"],
  schedule: ["schedule"],
  shift: ["shift"],
  settings: ["settings"],
  neg: ["neg"],
  usesNeg: ["use_neg"],
  qtype: ["qtype"],
  dtype: ["dtype"],
};

/** The error of a field that all prompts share, whichever prompt the server named. */
export function sharedError(name: string): string | undefined {
  for (const [field, message] of fieldErrors.value) {
    if (field === name || (field.startsWith("prompts.") && field.endsWith(`.${name}`))) return message;
  }
  return undefined;
}

/** Errors that no field of the form shows. */
export const otherErrors = computed(() =>
  [...fieldErrors.value].filter(
    ([field]) =>
      !Object.values(WIRE_NAMES)
        .flat()
        .includes(field.split(".").at(-1) ?? ""),
  ),
);

/** Shows an error where it belongs. */
export function showError(error: unknown): void {
  const violations = error instanceof StatusError ? error.violations : [];
  fieldErrors.value =
    violations.length > 0
      ? new Map(violations.map(({ field, description }) => [field, description]))
      : new Map([["", error instanceof Error ? error.message : String(error)]]);
}

/** Takes every error away. */
export function showNoError(): void {
  fieldErrors.value = new Map();
}

/**
 * The request that the form asks for.
 *
 * @throws InvalidRequest a field holds no number.
 */
export function requestOf(values: FormValues): GenerateRequest {
  const options: GenerateOptions = {
    model: chosenModel.value?.id ?? values.model,
    loras: values.loras.map(({ path, multiplier, expectedSha256 }) => ({
      path,
      networkMultiplier: multiplier,
      expectedSha256,
    })),
    triggerWord: values.triggerWord || undefined,
    profile: values.profile || undefined,
    outputFormat: values.format,
    width: number("prompts.0.width", values.width),
    height: number("prompts.0.height", values.height),
    sampleSteps: number("prompts.0.sample_steps", values.steps),
    guidanceScale: number("prompts.0.guidance_scale", values.guidance),
    previewEvery: 1,
    previewMaxSidePx: 512,
    ...samplingOf(values),
    trainer: chosenProfile.value?.takesTrainerOptions ? trainerOf(values) : undefined,
  };
  const seed = values.isSeedRandom ? -1n : wholeNumber("prompts.0.seed", values.seed);
  const prompts: Prompt[] = values.prompts.map((prompt, index) => ({
    prompt,
    seed: seed === undefined || seed < 0n ? seed : seed + BigInt(index),
  }));
  return buildRequest(prompts, options);
}

/** How to sample; of that, profiles that draw as the trainer does take the negative text alone. */
function samplingOf(values: FormValues): GenerateOptions {
  const profile = chosenProfile.value;
  if (profile?.honoursNeg) return { neg: values.neg || undefined };
  // An older server has one way, and takes no negative text here.
  if (profile?.takesTrainerOptions || !serverInfo.value?.samplers.length) return {};
  return {
    sampler: values.sampler || undefined,
    schedule: values.schedule || undefined,
    shift: number("prompts.0.shift", values.shift),
    settings: values.settings || undefined,
    ...(values.usesNeg && values.neg ? { neg: values.neg, useNeg: true } : {}),
  };
}

function trainerOf(values: FormValues): TrainerOptions {
  return {
    quantize: values.isQuantized,
    qtype: values.qtype.trim() || undefined,
    quantizeTe: values.textQuantized === "" ? undefined : values.textQuantized === "yes",
    dtype: values.dtype || undefined,
    lokrForm: values.lokrForm || undefined,
  };
}

/** Changes values; what is sampled as its model usually is stays the model's business. */
export function fill(values: Partial<FormValues>): void {
  const defaults = models.value.find(({ id }) => id === (values.model ?? chosenModel.value?.id))?.defaults;
  const isUsual =
    values.settings === "" &&
    values.sampler === defaults?.sampler &&
    values.schedule === defaults?.schedule &&
    values.shift === String(defaults?.shift ?? "");
  change(isUsual ? { ...values, sampler: "", schedule: "", shift: "" } : values);
}

/** Fills the form with what a run was made of, seed included; what stood there can be had back. */
export function reuse(plan: Plan): void {
  const [first] = plan.prompts;
  if (first === undefined) return;
  const before = form.value;
  showNoError();
  fill({
    model: plan.model,
    prompts: plan.prompts.map(({ prompt }) => prompt),
    triggerWord: "",
    width: String(first.width),
    height: String(first.height),
    steps: String(first.sampleSteps),
    guidance: String(first.guidanceScale),
    seed: String(first.seed),
    isSeedRandom: false,
    loras: plan.loras.map(({ path, networkMultiplier, expectedSha256 }) => ({
      path,
      multiplier: networkMultiplier,
      expectedSha256,
    })),
    profile: plan.profile,
    format: plan.outputFormat,
    sampler: first.sampler,
    schedule: first.schedule,
    shift: first.shift === undefined ? "" : String(first.shift),
    settings: plan.settings === "reference" ? "" : plan.settings,
    neg: first.neg ?? "",
    usesNeg: Boolean(first.neg),
    isQuantized: plan.trainer?.quantize ?? true,
    qtype: plan.trainer?.qtype ?? "",
    textQuantized: plan.trainer?.quantizeTe === undefined ? "" : plan.trainer.quantizeTe ? "yes" : "no",
    dtype: plan.trainer?.dtype ?? "",
    lokrForm: plan.trainer?.lokrForm ?? "",
  });
  remove({ notice: "The form has the settings of this run.", undo: () => change(before) });
}

/** Takes a prompt out of the form; one with text can be had back. */
export function removePrompt(index: number): void {
  const { prompts } = form.value;
  const prompt = prompts[index] ?? "";
  change({ prompts: prompts.filter((_, other) => other !== index) });
  if (prompt.trim() === "") return;
  remove({
    notice: "Prompt removed.",
    undo() {
      const now = form.value.prompts;
      change({ prompts: [...now.slice(0, index), prompt, ...now.slice(index)] });
    },
  });
}

function number(field: string, text: string): number | undefined {
  if (text.trim() === "") return undefined;
  const value = Number(text);
  if (!Number.isFinite(value)) throw notANumber(field, text);
  return value;
}

function wholeNumber(field: string, text: string): bigint | undefined {
  if (text.trim() === "") return undefined;
  if (!/^\s*-?\d+\s*$/.test(text)) throw notANumber(field, text);
  return BigInt(text);
}

function notANumber(field: string, text: string): InvalidRequest {
  const description = `must be a number, got “${text}”`;
  return new InvalidRequest(description, {
    code: 3,
    reason: "INVALID_PARAMETER",
    violations: [{ field, description }],
  });
}
