/** An upload: the file's hash, then its bytes part by part, resumed where a lost connection left it. */

import type { CallOptions, Client as ConnectClient } from "@connectrpc/connect";
import { sha256 } from "@noble/hashes/sha2.js";
import { bytesToHex } from "@noble/hashes/utils.js";
import {
  cancelledHere,
  DeadlineExceeded,
  fromThrown,
  ProtocolError,
  QuotaExceeded,
  ServerUnavailable,
  UploadOutOfOrder,
} from "./errors.js";
import type { LoraService, StoredLora } from "./gen/chromarpc/v1/lora_service_pb.js";
import { waitFor } from "./waiting.js";

const CHUNK_BYTES = 2 ** 20;
const CALL_TIMEOUT_MS = 60_000;
/** The server brings the whole file to its disk before it answers. */
const FINAL_TIMEOUT_MS = 600_000;
/** The quota that waiting helps against; others stay used up. */
const CALLS_QUOTA = "max_calls_per_minute";
/** Waits before the tries that follow a failure; a step forward starts over. */
const RETRY_DELAYS_MS = [500, 1000, 2000, 4000, 8000];

/** How an upload goes. */
export interface UploadOptions {
  /** What the server shall call it; a `File`'s own name when left out. */
  readonly filename?: string | undefined;
  /** Called with the bytes that the server has, and the bytes of the file. */
  readonly onProgress?: ((sentBytes: number, totalBytes: number) => void) | undefined;
  readonly signal?: AbortSignal | undefined;
}

/** Uploads an adapter file, unless its bytes were uploaded before. */
export async function upload(
  service: ConnectClient<typeof LoraService>,
  file: Blob,
  options: UploadOptions,
  target: string,
): Promise<StoredLora> {
  const { signal, onProgress } = options;
  const filename = options.filename ?? (file instanceof File ? file.name : "adapter.safetensors");
  const digest = await hash(file, signal);

  /** Repeats a call that may be repeated while the server cannot be reached, or takes no more calls a minute. */
  async function insist<T>(timeoutMs: number, call: (options: CallOptions) => Promise<T>): Promise<T> {
    for (let attempt = 0; ; attempt++) {
      try {
        return await call({ timeoutMs, ...(signal && { signal }) });
      } catch (thrown) {
        const error = fromThrown(thrown, target, signal);
        const delayMs = RETRY_DELAYS_MS[attempt];
        const isPassing =
          error instanceof ServerUnavailable ||
          error instanceof DeadlineExceeded ||
          (error instanceof QuotaExceeded && error.metadata.quota === CALLS_QUOTA);
        if (!isPassing || delayMs === undefined) throw error;
        await waitFor(Math.max(delayMs, error.retryAfterMs ?? 0), signal);
      }
    }
  }

  const created = await insist(CALL_TIMEOUT_MS, (call) =>
    service.createLoraUpload({ filename, sizeBytes: BigInt(file.size), sha256: digest }, call),
  );
  if (created.existing !== undefined) {
    onProgress?.(file.size, file.size);
    return created.existing;
  }
  const { uploadId } = created;
  const chunkBytes = Math.min(CHUNK_BYTES, created.maxChunkBytes);
  if (!uploadId || !chunkBytes)
    throw new ProtocolError("the server began an upload without saying how to go on");

  let offset = 0;
  let setbacks = 0;
  while (offset < file.size) {
    onProgress?.(offset, file.size);
    const chunk = new Uint8Array(await file.slice(offset, offset + chunkBytes).arrayBuffer());
    try {
      const from = BigInt(offset);
      const answer = await insist(CALL_TIMEOUT_MS, (call) =>
        service.appendLoraUpload({ uploadId, offset: from, chunk }, call),
      );
      const next = Number(answer.nextOffset);
      if (next <= offset || next > file.size) {
        throw new ProtocolError(`after byte ${offset} the server wants byte ${next} of ${file.size}`);
      }
      offset = next;
      setbacks = 0;
    } catch (error) {
      // The server has another part of the file than we think: go on from there.
      if (!(error instanceof UploadOutOfOrder)) throw error;
      setbacks += 1;
      const expected = Number(error.metadata.expected_offset ?? Number.NaN);
      if (setbacks > RETRY_DELAYS_MS.length || !(expected >= 0 && expected <= file.size)) throw error;
      offset = expected;
    }
  }
  onProgress?.(file.size, file.size);
  const final = await insist(FINAL_TIMEOUT_MS, (call) =>
    service.finalizeLoraUpload({ uploadId, sha256: digest }, call),
  );
  if (final.lora === undefined)
    throw new ProtocolError("the server took an upload without saying what it is");
  return final.lora;
}

async function hash(file: Blob, signal: AbortSignal | undefined): Promise<string> {
  const state = sha256.create();
  for (let offset = 0; offset < file.size; offset += 4 * CHUNK_BYTES) {
    if (signal?.aborted) throw cancelledHere(signal.reason);
    state.update(new Uint8Array(await file.slice(offset, offset + 4 * CHUNK_BYTES).arrayBuffer()));
  }
  return bytesToHex(state.digest());
}
