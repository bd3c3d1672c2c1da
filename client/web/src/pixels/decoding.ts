/** Picture files to pixels, by the browser's own decoder. */
import { broken, pictureHead } from "./picture-file.ts";
import type { Pixels } from "./similarity.ts";

/**
 * The pixels of a picture file.
 *
 * @throws NoPicture it is none, is broken, or too large.
 */
export async function decode(data: Uint8Array<ArrayBuffer>): Promise<Pixels> {
  const { mediaType } = pictureHead(data);
  let bitmap: ImageBitmap;
  try {
    bitmap = await createImageBitmap(new Blob([data], { type: mediaType }), {
      colorSpaceConversion: "none",
      premultiplyAlpha: "none",
    });
  } catch {
    throw broken();
  }
  const { width, height } = bitmap;
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  if (context === null) throw new Error("this browser lends no canvas");
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  return context.getImageData(0, 0, width, height);
}
