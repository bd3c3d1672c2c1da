/** How far the pixels of two pictures are apart, as the browser decodes them. */
import type { PictureFile } from "./files.ts";
import type { OpenedPicture } from "./opened.ts";

/** More are not decoded. */
export const MAX_PIXELS = 4096 * 4096;
/** PSNR of equal pixels, which have none. */
const SAME_DB = 100;

/** A sentence about the pixels of two pictures. */
export async function comparePixels(one: OpenedPicture, other: OpenedPicture): Promise<string> {
  const tooLarge = [one.file, other.file].find((file) => !isDrawable(file));
  if (tooLarge !== undefined) {
    const size = `${tooLarge.widthPx}×${tooLarge.heightPx}`;
    return `pixels: cannot be compared: one of them has ${size} pixels`;
  }
  try {
    const [first, second] = [await decode(one), await decode(other)];
    if (first.width !== second.width || first.height !== second.height) {
      const sizes = `${first.width}×${first.height} beside ${second.width}×${second.height}`;
      return `pixels: ${sizes}, so they are not compared`;
    }
    return sentence(first.data, second.data, isSameFile(one.data, other.data));
  } catch {
    return "pixels: cannot be compared: one of them is no picture, or a broken one";
  }
}

/** Whether a picture is small enough to be decoded. */
export function isDrawable({ widthPx, heightPx }: PictureFile): boolean {
  return widthPx * heightPx <= MAX_PIXELS;
}

/** Whether a picture's pixels can be decoded, as far as that is tried. */
export async function isWhole(picture: OpenedPicture): Promise<boolean> {
  if (!isDrawable(picture.file)) return true;
  try {
    (await createImageBitmap(blobOf(picture))).close();
    return true;
  } catch {
    return false;
  }
}

/** The picture's file for the browser. */
export function blobOf({ data, file }: OpenedPicture): Blob {
  return new Blob([data], { type: `image/${file.kind.toLowerCase()}` });
}

async function decode(picture: OpenedPicture): Promise<ImageData> {
  const options = { colorSpaceConversion: "none", premultiplyAlpha: "none" } as const;
  const bitmap = await createImageBitmap(blobOf(picture), options);
  const { width, height } = bitmap;
  const context = Object.assign(document.createElement("canvas"), { width, height }).getContext("2d", {
    willReadFrequently: true,
  });
  if (context === null) throw new Error("this browser lends no canvas");
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  return context.getImageData(0, 0, width, height);
}

function sentence(first: Uint8ClampedArray, second: Uint8ClampedArray, isIdentical: boolean): string {
  let squares = 0;
  let largest = 0;
  for (let at = 0; at < first.length; at++) {
    if (at % 4 === 3) continue; // opacity
    const difference = Math.abs((first[at] ?? 0) - (second[at] ?? 0));
    squares += difference * difference;
    if (difference > largest) largest = difference;
  }
  if (largest === 0) return `pixels: the same${isIdentical ? ", and so is every byte" : ""}`;
  const psnrDb = Math.min(SAME_DB, 10 * Math.log10((255 ** 2 * first.length * 0.75) / squares));
  return `pixels: PSNR ${psnrDb.toFixed(2)} dB, largest difference ${largest} of 255`;
}

function isSameFile(one: Uint8Array, other: Uint8Array): boolean {
  return one.length === other.length && one.every((byte, at) => byte === other[at]);
}
