/**
 * Texts of picture files, which strangers wrote: PNG, JPEG and WebP, within limits and without decoding a pixel.
 *
 * Layouts: PNG (https://www.w3.org/TR/png-3/), JPEG (ITU-T T.81) with EXIF and XMP in APP1 (XMP Specification Part 3),
 * WebP (https://developers.google.com/speed/webp/docs/riff_container).
 */
import { readExif } from "./exif.ts";
import { isUtf8, latin1, utf8 } from "./texts.ts";
import { joinExtension, recordedText } from "./xmp.ts";

export const MAX_FILE_BYTES = 256 * 1024 ** 2;
/** All texts of one file together, inflated. */
export const MAX_TEXT_BYTES = 8 * 1024 ** 2;
/** Of the record among the texts, whatever kind of file it comes from. */
export const RECORD_KEY = "chromarpc";
/** Of the text for people: PNG text of that keyword, EXIF's UserComment elsewhere. */
export const PARAMETERS_KEY = "parameters";
/** As many bytes as tell what kind of file it is. */
export const HEAD_BYTES = 12;
const MAX_CHUNKS = 500_000;
const PNG_SIGNATURE = "\x89PNG\r\n\x1a\n";
const EXIF_MARK = "Exif\0\0";
const XMP_MARK = "http://ns.adobe.com/xap/1.0/\0";
const EXTENSION_MARK = "http://ns.adobe.com/xmp/extension/\0";

/** Bytes that are no picture, or one that cannot be read; a sentence for people. */
export class NoPicture extends Error {}

export type Kind = "PNG" | "JPEG" | "WebP";

/** What a file says of itself. */
export interface PictureFile {
  readonly kind: Kind;
  readonly widthPx: number;
  readonly heightPx: number;
  /** By keyword: a PNG's own; in other files `chromarpc` and `parameters`, and ComfyUI's `prompt`, `workflow`. */
  readonly texts: ReadonlyMap<string, string>;
}

/** What the bytes begin as; undefined where they are no picture that can be read here. */
export function kindOf(data: Uint8Array): Kind | undefined {
  const head = latin1(data.subarray(0, HEAD_BYTES));
  if (head.startsWith(PNG_SIGNATURE)) return "PNG";
  if (head.startsWith("\xff\xd8\xff")) return "JPEG";
  return head.startsWith("RIFF") && head.slice(8) === "WEBP" ? "WebP" : undefined;
}

/**
 * The size and the texts of a picture's file.
 *
 * @throws NoPicture it is none, is cut short, or says more than a picture has to say.
 */
export async function readPicture(data: Uint8Array): Promise<PictureFile> {
  try {
    switch (kindOf(data)) {
      case "PNG":
        return await readPng(data);
      case "JPEG":
        return readJpeg(data);
      case "WebP":
        return readWebp(data);
    }
  } catch (error) {
    if (error instanceof RangeError) throw new NoPicture("is a broken picture");
    throw error;
  }
  throw new NoPicture("is no PNG, JPEG or WebP");
}

/** Texts so far, and how much more there may be. */
class Texts {
  readonly found = new Map<string, string>();
  private leftBytes = MAX_TEXT_BYTES;

  /** Keeps the first text of each keyword. */
  add(keyword: string, text: Uint8Array, decode: (text: Uint8Array) => string): void {
    this.take(text.length);
    this.keep(keyword, decode(text));
  }

  take(size: number): void {
    this.leftBytes -= size;
    if (this.leftBytes < 0) throw tooMuchText();
  }

  addExif(exif: Uint8Array): void {
    this.take(exif.length);
    for (const [keyword, text] of readExif(exif)) this.keep(keyword, text);
  }

  addXmp(xmp: Uint8Array): void {
    this.take(xmp.length);
    const record = recordedText(utf8(xmp));
    if (record !== undefined) this.keep(RECORD_KEY, record);
  }

  /** What was deflated, where it is not more than may be. */
  async inflate(data: Uint8Array): Promise<Uint8Array> {
    const parts: Uint8Array[] = [];
    let size = 0;
    const stream = new DecompressionStream("deflate");
    const writer = stream.writable.getWriter();
    // What goes wrong is told by the reader too.
    void writer.write(new Uint8Array(data)).catch(() => undefined);
    void writer.close().catch(() => undefined);
    const reader = stream.readable.getReader();
    try {
      for (;;) {
        const { done, value } = await reader.read();
        if (done) break;
        size += value.length;
        if (size > this.leftBytes) throw tooMuchText();
        parts.push(value);
      }
    } catch (error) {
      throw error instanceof NoPicture ? error : new NoPicture("is a broken picture");
    } finally {
      void reader.cancel().catch(() => undefined);
    }
    return joined(parts, size);
  }

  private keep(keyword: string, text: string): void {
    if (!this.found.has(keyword)) this.found.set(keyword, text);
  }
}

function tooMuchText(): NoPicture {
  return new NoPicture(`holds more than ${MAX_TEXT_BYTES} bytes of text`);
}

function joined(parts: readonly Uint8Array[], size: number): Uint8Array {
  const whole = new Uint8Array(size);
  let at = 0;
  for (const part of parts) {
    whole.set(part, at);
    at += part.length;
  }
  return whole;
}

function viewOf(data: Uint8Array): DataView {
  return new DataView(data.buffer, data.byteOffset, data.byteLength);
}

async function readPng(data: Uint8Array): Promise<PictureFile> {
  const texts = new Texts();
  let size: { widthPx: number; heightPx: number } | undefined;
  for (const { kind, body } of pngChunks(data)) {
    if (size === undefined) {
      if (kind !== "IHDR") throw new NoPicture("is a broken PNG");
      size = { widthPx: viewOf(body).getUint32(0), heightPx: viewOf(body).getUint32(4) };
    }
    if (kind === "tEXt" || kind === "zTXt" || kind === "iTXt") await addPngText(kind, body, texts);
    else if (kind === "eXIf") texts.addExif(body);
  }
  if (size === undefined) throw new NoPicture("is a broken PNG");
  return { kind: "PNG", ...size, texts: texts.found };
}

function* pngChunks(data: Uint8Array): Generator<{ kind: string; body: Uint8Array }> {
  const view = viewOf(data);
  let at = PNG_SIGNATURE.length;
  for (let count = 0; count < MAX_CHUNKS; count++) {
    const length = view.getUint32(at);
    const kind = latin1(data.subarray(at + 4, at + 8));
    if (at + 12 + length > data.length) throw new NoPicture("is a PNG that was cut short");
    if (kind === "IEND") return;
    yield { kind, body: data.subarray(at + 8, at + 8 + length) };
    at += 12 + length;
  }
  throw new NoPicture("is a PNG of too many parts");
}

async function addPngText(kind: "tEXt" | "zTXt" | "iTXt", body: Uint8Array, texts: Texts): Promise<void> {
  const [keyword, rest] = split(body);
  if (rest === undefined || keyword.length < 1 || keyword.length > 79) return;
  const name = latin1(keyword);
  if (kind === "tEXt") {
    // Latin-1 by the standard; some programs write UTF-8 all the same.
    texts.add(name, rest, isUtf8(rest) ? utf8 : latin1);
  } else if (kind === "zTXt") {
    texts.add(name, await texts.inflate(rest.subarray(1)), latin1);
  } else if (rest.length >= 2) {
    const [, afterLanguage = new Uint8Array()] = split(rest.subarray(2));
    const [, text = new Uint8Array()] = split(afterLanguage);
    texts.add(name, rest[0] ? await texts.inflate(text) : text, utf8);
  }
}

/** What stands before the first byte of zero, and what after it. */
function split(data: Uint8Array): [Uint8Array, Uint8Array | undefined] {
  const at = data.indexOf(0);
  return at < 0 ? [data, undefined] : [data.subarray(0, at), data.subarray(at + 1)];
}

/** Whether a marker of JPEG begins a frame, which says how large the picture is. */
function isSized(marker: number): boolean {
  return marker >= 0xc0 && marker < 0xd0 && marker !== 0xc4 && marker !== 0xc8 && marker !== 0xcc;
}

function readJpeg(data: Uint8Array): PictureFile {
  const texts = new Texts();
  const view = viewOf(data);
  const extensions: Uint8Array[] = [];
  let size: { widthPx: number; heightPx: number } | undefined;
  let at = 2;
  for (let count = 0; count < MAX_CHUNKS; count++) {
    while (view.getUint8(at) === 0xff && view.getUint8(at + 1) === 0xff) at += 1; // fill bytes
    if (view.getUint8(at) !== 0xff) throw new NoPicture("is a broken JPEG");
    const marker = view.getUint8(at + 1);
    const length = view.getUint16(at + 2);
    const body = data.subarray(at + 4, at + 2 + length);
    if (length < 2 || body.length !== length - 2) throw new NoPicture("is a JPEG that was cut short");
    const mark = marker === 0xe1 ? latin1(body.subarray(0, EXTENSION_MARK.length)) : "";
    if (isSized(marker)) {
      size = { widthPx: viewOf(body).getUint16(3), heightPx: viewOf(body).getUint16(1) };
    } else if (mark.startsWith(EXIF_MARK)) {
      texts.addExif(body.subarray(EXIF_MARK.length));
    } else if (mark.startsWith(XMP_MARK)) {
      texts.addXmp(body.subarray(XMP_MARK.length));
    } else if (mark === EXTENSION_MARK) {
      texts.take(body.length);
      extensions.push(body.subarray(EXTENSION_MARK.length));
    } else if (marker === 0xda) {
      break; // pixels follow
    }
    at += 2 + length;
  }
  if (size === undefined) throw new NoPicture("is a broken JPEG");
  if (extensions.length > 0) texts.addXmp(joinExtension(extensions));
  return { kind: "JPEG", ...size, texts: texts.found };
}

function readWebp(data: Uint8Array): PictureFile {
  const texts = new Texts();
  const view = viewOf(data);
  let size: { widthPx: number; heightPx: number } | undefined;
  let at = HEAD_BYTES;
  const end = view.getUint32(4, true) + 8;
  if (end > data.length) throw new NoPicture("is a WebP that was cut short");
  for (let count = 0; count < MAX_CHUNKS && at + 8 <= end; count++) {
    const kind = latin1(data.subarray(at, at + 4));
    const length = view.getUint32(at + 4, true);
    const isText = kind === "EXIF" || kind === "XMP ";
    const body = data.subarray(at + 8, at + 8 + Math.min(length, isText ? MAX_TEXT_BYTES + 1 : 16));
    if (at + 8 + length > end) throw new NoPicture("is a WebP that was cut short");
    size ??= webpSize(kind, body);
    if (kind === "EXIF") {
      const isMarked = latin1(body.subarray(0, EXIF_MARK.length)) === EXIF_MARK;
      texts.addExif(isMarked ? body.subarray(EXIF_MARK.length) : body);
    } else if (kind === "XMP ") {
      texts.addXmp(body);
    }
    at += 8 + length + (length % 2);
  }
  if (size === undefined) throw new NoPicture("is a broken WebP");
  return { kind: "WebP", ...size, texts: texts.found };
}

function webpSize(kind: string, body: Uint8Array): { widthPx: number; heightPx: number } | undefined {
  if (kind === "VP8X") return { widthPx: little(body, 4, 7) + 1, heightPx: little(body, 7, 10) + 1 };
  if (kind === "VP8 ") {
    const view = viewOf(body);
    return { widthPx: view.getUint16(6, true) & 0x3fff, heightPx: view.getUint16(8, true) & 0x3fff };
  }
  if (kind === "VP8L") {
    const bits = little(body, 1, 5);
    return { widthPx: (bits & 0x3fff) + 1, heightPx: ((bits >>> 14) & 0x3fff) + 1 };
  }
  return undefined;
}

/** A whole number, its lowest byte first. */
function little(data: Uint8Array, from: number, to: number): number {
  return data.subarray(from, to).reduceRight((sum, byte) => sum * 256 + byte, 0);
}
