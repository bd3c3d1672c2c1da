/** Runs: jobs as this page shows them, followed while they are looked at. */
import { effect, signal, untracked } from "@preact/signals";
import {
  AccessDenied,
  Cancelled,
  Code,
  type Completed,
  type GeneratedImage,
  type GenerateRequest,
  type GenerationEvent,
  ImageDamaged,
  type Job,
  JobNotFound,
  type JobState,
  type JobWarning,
  type Loading,
  NotFound,
  type Plan,
  type Prepared,
  type Restarted,
  ServerError,
} from "chromarpc/web";
import { client, isTokenWanted, noteFailure, serverState, token } from "./connection.ts";
import { form, requestOf, showError, showNoError } from "./form.ts";
import { store, stored } from "./storage.ts";
import { remove } from "./undo.ts";

const HIDDEN_POLL_MS = 5000;

/** A picture on its way: the newest preview, then the image. */
export interface Picture {
  readonly step: number;
  readonly totalSteps: number;
  readonly previewUrl: string | undefined;
  readonly previewStep: number;
  readonly image: GeneratedImage | undefined;
  readonly imageUrl: string | undefined;
}

/** A job as this page shows it. */
export interface Run {
  readonly jobId: string;
  readonly state: JobState;
  readonly createTime: Date;
  readonly plan: Plan | undefined;
  readonly queuePosition: number;
  readonly estimatedWaitMs: number | undefined;
  readonly loading: Loading | undefined;
  readonly prepared: Prepared | undefined;
  /** Why it began again, if it did. */
  readonly restarted: Restarted | undefined;
  readonly doneSteps: number;
  readonly totalSteps: number;
  /** When it will probably be done, by this machine's clock in milliseconds. */
  readonly endsAt: number | undefined;
  readonly pictures: readonly Picture[];
  readonly completed: Completed | undefined;
  readonly durationMs: number | undefined;
  readonly error: string | undefined;
  /** Whether the server's copy of a picture is damaged; drawing the job again heals it. */
  readonly isDamaged: boolean;
  /** Whether it was asked to stop and has not yet. */
  readonly isCancelling: boolean;
  /** Tries to reach the server again so far; 0 while the connection stands. */
  readonly reconnects: number;
  /** Whether everything that is to be shown is here. */
  readonly isWhole: boolean;
}

const NO_PICTURE: Picture = {
  step: 0,
  totalSteps: 0,
  previewUrl: undefined,
  previewStep: 0,
  image: undefined,
  imageUrl: undefined,
};

export const runs = signal<ReadonlyMap<string, Run>>(new Map());
export const selectedId = signal<string>(stored(sessionStorage, "selected", ""));
/** The two runs that are compared; empty for none. */
export const comparedIds = signal<readonly string[]>([]);
export const isSubmitting = signal(false);
/** How often something was asked for: the result is brought into sight each time. */
export const submissions = signal(0);
/** When a hidden tab was shown or hidden last: what is followed depends on it. */
const isHidden = signal(document.hidden);

document.addEventListener("visibilitychange", () => {
  isHidden.value = document.hidden;
});
effect(() => store(sessionStorage, "selected", selectedId.value));

/** Whether a job will do nothing any more. */
export function hasEnded(state: JobState): boolean {
  return state === "succeeded" || state === "failed" || state === "cancelled";
}

/** Deleted jobs: an answer that was under way then does not bring them back. */
const forgotten = new Set<string>();

/** Takes a job as the server tells it, keeping what only its events told. */
export function noteJob(job: Job): void {
  const known = runs.value.get(job.jobId);
  const sizes = job.plan?.prompts ?? known?.plan?.prompts ?? [];
  update(job.jobId, {
    state: known !== undefined && hasEnded(known.state) ? known.state : job.state,
    createTime: job.createTime,
    plan: job.plan ?? known?.plan,
    queuePosition: job.queuePosition,
    doneSteps: Math.max(job.doneSteps, known?.doneSteps ?? 0),
    totalSteps: job.totalSteps,
    pictures: sizes.map((_, index) => known?.pictures[index] ?? NO_PICTURE),
    error: known?.error ?? job.failure?.message,
    durationMs: job.endTime && job.endTime.getTime() - job.createTime.getTime(),
  });
}

function update(jobId: string, values: Partial<Run>): void {
  if (forgotten.has(jobId)) return;
  const known = runs.value.get(jobId) ?? {
    jobId,
    state: "queued",
    createTime: new Date(),
    plan: undefined,
    queuePosition: 0,
    estimatedWaitMs: undefined,
    loading: undefined,
    prepared: undefined,
    restarted: undefined,
    doneSteps: 0,
    totalSteps: 0,
    endsAt: undefined,
    pictures: [],
    completed: undefined,
    durationMs: undefined,
    error: undefined,
    isDamaged: false,
    isCancelling: false,
    reconnects: 0,
    isWhole: false,
  };
  runs.value = new Map(runs.value).set(jobId, { ...known, ...values });
}

function updatePicture(jobId: string, index: number, values: Partial<Picture>): void {
  const run = runs.value.get(jobId);
  if (run === undefined) return;
  const old = run.pictures[index] ?? NO_PICTURE;
  if (values.previewUrl !== undefined && old.previewUrl !== undefined) URL.revokeObjectURL(old.previewUrl);
  const pictures = [...run.pictures];
  pictures[index] = { ...old, ...values };
  update(jobId, { pictures });
}

function noteImage(jobId: string, image: GeneratedImage): void {
  const imageUrl =
    runs.value.get(jobId)?.pictures[image.promptIndex]?.imageUrl ?? URL.createObjectURL(image.blob());
  updatePicture(jobId, image.promptIndex, { image, imageUrl });
}

function noteEvent(jobId: string, event: GenerationEvent): void {
  switch (event.type) {
    case "accepted":
      update(jobId, {
        plan: event,
        totalSteps: event.prompts.reduce((sum, { sampleSteps }) => sum + sampleSteps, 0),
      });
      break;
    case "queued":
      update(jobId, { queuePosition: event.position, estimatedWaitMs: event.estimatedWaitMs });
      break;
    case "loading":
      update(jobId, { state: "running", queuePosition: 0, loading: event });
      break;
    case "prepared":
      update(jobId, { state: "running", queuePosition: 0, loading: undefined, prepared: event });
      break;
    case "step": {
      const before = runs.value.get(jobId)?.plan?.prompts.slice(0, event.promptIndex) ?? [];
      update(jobId, {
        state: "running",
        queuePosition: 0,
        loading: undefined,
        doneSteps: before.reduce((sum, { sampleSteps }) => sum + sampleSteps, 0) + event.step,
        endsAt:
          event.estimatedRemainingMs === undefined ? undefined : Date.now() + event.estimatedRemainingMs,
      });
      updatePicture(jobId, event.promptIndex, { step: event.step, totalSteps: event.totalSteps });
      break;
    }
    case "preview": {
      const previewUrl = URL.createObjectURL(new Blob([event.data], { type: event.mediaType }));
      updatePicture(jobId, event.promptIndex, { previewUrl, previewStep: event.step });
      break;
    }
    case "imageReady":
      noteImage(jobId, event.image);
      break;
    case "completed":
      update(jobId, {
        state: "succeeded",
        completed: event,
        durationMs: event.timings.totalMs,
        endsAt: undefined,
      });
      break;
    case "restarted":
      update(jobId, {
        state: "queued",
        loading: undefined,
        prepared: undefined,
        restarted: event,
        doneSteps: 0,
        endsAt: undefined,
      });
      break;
    case "heartbeat":
      break;
  }
}

/** Asks for what the form says, and shows it. */
export async function submit(): Promise<void> {
  if (isSubmitting.value || serverState.value !== "up") return;
  isSubmitting.value = true;
  try {
    const request = requestOf(form.value);
    const job = form.value.outlivesPage ? await createJob(request) : undefined;
    if (job !== undefined) {
      noteJob(job);
      selectedId.value = job.jobId;
    } else {
      const abort = new AbortController();
      await attach(client.generateRequest(request, { signal: abort.signal }), abort);
    }
    comparedIds.value = [];
    showNoError();
    submissions.value += 1;
  } catch (error) {
    noteFailure(error);
    showError(error);
  } finally {
    isSubmitting.value = false;
  }
}

/** A job of its own; undefined where the server has no such thing. */
async function createJob(request: GenerateRequest): Promise<Job | undefined> {
  try {
    return await client.createJobFrom(request);
  } catch (error) {
    if (error instanceof ServerError && error.code === Code.Unimplemented) return undefined;
    throw error;
  }
}

/** Follows a job that ends with this page; returns once it was accepted. */
async function attach(
  events: AsyncGenerator<GenerationEvent, void, undefined>,
  abort: AbortController,
): Promise<void> {
  const first = await events.next();
  if (first.done || first.value.type !== "accepted") return;
  const { jobId } = first.value;
  attached.set(jobId, abort);
  update(jobId, { createTime: first.value.time });
  noteEvent(jobId, first.value);
  selectedId.value = jobId;
  void (async () => {
    try {
      for await (const event of events) noteEvent(jobId, event);
      update(jobId, { isWhole: true });
    } catch (error) {
      noteEnd(jobId, error);
    } finally {
      attached.delete(jobId);
    }
  })();
}

/** Runs that end with this page, and how to end them. */
const attached = new Map<string, AbortController>();

function noteEnd(jobId: string, error: unknown): void {
  noteFailure(error);
  if (error instanceof Cancelled) {
    update(jobId, { state: "cancelled", endsAt: undefined, reconnects: 0, isWhole: true });
  } else if (error instanceof JobNotFound || error instanceof NotFound) {
    const message = "The server does not know this job any more: it was restarted, or the job was deleted.";
    update(jobId, { state: "failed", error: message, endsAt: undefined, reconnects: 0, isWhole: true });
  } else if (!(error instanceof AccessDenied)) {
    const message = error instanceof Error ? error.message : String(error);
    update(jobId, { state: "failed", error: message, endsAt: undefined, reconnects: 0, isWhole: true });
  }
}

/** Asks the server to stop a job. */
export async function cancel(jobId: string): Promise<void> {
  update(jobId, { isCancelling: true });
  const own = attached.get(jobId);
  if (own !== undefined) {
    own.abort();
    return;
  }
  try {
    noteJob(await client.cancelJob(jobId));
  } catch (error) {
    noteFailure(error);
    update(jobId, { error: error instanceof Error ? error.message : String(error), isCancelling: false });
  }
}

/** Has the server draw a job again, whose picture it damaged, and shows that. */
export async function redraw(jobId: string): Promise<void> {
  try {
    const job = await client.redrawJob(jobId);
    // Its own pictures are looked at again when it is: they are whole once the new job is done.
    update(jobId, { isDamaged: false, error: undefined, isWhole: false });
    noteJob(job);
    selectedId.value = job.jobId;
    submissions.value += 1;
  } catch (error) {
    noteFailure(error);
    update(jobId, { error: error instanceof Error ? error.message : String(error) });
  }
}

/** Takes a job and its pictures away: at once from here, and from the server when it cannot be undone any more. */
export function forget(jobId: string): void {
  comparedIds.value = comparedIds.value.filter((id) => id !== jobId);
  selectedId.value = "";
  remove({
    notice: "Run deleted.",
    id: jobId,
    undo() {
      comparedIds.value = [];
      selectedId.value = jobId;
    },
    finish: () => forgetForGood(jobId),
  });
}

async function forgetForGood(jobId: string): Promise<void> {
  try {
    await client.deleteJob(jobId);
  } catch (error) {
    noteFailure(error);
    if (!(error instanceof NotFound)) throw error;
  }
  forgotten.add(jobId);
  const rest = new Map(runs.value);
  for (const { previewUrl, imageUrl } of rest.get(jobId)?.pictures ?? []) {
    if (previewUrl !== undefined) URL.revokeObjectURL(previewUrl);
    if (imageUrl !== undefined) URL.revokeObjectURL(imageUrl);
  }
  rest.delete(jobId);
  runs.value = rest;
}

/** Fetches the pictures of a job that this page has not. */
async function fetchPictures(jobId: string, signal: AbortSignal): Promise<void> {
  const job = await client.getJob(jobId, { signal });
  noteJob(job);
  for (const { promptIndex } of job.images) {
    if (runs.value.get(jobId)?.pictures[promptIndex]?.image !== undefined) continue;
    try {
      noteImage(jobId, await client.getImage(jobId, promptIndex, { signal }));
    } catch (error) {
      if (!(error instanceof ImageDamaged)) throw error;
      const message = `The server's copy of ${job.images.length > 1 ? "a" : "the"} picture is damaged.`;
      update(jobId, { isDamaged: true, error: message });
    }
  }
  if (hasEnded(job.state)) update(jobId, { isWhole: true });
}

/** Follows a job until its end, its pictures included. */
async function follow(jobId: string, signal: AbortSignal): Promise<void> {
  try {
    const run = runs.value.get(jobId);
    if (run === undefined || !hasEnded(run.state)) {
      const onReconnect = (attempt: number): void => {
        update(jobId, { reconnects: attempt });
        if (attempt > 0) serverState.value = "down";
      };
      try {
        for await (const event of client.watchJob(jobId, { signal, onReconnect, persistent: true })) {
          noteEvent(jobId, event);
        }
      } catch (error) {
        if (!(error instanceof ImageDamaged)) throw error; // the job ended, and other pictures may be whole
      }
    }
    await fetchPictures(jobId, signal);
  } catch (error) {
    if (!signal.aborted) noteEnd(jobId, error);
  }
}

/** Asks now and then: a hidden tab holds no stream, because a browser allows six connections for all tabs together. */
async function poll(jobId: string, signal: AbortSignal): Promise<void> {
  while (!signal.aborted) {
    try {
      const job = await client.getJob(jobId, { signal });
      noteJob(job);
      if (hasEnded(job.state)) return;
    } catch (error) {
      if (!signal.aborted && error instanceof NotFound) {
        noteEnd(jobId, error);
        return;
      }
    }
    await new Promise((resolve) => setTimeout(resolve, HIDDEN_POLL_MS));
  }
}

// What is looked at is followed, and nothing else.
effect(() => {
  const looked = new Set(comparedIds.value.length > 0 ? comparedIds.value : [selectedId.value]);
  const hidden = isHidden.value;
  const isLockedOut = isTokenWanted.value;
  void token.value;
  if (isLockedOut) return;
  const abort = new AbortController();
  for (const jobId of looked) {
    const run = runs.peek().get(jobId);
    if (jobId === "" || attached.has(jobId) || run?.isWhole) continue;
    untracked(() => void (hidden ? poll(jobId, abort.signal) : follow(jobId, abort.signal)));
  }
  return () => abort.abort();
});

/** Everything that is to be known about a run and did not stop it. */
export function warningsOf(run: Run): readonly JobWarning[] {
  return [...(run.plan?.warnings ?? []), ...(run.prepared?.warnings ?? [])];
}
