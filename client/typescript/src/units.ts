/** Protobuf's durations, timestamps and 64-bit numbers as JavaScript's. */
import type { Duration, Timestamp } from "@bufbuild/protobuf/wkt";

/** A duration in milliseconds. */
export function milliseconds(duration: Duration | undefined): number {
  return duration === undefined ? 0 : Number(duration.seconds) * 1000 + duration.nanos / 1e6;
}

/** A duration in milliseconds, or undefined where it was not said. */
export function optionalMilliseconds(duration: Duration | undefined): number | undefined {
  return duration && milliseconds(duration);
}

/** A point in time; undefined where it was not said. */
export function optionalDate(timestamp: Timestamp | undefined): Date | undefined {
  return timestamp && new Date(Number(timestamp.seconds) * 1000 + timestamp.nanos / 1e6);
}

/** A point in time; 1970 where the server did not say. */
export function date(timestamp: Timestamp | undefined): Date {
  return optionalDate(timestamp) ?? new Date(0);
}
