/**
 * What is dropped on the page: a picture is explained, a run's folder redrawn, and adapters go to their box. Anything else
 * is one line, and nothing is left to the browser, which would open it in the page's place.
 */
import { signal } from "@preact/signals";
import { upload } from "./lora-view.tsx";
import { compareWith, type DrawnHere, explain, refuse } from "./pictures/state.ts";
import { folderOf } from "./replay/drop.ts";
import { begin, drawnOf, openedKey } from "./replay/replaying.ts";

/** What is held over the page, as far as a browser says before it is dropped: a folder has no type, nor has an adapter. */
export type Held = "picture" | "unknown" | "adapters" | "several";

export const held = signal<Held | undefined>(undefined);

/** Listens, before any part of the page. */
export function listenForDrops(): void {
  const options = { capture: true };
  window.addEventListener("dragover", over, options);
  window.addEventListener("dragleave", left, options);
  window.addEventListener("drop", dropped, options);
}

function over(event: DragEvent): void {
  const items = filesIn(event);
  // Text is the fields' own.
  if (items.length === 0) return;
  event.preventDefault();
  held.value = heldOf(items, isOnAdapters(event));
}

function left(event: DragEvent): void {
  if (event.relatedTarget === null) held.value = undefined;
}

function dropped(event: DragEvent): void {
  held.value = undefined;
  const items = filesIn(event);
  if (items.length === 0) return;
  event.preventDefault();
  event.stopPropagation();
  const sample = drawnOf(openedKey.value);
  // What comes of it stands in the page, below them.
  for (const dialog of document.querySelectorAll("dialog")) dialog.close();
  const folders = items.flatMap((item) => {
    const entry = item.webkitGetAsEntry();
    return entry?.isDirectory ? [entry as FileSystemDirectoryEntry] : [];
  });
  const files = items.flatMap((item) => item.getAsFile() ?? []);
  const [folder] = folders;
  const [file] = files;
  if (items.length > 1 && (folder !== undefined || heldOf(items, isOnAdapters(event)) !== "adapters")) {
    const count = `These are ${items.length}`;
    refuse(
      isAllAdapters(files) && folder === undefined
        ? `${count} adapters. Drop them on the form’s box “Adapters (LoRA)”.`
        : `${count} files or folders. Drop one picture, or one folder of a training run.`,
    );
  } else if (folder !== undefined) {
    void begin(folderOf(folder));
  } else if (heldOf(items, isOnAdapters(event)) === "adapters") {
    for (const one of files) void upload(one);
  } else if (isAllAdapters(files)) {
    refuse(`${file?.name ?? "It"} is an adapter. Drop it on the form’s box “Adapters (LoRA)”.`);
  } else if (file !== undefined) {
    void open(file, sample);
  }
}

/** Explains a picture; one that is dropped on a sample of a replay is compared with it. */
async function open(file: File, sample: DrawnHere | undefined): Promise<void> {
  if ((await explain(file)) && sample !== undefined) await compareWith(sample);
}

function heldOf(items: readonly DataTransferItem[], isOnBox: boolean): Held {
  const isPicture = items.every(({ type }) => type.startsWith("image/"));
  if (isOnBox && !isPicture) return "adapters";
  if (items.length > 1) return "several";
  return isPicture ? "picture" : "unknown";
}

function isOnAdapters({ target }: DragEvent): boolean {
  return target instanceof Element && target.closest(".loras") !== null;
}

function isAllAdapters(files: readonly File[]): boolean {
  return files.length > 0 && files.every(({ name }) => /\.safetensors$/i.test(name));
}

function filesIn({ dataTransfer }: DragEvent): DataTransferItem[] {
  return [...(dataTransfer?.items ?? [])].filter(({ kind }) => kind === "file");
}
