/**
 * A training run's folder, as the browser hands it over: its own files and those in `samples`, and nothing deeper.
 *
 * Files stay where they are; only what is asked for is read.
 */
import { sha256 } from "@noble/hashes/sha2.js";
import { bytesToHex } from "@noble/hashes/utils.js";
import { ConfigError, MAX_CONFIG_BYTES, oneLine } from "./config-limits.ts";

/** The trainer writes the first; its user interface leaves the last. */
export const CONFIG_NAMES = ["config.yaml", "config.yml", ".job_config.json"] as const;
export const SAMPLES = "samples";
export const MAX_ENTRIES = 100_000;
export const MAX_HEADER_BYTES = 32 * 1024 ** 2;
export const MAX_PICTURE_BYTES = 64 * 1024 ** 2;
const HASHED_AT_ONCE_BYTES = 4 * 1024 ** 2;
const SAMPLE_NAME = /^([0-9]{1,18})__([0-9]{9,12})_([0-9]{1,6})\.(jpg|jpeg|png|webp)$/;

/** A file of the folder cannot be read or is not what it should be; a sentence for people. */
export class Unreadable extends Error {}

/** Opens a file; null stands for a folder. */
export type Opener = (() => Promise<File>) | null;
/** What a folder holds by name, with `/`, at most one folder deep. */
export type FolderFiles = ReadonlyMap<string, Opener>;

/** A picture that the trainer drew. */
export interface SampleFile {
  /** Below the run's folder: `samples/…`. */
  readonly name: string;
  /** When it was drawn, by the trainer's clock, in milliseconds since 1970. */
  readonly timeMs: number;
  readonly step: number;
  readonly index: number;
}

/** A file that is left out, and why. */
export interface Ignored {
  readonly name: string;
  readonly reason: string;
}

/** What a saved adapter says of itself. */
export interface AdapterHeader {
  readonly step: number | null;
  /** `chroma`; empty where the file does not say. */
  readonly baseModel: string;
}

/** A run folder. */
export class RunFolder {
  /** What the person calls it. */
  readonly name: string;
  readonly #files: FolderFiles;
  readonly #hashes = new Map<string, Promise<string>>();

  constructor(name: string, files: FolderFiles) {
    this.name = name;
    this.#files = files;
  }

  /**
   * A file.
   *
   * @throws Unreadable it is missing, or a folder.
   */
  async file(name: string): Promise<File> {
    const open = this.#files.get(name);
    if (open === undefined) throw new Unreadable(`${name} cannot be read: there is no such file`);
    if (open === null) throw new Unreadable(`${name} is no plain file`);
    try {
      return await open();
    } catch (error) {
      throw new Unreadable(`${name} cannot be read: ${oneLine(error)}`);
    }
  }

  /**
   * A file's content.
   *
   * @throws Unreadable it cannot be read, or has more than `limitBytes`.
   */
  async read(name: string, limitBytes: number): Promise<Uint8Array<ArrayBuffer>> {
    const file = await this.file(name);
    if (file.size > limitBytes) throw new Unreadable(`${name} has more than ${limitBytes} bytes`);
    return bytesOf(file, name);
  }

  /**
   * Of a file's content, hexadecimal; read once.
   *
   * @throws Unreadable it cannot be read.
   */
  sha256(name: string): Promise<string> {
    const known = this.#hashes.get(name) ?? this.#hash(name);
    this.#hashes.set(name, known);
    return known;
  }

  async #hash(name: string): Promise<string> {
    const file = await this.file(name);
    const state = sha256.create();
    for (let offset = 0; offset < file.size; offset += HASHED_AT_ONCE_BYTES)
      state.update(await bytesOf(file.slice(offset, offset + HASHED_AT_ONCE_BYTES), name));
    return bytesToHex(state.digest());
  }

  /**
   * What the folder itself (`""`) or `samples` holds, by name.
   *
   * @throws Unreadable it holds more than `MAX_ENTRIES`.
   */
  names(folder: "" | typeof SAMPLES = ""): readonly string[] {
    const start = folder === "" ? "" : `${folder}/`;
    const names = [...this.#files.keys()]
      .filter((name) => name.startsWith(start) && !name.slice(start.length).includes("/"))
      .map((name) => name.slice(start.length));
    if (names.length > MAX_ENTRIES)
      throw new Unreadable(`${folder || "the folder"} holds more than ${MAX_ENTRIES} files`);
    return names.sort();
  }

  /**
   * Name and content of the run's config.
   *
   * @throws ConfigError there is none, or it is too large.
   */
  async config(): Promise<{ readonly name: string; readonly content: Uint8Array }> {
    const present = new Set(this.names());
    const name = CONFIG_NAMES.find((one) => present.has(one));
    if (name === undefined)
      throw new ConfigError(`this is no run folder of ai-toolkit: there is no ${CONFIG_NAMES[0]} in it`);
    try {
      return { name, content: await this.read(name, MAX_CONFIG_BYTES) };
    } catch (error) {
      throw new ConfigError(`${oneLine(error)}: that is no training config of ai-toolkit`);
    }
  }

  /**
   * The newest picture of every step and index, by both, and what is no such picture.
   *
   * @throws Unreadable there are too many files.
   */
  samples(): { readonly samples: readonly SampleFile[]; readonly ignored: readonly Ignored[] } {
    const newest = new Map<string, SampleFile>();
    const ignored: Ignored[] = [];
    for (const name of this.names(SAMPLES)) {
      if (name.startsWith(".")) continue; // thumbnails, and what is not finished
      const found = SAMPLE_NAME.exec(name);
      if (found === null) {
        ignored.push({ name: `${SAMPLES}/${name}`, reason: "not named like a sample of ai-toolkit" });
        continue;
      }
      const [timeMs = 0, step = 0, index = 0] = found.slice(1, 4).map(Number);
      const sample = { name: `${SAMPLES}/${name}`, timeMs, step, index };
      const key = `${step} ${index}`;
      const other = newest.get(key);
      const isNewer = other === undefined || other.timeMs <= timeMs;
      if (other !== undefined)
        ignored.push({ name: (isNewer ? other : sample).name, reason: "drawn again later" });
      if (isNewer) newest.set(key, sample);
    }
    const samples = [...newest.values()].sort((a, b) => a.step - b.step || a.index - b.index);
    return { samples, ignored };
  }

  /**
   * What a saved adapter says of itself; nothing of its values is read.
   *
   * @throws Unreadable it is no safetensors file.
   */
  async adapterHeader(name: string): Promise<AdapterHeader> {
    const file = await this.file(name);
    const start = await bytesOf(file.slice(0, 8), name);
    const size = start.length === 8 ? new DataView(start.buffer).getBigUint64(0, true) : 0n;
    const header =
      size >= 2n && size <= MAX_HEADER_BYTES
        ? parsed(await bytesOf(file.slice(8, 8 + Number(size)), name))
        : undefined;
    if (!isObject(header)) throw new Unreadable(`${name} is no safetensors file`);
    const metadata = isObject(header.__metadata__) ? header.__metadata__ : {};
    const baseModel = metadata.ss_base_model_version;
    return {
      step: stepOf(metadata.training_info),
      baseModel: typeof baseModel === "string" ? baseModel : "",
    };
  }
}

/** The files that a person chose with an `<input webkitdirectory>`. */
export function chosenFolder(files: Iterable<File>): RunFolder {
  let folder = "";
  const found = new Map<string, Opener>();
  for (const file of files) {
    const [root = "", ...parts] = file.webkitRelativePath.split("/");
    folder = root;
    const name = parts.slice(0, parts[0] === SAMPLES ? 2 : 1).join("/");
    found.set(name, name === parts.join("/") ? () => Promise.resolve(file) : (found.get(name) ?? null));
  }
  return new RunFolder(folder, found);
}

async function bytesOf(blob: Blob, name: string): Promise<Uint8Array<ArrayBuffer>> {
  try {
    return new Uint8Array(await blob.arrayBuffer());
  } catch (error) {
    throw new Unreadable(`${name} cannot be read: ${oneLine(error)}`);
  }
}

function parsed(content: Uint8Array): unknown {
  try {
    return JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(content));
  } catch {
    return undefined;
  }
}

function isObject(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function stepOf(trainingInfo: unknown): number | null {
  const info =
    typeof trainingInfo === "string" ? parsed(new TextEncoder().encode(trainingInfo)) : trainingInfo;
  const step = isObject(info) ? info.step : undefined;
  return typeof step === "number" && Number.isInteger(step) ? step : null;
}
