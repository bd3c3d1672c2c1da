/** What calls and clients are told beside what they ask for. */
import type { ChromarpcError } from "./errors.js";
import type { JobState } from "./jobs.js";

/** How one call goes. */
export interface CallControl {
  /** Stops the call, and the job of a `generate`. */
  readonly signal?: AbortSignal | undefined;
  /** Deadline in milliseconds: of a whole generation, or of a single short call. */
  readonly timeoutMs?: number | undefined;
}

/** How a generation goes. */
export interface GenerateControl extends CallControl {
  /**
   * Lets the job outlive a lost connection: the iteration goes on by itself at the next event once the server can be
   * reached again. Leaving the iteration, the signal and the deadline still cancel the job; a process that dies does
   * not. Needs a server with `JobService`.
   */
  readonly reattach?: boolean | undefined;
}

/** How a job is watched. */
export interface WatchControl extends CallControl {
  /** The last sequence that the watcher has; all events when left out. */
  readonly afterSequence?: number | undefined;
  /** Told when the connection is lost, with the tries so far, and with 0 when it is back. */
  readonly onReconnect?: ((attempt: number, error: ChromarpcError | undefined) => void) | undefined;
  /** Goes on trying to reach the server for as long as the signal allows, instead of for about a minute. */
  readonly persistent?: boolean | undefined;
}

/** How a job is drawn again. */
export interface RedrawOptions extends CallControl {
  /** A UUID of the new job, under which the call may be repeated; drawn where left out. */
  readonly requestId?: string | undefined;
}

/** Which jobs to list. */
export interface ListJobsOptions extends CallControl {
  /** All where left out. */
  readonly states?: readonly JobState[] | undefined;
  /** The most that are listed, newest first; 100 when left out. */
  readonly limit?: number | undefined;
}

/** How a client connects. */
export interface ClientOptions {
  /** Sent as `authorization: Bearer …` with every call. A function is asked before each call. */
  readonly token?: string | (() => string | undefined) | undefined;
  /** Deadline of every call that sets none, in milliseconds. */
  readonly timeoutMs?: number | undefined;
  /** Sends the token over plain HTTP to a host that is not this machine. */
  readonly allowInsecureToken?: boolean | undefined;
}
