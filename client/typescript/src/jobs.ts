/** A job as it is now. */
import { ProtocolError, type StatusError } from "./errors.js";
import type { Plan } from "./events.js";
import * as pb from "./gen/chromarpc/v1/job_service_pb.js";
import { failureOf, planOf } from "./stream.js";
import { date, optionalDate } from "./units.js";

/** How far a job is. */
export type JobState = "queued" | "running" | "succeeded" | "failed" | "cancelled" | "unknown";

const STATES: Readonly<Record<pb.JobState, JobState>> = {
  [pb.JobState.UNSPECIFIED]: "unknown",
  [pb.JobState.QUEUED]: "queued",
  [pb.JobState.RUNNING]: "running",
  [pb.JobState.SUCCEEDED]: "succeeded",
  [pb.JobState.FAILED]: "failed",
  [pb.JobState.CANCELLED]: "cancelled",
};

/** What is known of one of a job's pictures before its bytes are fetched. */
export interface ImageInfo {
  readonly promptIndex: number;
  readonly mediaType: string;
  readonly sizeBytes: number;
  readonly width: number;
  readonly height: number;
  readonly sha256: string;
  readonly seed: bigint;
}

/** A job as it is now. */
export interface Job {
  readonly jobId: string;
  /** As the request gave it; empty where it gave none. */
  readonly requestId: string;
  readonly state: JobState;
  readonly createTime: Date;
  readonly startTime: Date | undefined;
  readonly endTime: Date | undefined;
  /** When it and its pictures will be deleted; undefined while that is not known. */
  readonly expireTime: Date | undefined;
  /** The request as it is run. */
  readonly plan: Plan | undefined;
  /** Of its last event. */
  readonly lastSequence: number;
  /** Place in the queue while it waits, 1 is next; else 0. */
  readonly queuePosition: number;
  /** Of all its images together. */
  readonly doneSteps: number;
  /** Of all its images together. */
  readonly totalSteps: number;
  /** Its pictures so far, in the order of prompts. */
  readonly images: readonly ImageInfo[];
  /** Why it failed, where it did: what watching it throws. */
  readonly failure: StatusError | undefined;
  /** How often it was begun: more than 1 after the server was stopped in the middle. */
  readonly attemptCount: number;
}

/** A job's message as a value. */
export function jobOf(message: pb.Job | undefined): Job {
  if (message === undefined) throw new ProtocolError("the server told no job");
  return {
    jobId: message.jobId,
    requestId: message.requestId,
    state: STATES[message.state] ?? "unknown",
    createTime: date(message.createTime),
    startTime: optionalDate(message.startTime),
    endTime: optionalDate(message.endTime),
    expireTime: optionalDate(message.expireTime),
    plan: message.plan && planOf(message.plan),
    lastSequence: Number(message.lastSequence),
    queuePosition: message.queuePosition,
    doneSteps: message.doneSteps,
    totalSteps: message.totalSteps,
    images: message.images.map(({ promptIndex, mediaType, sizeBytes, width, height, sha256, seed }) => ({
      promptIndex,
      mediaType,
      sizeBytes: Number(sizeBytes),
      width,
      height,
      sha256,
      seed,
    })),
    failure: message.failure && failureOf(message.failure),
    attemptCount: message.attemptCount,
  };
}

/** A state's number on the wire. */
export function stateNumber(state: JobState): pb.JobState {
  const found = Object.entries(STATES).find(([, name]) => name === state);
  return found === undefined ? pb.JobState.UNSPECIFIED : Number(found[0]);
}
