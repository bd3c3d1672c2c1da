/** Picture files: what they are and how large, before anything is decoded. */

export const MAX_PIXELS = 4096 * 4096;

/** Bytes that are no JPEG, PNG or WebP; a sentence for people. */
export class NoPicture extends Error {}

/** What a picture file says of itself. */
export interface PictureHead {
  readonly mediaType: "image/jpeg" | "image/png" | "image/webp";
  /** Pixels. */
  readonly width: number;
  /** Pixels. */
  readonly height: number;
}

/**
 * Kind and size of a picture.
 *
 * @throws NoPicture it is none, is cut off, or has more than `MAX_PIXELS`.
 */
export function pictureHead(data: Uint8Array): PictureHead {
  const view = new DataView(data.buffer, data.byteOffset, data.byteLength);
  let head: PictureHead | undefined;
  try {
    head = jpegHead(view) ?? pngHead(view) ?? webpHead(view);
  } catch (error) {
    if (!(error instanceof RangeError)) throw error; // what a file announces lies beyond its end
  }
  if (head === undefined || head.width === 0 || head.height === 0) throw broken();
  if (head.width * head.height > MAX_PIXELS) throw new NoPicture(`has ${head.width}×${head.height} pixels`);
  return head;
}

/** The error of a picture that cannot be decoded. */
export function broken(): NoPicture {
  return new NoPicture("is no picture, or a broken one");
}

function jpegHead(view: DataView): PictureHead | undefined {
  if (view.byteLength < 4 || view.getUint16(0) !== 0xffd8) return undefined;
  let size: Pick<PictureHead, "width" | "height"> | undefined;
  for (let at = 2; ; ) {
    const marker = view.getUint16(at);
    if (marker < 0xff00) return undefined;
    const isFrame = marker >= 0xffc0 && marker <= 0xffcf && ![0xffc4, 0xffc8, 0xffcc].includes(marker);
    if (isFrame) size = { height: view.getUint16(at + 5), width: view.getUint16(at + 7) };
    if (marker === 0xffda)
      return size && endsAfter(view, at) ? { mediaType: "image/jpeg", ...size } : undefined;
    at += marker === 0xffff ? 1 : 2 + view.getUint16(at + 2);
  }
}

/** Whether the end of the image follows: a decoder of a browser fills up with grey what is cut off. */
function endsAfter(view: DataView, start: number): boolean {
  for (let at = view.byteLength - 2; at > start; at--) if (view.getUint16(at) === 0xffd9) return true;
  return false;
}

function pngHead(view: DataView): PictureHead | undefined {
  if (view.byteLength < 33 || view.getUint32(0) !== 0x89504e47 || view.getUint32(4) !== 0x0d0a1a0a)
    return undefined;
  // Its last chunk is IEND, with its checksum; whatever follows is not the picture's.
  let end = view.byteLength - 8;
  while (end > 0 && view.getUint32(end) !== 0x49454e44) end--;
  if (end <= 0) return undefined;
  return { mediaType: "image/png", width: view.getUint32(16), height: view.getUint32(20) };
}

function webpHead(view: DataView): PictureHead | undefined {
  if (view.byteLength < 30 || view.getUint32(0) !== 0x52494646 || view.getUint32(8) !== 0x57454250)
    return undefined;
  if (view.getUint32(4, true) + 8 > view.byteLength) return undefined;
  const mediaType = "image/webp";
  const kind = view.getUint32(12);
  if (kind === 0x56503820) {
    return {
      mediaType,
      width: view.getUint16(26, true) & 0x3fff,
      height: view.getUint16(28, true) & 0x3fff,
    };
  }
  if (kind === 0x5650384c) {
    const bits = view.getUint32(21, true);
    return { mediaType, width: (bits & 0x3fff) + 1, height: ((bits >>> 14) & 0x3fff) + 1 };
  }
  if (kind === 0x56503858) {
    const three = (at: number): number => view.getUint16(at, true) + (view.getUint8(at + 2) << 16) + 1;
    return { mediaType, width: three(24), height: three(27) };
  }
  return undefined;
}
