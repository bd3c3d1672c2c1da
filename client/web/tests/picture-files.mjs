/** PNGs as other programs leave them, made here. */
import { crc32, deflateSync } from "node:zlib";

const SIGNATURE = Buffer.from("89504e470d0a1a0a", "hex");

/** A PNG of one colour, 64 × 64, with these chunks before its pixels. */
export function png(...chunks) {
  const head = chunk("IHDR", Buffer.from([0, 0, 0, 64, 0, 0, 0, 64, 8, 2, 0, 0, 0]));
  const row = Buffer.concat([Buffer.alloc(1), Buffer.alloc(3 * 64, 120)]);
  const pixels = chunk("IDAT", deflateSync(Buffer.concat(Array.from({ length: 64 }, () => row))));
  const end = chunk("IEND", Buffer.alloc(0));
  return new Uint8Array(Buffer.concat([SIGNATURE, head, ...chunks, pixels, end]));
}

/** A chunk of text; `head` is what stands between keyword and text. */
export function text(kind, keyword, head, body) {
  return chunk(kind, Buffer.concat([Buffer.from(`${keyword}\0${head}`), Buffer.from(body)]));
}

function chunk(kind, body) {
  const named = Buffer.concat([Buffer.from(kind), body]);
  const length = Buffer.alloc(4);
  const sum = Buffer.alloc(4);
  length.writeUInt32BE(body.length);
  sum.writeUInt32BE(crc32(named));
  return Buffer.concat([length, named, sum]);
}
