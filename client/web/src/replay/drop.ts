/** A folder that is dropped on the page, as the browser lets it be read. */
import { MAX_ENTRIES, type Opener, RunFolder, SAMPLES, Unreadable } from "./run-folder.ts";

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
