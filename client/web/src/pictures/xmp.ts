/** The record in XMP, taken out as text: nothing is parsed as XML, so no entity is expanded, nothing fetched. */
import { md5 } from "@noble/hashes/legacy.js";
import { latin1 } from "./texts.ts";

const PREFIX = /xmlns:([A-Za-z_][\p{L}\p{N}_.-]{0,63})\s*=\s*["']urn:chromarpc:picture["']/gu;
const ENTITY = /&(?:(amp|lt|gt|quot|apos)|#([0-9]{1,7})|#x([0-9A-Fa-f]{1,6}));/g;
const NAMED: Readonly<Record<string, string>> = { amp: "&", lt: "<", gt: ">", quot: '"', apos: "'" };

/** The record's text, whether it stands in an element or in an attribute. */
export function recordedText(xmp: string): string | undefined {
  const prefixes = new Set([...xmp.matchAll(PREFIX)].map(([, prefix]) => prefix));
  for (const prefix of prefixes) {
    const name = `${prefix}:record`;
    const start = xmp.indexOf(`<${name}`);
    if (start >= 0) {
      const begin = xmp.indexOf(">", start) + 1;
      const end = xmp.indexOf(`</${name}`, begin);
      if (begin > 0 && end >= 0) return unescaped(xmp.slice(begin, end));
    }
    const attribute = xmp.indexOf(`${name}=`);
    const quote = attribute < 0 ? "" : xmp.charAt(attribute + name.length + 1);
    if (quote === '"' || quote === "'") {
      const begin = attribute + name.length + 2;
      const end = xmp.indexOf(quote, begin);
      if (end >= 0) return unescaped(xmp.slice(begin, end));
    }
  }
  return undefined;
}

/** XMP of several JPEG segments, each with its name, full length and offset; nothing where one is missing. */
export function joinExtension(parts: readonly Uint8Array[]): Uint8Array {
  const name = latin1((parts[0] ?? new Uint8Array()).subarray(0, 32));
  const own = parts.filter((part) => latin1(part.subarray(0, 32)) === name);
  const none = new Uint8Array();
  if (own.length === 0 || own.some((part) => part.length < 40)) return none;
  const placed = own
    .map((part) => {
      const numbers = new DataView(part.buffer, part.byteOffset + 32, 8);
      return { whole: numbers.getUint32(0), offset: numbers.getUint32(4), body: part.subarray(40) };
    })
    .sort((one, other) => one.whole - other.whole || one.offset - other.offset);
  const size = placed.reduce((sum, { body }) => sum + body.length, 0);
  if (size !== placed[0]?.whole) return none;
  const whole = new Uint8Array(size);
  let at = 0;
  for (const { body } of placed) {
    whole.set(body, at);
    at += body.length;
  }
  const digest = [...md5(whole)].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  return digest.toUpperCase() === name ? whole : none;
}

function unescaped(text: string): string {
  return text.replace(ENTITY, (all, named?: string, decimal?: string, hexadecimal?: string) => {
    if (named !== undefined) return NAMED[named] ?? all;
    const code = decimal === undefined ? Number.parseInt(hexadecimal ?? "", 16) : Number(decimal);
    return code < 0x110000 ? String.fromCodePoint(code) : all;
  });
}
