/** Waiting that can be called off. */
import { cancelledHere } from "./errors.js";

/**
 * Does nothing for a while.
 *
 * @throws Cancelled the signal was raised before or meanwhile.
 */
export function waitFor(durationMs: number, signal: AbortSignal | undefined): Promise<void> {
  return new Promise((resolve, reject) => {
    if (signal?.aborted) {
      reject(cancelledHere(signal.reason));
      return;
    }
    const timer = setTimeout(() => {
      signal?.removeEventListener("abort", stop);
      resolve();
    }, durationMs);
    function stop(): void {
      clearTimeout(timer);
      reject(cancelledHere(signal?.reason));
    }
    signal?.addEventListener("abort", stop, { once: true });
  });
}

/** A random UUID, also where a page's address is not secure enough for `crypto.randomUUID`. */
export function randomUuid(): string {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  const hex = Array.from(bytes, (byte, index) => {
    const value = index === 6 ? (byte & 0x0f) | 0x40 : index === 8 ? (byte & 0x3f) | 0x80 : byte;
    return value.toString(16).padStart(2, "0");
  }).join("");
  return [hex.slice(0, 8), hex.slice(8, 12), hex.slice(12, 16), hex.slice(16, 20), hex.slice(20)].join("-");
}
