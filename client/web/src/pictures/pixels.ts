/** How far the pixels of two pictures are apart, as the browser decodes them. */
import { decode } from "../pixels/decoding.ts";
import { MAX_PIXELS } from "../pixels/picture-file.ts";
import { compare, type Similarity } from "../pixels/similarity.ts";
import type { PictureFile } from "./files.ts";
import type { OpenedPicture } from "./opened.ts";

/** A sentence about the pixels of two pictures, as the command line prints it. */
export async function comparePixels(one: OpenedPicture, other: OpenedPicture): Promise<string> {
  const tooLarge = [one.file, other.file].find((file) => !isDrawable(file));
  if (tooLarge !== undefined) {
    const size = `${tooLarge.widthPx}×${tooLarge.heightPx}`;
    return `pixels: cannot be compared: one of them has ${size} pixels`;
  }
  try {
    const [first, second] = [await decode(one.data), await decode(other.data)];
    return sentence(compare(first, second, isSameFile(one.data, other.data)));
  } catch (error) {
    if (error instanceof RangeError) return `pixels: ${error.message}, so they are not compared`;
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

function sentence({ samePixels, identical, psnrDb, ssim, largestDifference }: Similarity): string {
  if (samePixels) return `pixels: the same${identical ? ", and so is every byte" : ""}`;
  return `pixels: PSNR ${psnrDb.toFixed(2)} dB, SSIM ${ssim.toFixed(4)}, largest difference ${largestDifference} of 255`;
}

function isSameFile(one: Uint8Array, other: Uint8Array): boolean {
  return one.length === other.length && one.every((byte, at) => byte === other[at]);
}
