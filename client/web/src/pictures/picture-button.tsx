/** The ways in for a picture: a button with a file chooser, and dropping one anywhere on the page. */
import { signal } from "@preact/signals";
import { useEffect } from "preact/hooks";
import { explain } from "./state.ts";

/** Whether one is held over the page. */
const isOver = signal(false);

export function PictureButton() {
  useEffect(listen, []);
  return (
    <>
      <label class="button quiet">
        Explain a picture …
        <input
          type="file"
          class="visually-hidden"
          accept="image/png,image/jpeg,image/webp"
          aria-label="Explain a picture"
          onChange={(event) => {
            const [file] = event.currentTarget.files ?? [];
            if (file !== undefined) void explain(file);
            event.currentTarget.value = "";
          }}
        />
      </label>
      {isOver.value && (
        <div class="drop-over" aria-hidden="true">
          <p>Drop the picture to see what it was drawn with</p>
        </div>
      )}
    </>
  );
}

/** Before any part of the page: a picture that is dropped on the adapters is still a picture. */
function listen(): () => void {
  const abort = new AbortController();
  const options = { capture: true, signal: abort.signal };
  window.addEventListener("dragover", over, options);
  window.addEventListener("drop", dropped, options);
  window.addEventListener("dragleave", left, options);
  return () => abort.abort();
}

function over(event: DragEvent): void {
  const item = onlyFile(event);
  if (item === undefined) return;
  // What is no picture by its type may be a folder, or an adapter: it is looked at when it is dropped.
  const isPicture = item.type.startsWith("image/");
  if (isPicture || !isOnAdapters(event)) event.preventDefault();
  if (isPicture) event.stopPropagation();
  isOver.value = isPicture;
}

function left(event: DragEvent): void {
  if (event.relatedTarget === null) isOver.value = false;
}

function dropped(event: DragEvent): void {
  isOver.value = false;
  const item = onlyFile(event);
  const isFolder = item?.webkitGetAsEntry()?.isDirectory ?? false;
  const file = item?.getAsFile();
  if (!item || !file || isFolder) return;
  if (!item.type.startsWith("image/") && isOnAdapters(event)) return;
  event.preventDefault();
  event.stopPropagation();
  void explain(file);
}

function isOnAdapters({ target }: DragEvent): boolean {
  return target instanceof Element && target.closest(".loras") !== null;
}

/** The one file that is dragged; undefined where it is none, or more. */
function onlyFile({ dataTransfer }: DragEvent): DataTransferItem | undefined {
  const files = [...(dataTransfer?.items ?? [])].filter(({ kind }) => kind === "file");
  return files.length === 1 ? files[0] : undefined;
}
