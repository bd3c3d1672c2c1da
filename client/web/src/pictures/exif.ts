/** Texts in EXIF: the user's comment, and what ComfyUI writes into the fields of camera and maker. */
import { latin1, utf8 } from "./texts.ts";

const MAX_ENTRIES = 500;
const EXIF_DIRECTORY = 0x8769;
const USER_COMMENT = 0x9286;
/** Bytes, ASCII, undefined: one byte a value. */
const TEXT_TYPES: readonly number[] = [1, 2, 7];
const LONG = 4;
/** What ComfyUI begins its texts with, before a colon. */
const KEYWORDS: readonly string[] = ["prompt", "workflow"];

interface Entry {
  readonly kind: number;
  readonly value: Uint8Array;
}

/**
 * Texts by keyword: `parameters` for the user's comment, `prompt` and `workflow` where they are ComfyUI's. What makes
 * no sense is left out.
 */
export function readExif(data: Uint8Array): ReadonlyMap<string, string> {
  const found = new Map<string, string>();
  const mark = latin1(data.subarray(0, 4));
  if (mark !== "II*\0" && mark !== "MM\0*") return found;
  const isLittle = mark === "II*\0";
  try {
    const view = viewOf(data);
    const main = entriesOf(data, view.getUint32(4, isLittle), isLittle);
    for (const { kind, value } of main.values()) {
      const text = TEXT_TYPES.includes(kind) ? keywordOf(value) : undefined;
      if (text !== undefined) keepFirst(found, ...text);
    }
    const pointer = main.get(EXIF_DIRECTORY);
    if (pointer?.value.length === 4) {
      const own = entriesOf(data, viewOf(pointer.value).getUint32(0, isLittle), isLittle);
      const comment = own.get(USER_COMMENT);
      if (comment !== undefined) noteComment(commentOf(comment.value, isLittle), found);
    }
  } catch (error) {
    if (!(error instanceof RangeError)) throw error;
  }
  return found;
}

function noteComment(comment: string, found: Map<string, string>): void {
  const text = keywordOf(new TextEncoder().encode(comment));
  keepFirst(found, ...(text ?? (["parameters", comment] as const)));
}

function keepFirst(found: Map<string, string>, keyword: string, text: string): void {
  if (!found.has(keyword)) found.set(keyword, text);
}

function viewOf(data: Uint8Array): DataView {
  return new DataView(data.buffer, data.byteOffset, data.byteLength);
}

/** @throws RangeError it says that it lies outside. */
function entriesOf(data: Uint8Array, at: number, isLittle: boolean): ReadonlyMap<number, Entry> {
  const view = viewOf(data);
  const entries = new Map<number, Entry>();
  const count = Math.min(view.getUint16(at, isLittle), MAX_ENTRIES);
  for (let index = 0; index < count; index++) {
    const here = at + 2 + 12 * index;
    const tag = view.getUint16(here, isLittle);
    const kind = view.getUint16(here + 2, isLittle);
    const size = view.getUint32(here + 4, isLittle) * (kind === 3 ? 2 : kind === LONG ? 4 : 1);
    const place = size > 4 ? view.getUint32(here + 8, isLittle) : here + 8;
    if ((TEXT_TYPES.includes(kind) || kind === LONG) && place + size <= data.length) {
      entries.set(tag, { kind, value: data.subarray(place, place + size) });
    }
  }
  return entries;
}

/** `prompt:{…}` as keyword and text. */
function keywordOf(value: Uint8Array): readonly [string, string] | undefined {
  const colon = value.indexOf(0x3a);
  if (colon < 0 || colon > 8) return undefined;
  const keyword = latin1(value.subarray(0, colon)).toLowerCase();
  if (!KEYWORDS.includes(keyword)) return undefined;
  const text = withoutZeros(value.subarray(colon + 1));
  // A brace after white space.
  if (text.find((byte) => byte !== 0x20 && !(byte >= 0x09 && byte <= 0x0d)) !== 0x7b) return undefined;
  return [keyword, utf8(text)];
}

function withoutZeros(data: Uint8Array): Uint8Array {
  let end = data.length;
  while (end > 0 && data[end - 1] === 0) end -= 1;
  return data.subarray(0, end);
}

/** A comment after its eight bytes of encoding, whose byte order writers disagree about. */
function commentOf(value: Uint8Array, isLittle: boolean): string {
  const text = value.subarray(8);
  if (!latin1(value.subarray(0, 8)).startsWith("UNICODE")) return utf8(withoutZeros(text));
  const [first, second] = text;
  if (first === 0xfe && second === 0xff) return utf16(text.subarray(2), false);
  if (first === 0xff && second === 0xfe) return utf16(text.subarray(2), true);
  const begin = text.subarray(0, 4096);
  const zerosFirst = begin.filter((byte, at) => byte === 0 && at % 2 === 0).length;
  const zerosSecond = begin.filter((byte, at) => byte === 0 && at % 2 === 1).length;
  const isLittleHere = zerosFirst === zerosSecond ? isLittle : zerosFirst < zerosSecond;
  return withoutNulls(utf16(text, isLittleHere));
}

function withoutNulls(text: string): string {
  let end = text.length;
  while (end > 0 && text.charCodeAt(end - 1) === 0) end -= 1;
  return text.slice(0, end);
}

function utf16(data: Uint8Array, isLittle: boolean): string {
  return new TextDecoder(isLittle ? "utf-16le" : "utf-16be", { ignoreBOM: true }).decode(data);
}
