/** The picture that is explained, and what it is compared with. Its bytes stay in the browser. */
import { signal } from "@preact/signals";
import { type Plan, type Prepared, repeatRequest } from "chromarpc/web";
import { loras, servedModels, serverInfo } from "../connection.ts";
import { change, chosenModel, defaultProfile, fill, form, showNoError } from "../form.ts";
import type { Run } from "../runs.ts";
import { remove } from "../undo.ts";
import { compareFacts, linesOf } from "./comparison.ts";
import { HEAD_BYTES, kindOf, MAX_FILE_BYTES, NoPicture } from "./files.ts";
import { type OpenedPicture, openPicture } from "./opened.ts";
import { blobOf, comparePixels, isDrawable } from "./pixels.ts";
import { recordedFacts } from "./recorded.ts";
import { settingsOf } from "./settings.ts";

/** A picture, and where the browser shows it from; nowhere where it is too large. */
export interface ShownPicture {
  readonly picture: OpenedPicture;
  readonly url: string | undefined;
}

/** Two pictures beside each other. */
export interface Comparison {
  readonly first: ShownPicture;
  readonly second: ShownPicture;
  /** Fields that differ, or that only one tells; and all. */
  readonly told: readonly string[];
  readonly all: readonly string[];
  /** How far the pixels are apart; undefined while they are measured. */
  readonly pixels: string | undefined;
}

export const explained = signal<ShownPicture | undefined>(undefined);
/** The picture that was explained before. */
export const previous = signal<ShownPicture | undefined>(undefined);
export const comparison = signal<Comparison | undefined>(undefined);
/** Why the last file could not be explained. */
export const failure = signal<string | undefined>(undefined);
/** What came of taking the settings: sentences about what was not taken. */
export const untaken = signal<readonly string[] | undefined>(undefined);
/** How often something was opened: it is brought into sight each time. */
export const openings = signal(0);
let newest = 0;

/** Reads a file and explains it; what is no picture gives one line. Says whether it is one. */
export async function explain(file: File): Promise<boolean> {
  const number = ++newest;
  let said: string | undefined;
  let picture: OpenedPicture | undefined;
  try {
    picture = await opened(file);
  } catch (error) {
    said = error instanceof NoPicture ? error.message : "cannot be read";
  }
  if (number !== newest) return false; // another file came meanwhile
  failure.value = said === undefined ? undefined : `${file.name} ${said}.`;
  if (picture !== undefined) show(picture);
  openings.value += 1;
  return picture !== undefined;
}

/** Brings the picture, or what it is compared with, before the eye. */
export function bringIntoSight(): void {
  openings.value += 1;
}

/** Says why nothing is explained, where a picture would be; one that is shown stays. */
export function refuse(sentence: string): void {
  newest += 1;
  failure.value = sentence;
  openings.value += 1;
}

/** @throws NoPicture it is none. */
async function opened(file: File): Promise<OpenedPicture> {
  // What is no picture is not read to its end.
  if (kindOf(new Uint8Array(await file.slice(0, HEAD_BYTES).arrayBuffer())) === undefined)
    throw new NoPicture("is no PNG, JPEG or WebP");
  if (file.size > MAX_FILE_BYTES) throw new NoPicture(`has more than ${MAX_FILE_BYTES} bytes`);
  return await openPicture(file.name, new Uint8Array(await file.arrayBuffer()));
}

function show(picture: OpenedPicture): void {
  endComparison();
  untaken.value = undefined;
  revoke(previous.value);
  previous.value = explained.value;
  explained.value = shown(picture);
}

function shown(picture: OpenedPicture): ShownPicture {
  return { picture, url: isDrawable(picture.file) ? URL.createObjectURL(blobOf(picture)) : undefined };
}

function revoke(one: ShownPicture | undefined): void {
  if (one?.url !== undefined) URL.revokeObjectURL(one.url);
}

/** Puts the picture away. */
export function close(): void {
  newest += 1;
  endComparison();
  for (const one of [explained, previous]) {
    revoke(one.value);
    one.value = undefined;
  }
  failure.value = undefined;
  untaken.value = undefined;
}

export function endComparison(): void {
  const { second } = comparison.value ?? {};
  comparison.value = undefined;
  if (second !== undefined && second !== explained.value) revoke(second);
}

/** The picture that was explained before, beside the one that is now. */
export function compareWithPrevious(): void {
  if (previous.value !== undefined && explained.value !== undefined) compare(previous.value, explained.value);
}

/** A picture that was drawn for this page, and what the server told of it. */
export interface DrawnHere {
  readonly name: string;
  readonly data: Uint8Array<ArrayBuffer>;
  /** Of the prompt within the plan. */
  readonly index: number;
  readonly plan: Plan | undefined;
  readonly prepared: Prepared | undefined;
}

/** The picture beside one of a run. */
export async function compareWithRun({ jobId, pictures, plan, prepared }: Run, index: number): Promise<void> {
  const image = pictures[index]?.image;
  if (image === undefined) return;
  const name = `run ${jobId.slice(0, 8)}, picture ${index + 1}`;
  await compareWith({ name, data: new Uint8Array(image.data), index, plan, prepared });
}

/** The picture beside one that was drawn here. */
export async function compareWith(drawn: DrawnHere): Promise<void> {
  const first = explained.value;
  if (first === undefined) return;
  const picture = await openPicture(drawn.name, drawn.data);
  if (explained.value !== first) return;
  compare(first, shown(picture.facts.program === "" ? withPlan(picture, drawn) : picture));
}

/** A picture without a record, with what the server told while it drew. */
function withPlan(picture: OpenedPicture, { plan, prepared, index }: DrawnHere): OpenedPicture {
  if (plan === undefined) return picture;
  const record = {
    request: repeatRequest(plan, index),
    served_model: plan.servedModel,
    model_revision: prepared?.modelRevision,
    adapters: prepared?.adapters.map(({ sha256, placement, unmatchedKeyCount }) => ({
      sha256,
      placement,
      unmatched_key_count: unmatchedKeyCount,
    })),
    tokens: prepared?.tokenCounts[index],
    versions: prepared?.versions,
    device: prepared?.device,
    stored_as: prepared?.storedAs,
    guidance_on_two_devices: Boolean(prepared?.secondDevice) && hasGuidance(plan, index),
  };
  return { ...picture, facts: recordedFacts(JSON.stringify(record)) };
}

/** Whether each step made an unconditional pass: above 1, and as ComfyUI below 1 too. */
function hasGuidance({ prompts, settings }: Plan, index: number): boolean {
  const scale = prompts[index]?.guidanceScale ?? 0;
  return scale > 1 || (scale < 1 && settings !== "reference");
}

function compare(first: ShownPicture, second: ShownPicture): void {
  endComparison();
  const differences = compareFacts(first.picture.facts, second.picture.facts);
  const found: Comparison = {
    first,
    second,
    told: linesOf(differences, false),
    all: linesOf(differences, true),
    pixels: undefined,
  };
  comparison.value = found;
  void (async () => {
    const pixels = await comparePixels(first.picture, second.picture);
    if (comparison.value === found) comparison.value = { ...found, pixels };
  })();
}

/** Fills the form with the picture's settings; what stood there can be had back. */
export function takeSettings({ picture }: ShownPicture, withUrls: boolean): void {
  const served = {
    models: servedModels.value.map(({ id }) => id),
    profiles: chosenModel.value?.profiles ?? [],
    profile: form.value.profile || defaultProfile.value,
    adapters: loras.value,
    samplers: serverInfo.value?.samplers ?? [],
    schedules: serverInfo.value?.schedules ?? [],
    settings: serverInfo.value?.settings ?? [],
  };
  const before = form.value;
  const { values, remarks } = settingsOf(picture, served, withUrls);
  showNoError();
  fill(values);
  untaken.value = remarks;
  remove({ notice: "The form has the settings of this picture.", undo: () => change(before) });
}
