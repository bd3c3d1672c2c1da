/**
 * What was just taken away. It is gone from sight at once, comes back for whoever asks within some seconds, and only
 * then does the server hear of it; or when the page is closed.
 */
import { signal } from "@preact/signals";
import { whenLeaving } from "./connection.ts";

const UNDO_MS = 10_000;
/** How long the notice stands after its time, so that a late press of Undo meets nothing else. */
const LATE_MS = 1000;

export interface Removal {
  /** What happened, as a sentence. */
  readonly notice: string;
  /** The job or the adapter that is hidden meanwhile. */
  readonly id?: string;
  /** Puts back what the page let go. */
  readonly undo: () => void;
  /** Tells the server, when it cannot be undone any more. */
  readonly finish?: () => Promise<void>;
}

/** What can be undone, the newest last. */
export const removals = signal<readonly Removal[]>([]);
/** The last notice, shortly after its time. */
export const expired = signal<string | undefined>(undefined);
/** Why something could not be removed. */
export const failure = signal<string | undefined>(undefined);
const hidden = signal<ReadonlySet<string>>(new Set());

let timer: ReturnType<typeof setTimeout> | undefined;
let isHeld = false;

/** Whether a job or an adapter was taken away here. */
export function isHidden(id: string): boolean {
  return hidden.value.has(id);
}

/** Takes something away, for the time being. */
export function remove(removal: Removal): void {
  if (removal.id !== undefined) hidden.value = new Set(hidden.value).add(removal.id);
  removals.value = [...removals.value, removal];
  failure.value = undefined;
  restart();
}

/** Brings the newest back. */
export function undo(): void {
  const removal = removals.value.at(-1);
  if (removal === undefined) return;
  removals.value = removals.value.slice(0, -1);
  show(removal.id);
  removal.undo();
  restart();
}

/** Lets something stay that was taken away: it came again by itself. */
export function keep(id: string): void {
  removals.value = removals.value.filter((removal) => removal.id !== id);
  show(id);
}

/** Stops the clock while somebody has a hand on Undo, and starts it anew. */
export function hold(isHand: boolean): void {
  isHeld = isHand;
  restart();
}

function restart(): void {
  clearTimeout(timer);
  if (removals.value.length === 0) isHeld = false;
  else if (!isHeld) timer = setTimeout(finishAll, UNDO_MS);
}

function finishAll(): void {
  clearTimeout(timer);
  const due = removals.value;
  const last = due.at(-1)?.notice;
  removals.value = [];
  isHeld = false;
  expired.value = last;
  setTimeout(() => {
    expired.value = undefined;
  }, LATE_MS);
  for (const removal of due) void finish(removal);
}

async function finish({ id, finish }: Removal): Promise<void> {
  try {
    await finish?.();
  } catch (error) {
    failure.value = error instanceof Error ? error.message : String(error);
  } finally {
    show(id);
  }
}

function show(id: string | undefined): void {
  if (id === undefined || !hidden.value.has(id)) return;
  hidden.value = new Set([...hidden.value].filter((other) => other !== id));
}

whenLeaving(finishAll);
