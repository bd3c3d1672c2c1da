/** Folders that are dropped on the page; everything else that is dropped is somebody else's. */
import { MAX_ENTRIES, type Opener, RunFolder, SAMPLES, Unreadable } from "./run-folder.ts";

/**
 * Listens for folders, anywhere on the page.
 *
 * @param take told of each that is dropped.
 * @param onHover told whether something that may be a folder is held over the page.
 */
export function listenForFolders(
  take: (folder: Promise<RunFolder>) => void,
  onHover: (isOver: boolean) => void,
): void {
  document.addEventListener("dragover", (event) => {
    // What it is, a browser says only when it is dropped: until then, anything but a picture may be a folder.
    const items = [...(event.dataTransfer?.items ?? [])];
    if (!items.some(({ kind, type }) => kind === "file" && !type.startsWith("image/"))) return;
    event.preventDefault();
    onHover(true);
  });
  document.addEventListener("dragleave", (event) => {
    if (event.relatedTarget === null) onHover(false);
  });
  document.addEventListener(
    "drop",
    (event) => {
      onHover(false);
      const entries = [...(event.dataTransfer?.items ?? [])].map((item) => item.webkitGetAsEntry?.() ?? null);
      const folder = entries.find((entry) => entry?.isDirectory);
      if (!folder) return;
      event.preventDefault();
      event.stopPropagation();
      // Whatever is below takes files and would wait for them to leave.
      event.target?.dispatchEvent(new DragEvent("dragleave", { bubbles: true }));
      take(folderOf(folder as FileSystemDirectoryEntry));
    },
    { capture: true },
  );
}

/**
 * A dropped folder, listed.
 *
 * @throws Unreadable it holds too many files, or the browser does not let it be read.
 */
export async function folderOf(root: FileSystemDirectoryEntry): Promise<RunFolder> {
  const files = new Map<string, Opener>();
  for (const entry of await entriesOf(root)) {
    files.set(entry.name, openerOf(entry));
    if (entry.name !== SAMPLES || !entry.isDirectory) continue;
    for (const sample of await entriesOf(entry as FileSystemDirectoryEntry))
      files.set(`${SAMPLES}/${sample.name}`, openerOf(sample));
  }
  return new RunFolder(root.name, files);
}

function openerOf(entry: FileSystemEntry): Opener {
  if (!entry.isFile) return null;
  return () => new Promise((resolve, reject) => (entry as FileSystemFileEntry).file(resolve, reject));
}

async function entriesOf(folder: FileSystemDirectoryEntry): Promise<FileSystemEntry[]> {
  const reader = folder.createReader();
  const found: FileSystemEntry[] = [];
  for (;;) {
    const some = await new Promise<FileSystemEntry[]>((resolve, reject) =>
      reader.readEntries(resolve, (error) =>
        reject(new Unreadable(`${folder.name} cannot be read: ${error.message}`)),
      ),
    );
    if (some.length === 0) return found;
    found.push(...some);
    if (found.length > MAX_ENTRIES)
      throw new Unreadable(`${folder.name} holds more than ${MAX_ENTRIES} files`);
  }
}
