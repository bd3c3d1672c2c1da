/** The picture that is explained, and what it is compared with. Its bytes stay in the browser. */
import { signal } from "@preact/signals";
import { repeatRequest } from "chromarpc/web";
import { loras, servedModels, serverInfo } from "../connection.ts";
import { change, chosenModel, form, showNoError } from "../form.ts";
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

/** Reads a file and explains it; what is no picture gives one line. */
export async function explain(file: File): Promise<void> {
  const number = ++newest;
  let said: string | undefined;
  let picture: OpenedPicture | undefined;
  try {
    picture = await opened(file);
  } catch (error) {
    said = error instanceof NoPicture ? error.message : "cannot be read";
  }
  if (number !== newest) return; // another file came meanwhile
  failure.value = said === undefined ? undefined : `${file.name} ${said}.`;
  if (picture !== undefined) show(picture);
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

/** The picture beside one of a run. */
export async function compareWithRun(run: Run, index: number): Promise<void> {
  const image = run.pictures[index]?.image;
  const first = explained.value;
  if (image === undefined || first === undefined) return;
  const name = `run ${run.jobId.slice(0, 8)}, picture ${index + 1}`;
  const picture = await openPicture(name, new Uint8Array(image.data));
  if (explained.value !== first) return;
  compare(first, shown(picture.facts.program === "" ? withPlan(picture, run, index) : picture));
}

/** A run's picture without a record, with what the server told of the run. */
function withPlan(picture: OpenedPicture, run: Run, index: number): OpenedPicture {
  const { plan, prepared } = run;
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
  };
  return { ...picture, facts: recordedFacts(JSON.stringify(record)) };
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
    profile: form.value.profile || (serverInfo.value?.defaultProfile ?? ""),
    adapters: loras.value,
  };
  const before = form.value;
  const { values, remarks } = settingsOf(picture, served, withUrls);
  showNoError();
  change(values);
  untaken.value = remarks;
  remove({ notice: "The form has the settings of this picture.", undo: () => change(before) });
}
