/** Small pictures of earlier runs; the large ones are dropped after making them. */
import { signal } from "@preact/signals";
import type { Client } from "chromarpc/web";

const SIDE_PX = 192;
const urls = signal<ReadonlyMap<string, string>>(new Map());
const asked = new Set<string>();
let last: Promise<void> = Promise.resolve();

/** Object URLs by job. */
export const thumbnails = {
  get value(): ReadonlyMap<string, string> {
    return urls.value;
  },
  /** Fetches one, after those that were asked for before. */
  fetch(client: Client, jobId: string): Promise<void> {
    if (asked.has(jobId)) return Promise.resolve();
    asked.add(jobId);
    last = last.then(() => make(client, jobId));
    return last;
  },
};

async function make(client: Client, jobId: string): Promise<void> {
  try {
    const image = await client.getImage(jobId, 0);
    const full = await createImageBitmap(image.blob());
    const scale = Math.min(1, SIDE_PX / Math.max(full.width, full.height));
    const canvas = document.createElement("canvas");
    canvas.width = Math.max(1, Math.round(full.width * scale));
    canvas.height = Math.max(1, Math.round(full.height * scale));
    canvas.getContext("2d")?.drawImage(full, 0, 0, canvas.width, canvas.height);
    full.close();
    const blob = await new Promise<Blob | null>((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.85));
    if (blob !== null) urls.value = new Map(urls.value).set(jobId, URL.createObjectURL(blob));
  } catch {
    asked.delete(jobId); // the next look tries again
  }
}
