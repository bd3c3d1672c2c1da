/** How alike two pictures are, from their pixels. The same numbers as the Python client's. */

/** PSNR of equal pixels, which have none. */
export const SAME_DB = 100;
const WINDOW_PX = 8;
const STRIDE_PX = 4;
const C1 = (0.01 * 255) ** 2;
const C2 = (0.03 * 255) ** 2;

/** A picture's pixels: red, green, blue and an opacity that is not looked at, row by row. */
export interface Pixels {
  readonly width: number;
  readonly height: number;
  readonly data: Uint8ClampedArray | Uint8Array;
}

/** How alike two pictures of one size are. */
export interface Similarity {
  /** Every byte of the files. */
  readonly identical: boolean;
  readonly samePixels: boolean;
  /** Over red, green and blue; `SAME_DB` where the pixels are equal. */
  readonly psnrDb: number;
  /** Structural similarity of the brightness, -1 to 1. */
  readonly ssim: number;
  /** Of one channel of one pixel, 0 to 255. */
  readonly largestDifference: number;
}

/**
 * Measures two pictures.
 *
 * @throws RangeError they have different sizes.
 */
export function compare(first: Pixels, second: Pixels, identical: boolean): Similarity {
  if (first.width !== second.width || first.height !== second.height)
    throw new RangeError(`${first.width}×${first.height} beside ${second.width}×${second.height}`);
  let squares = 0;
  let largestDifference = 0;
  for (let at = 0; at < first.data.length; at++) {
    if (at % 4 === 3) continue;
    const difference = Math.abs((first.data[at] ?? 0) - (second.data[at] ?? 0));
    squares += difference * difference;
    if (difference > largestDifference) largestDifference = difference;
  }
  return {
    identical,
    samePixels: largestDifference === 0,
    psnrDb: psnrDb(squares, first.width * first.height * 3),
    ssim: ssim(first, second),
    largestDifference,
  };
}

/** Peak signal to noise ratio of a sum of squared differences of `count` values 0 to 255, in decibels. */
function psnrDb(squares: number, count: number): number {
  return squares === 0 ? SAME_DB : Math.min(SAME_DB, 10 * Math.log10((255 ** 2 * count) / squares));
}

/**
 * Structural similarity of the brightness, over windows of 8×8 pixels every 4 pixels.
 *
 * Wang, Bovik, Sheikh, Simoncelli 2004, with ffmpeg's windows. A picture smaller than a window is one window.
 */
function ssim(first: Pixels, second: Pixels): number {
  const { width, height } = first;
  const [a, b] = [brightness(first), brightness(second)];
  const [across, down] = [Math.min(WINDOW_PX, width), Math.min(WINDOW_PX, height)];
  let total = 0;
  let count = 0;
  for (let top = 0; top + down <= height; top += STRIDE_PX) {
    for (let left = 0; left + across <= width; left += STRIDE_PX) {
      let [sumA, sumB, squareA, squareB, product] = [0, 0, 0, 0, 0];
      for (let y = top; y < top + down; y++) {
        for (let at = y * width + left; at < y * width + left + across; at++) {
          const [valueA, valueB] = [a[at] ?? 0, b[at] ?? 0];
          sumA += valueA;
          sumB += valueB;
          squareA += valueA * valueA;
          squareB += valueB * valueB;
          product += valueA * valueB;
        }
      }
      const size = across * down;
      const [meanA, meanB] = [sumA / size, sumB / size];
      const variances = squareA / size - meanA * meanA + squareB / size - meanB * meanB;
      const covariance = product / size - meanA * meanB;
      total +=
        ((2 * meanA * meanB + C1) * (2 * covariance + C2)) /
        ((meanA * meanA + meanB * meanB + C1) * (variances + C2));
      count += 1;
    }
  }
  return total / count;
}

/** ITU-R 601, rounded as Pillow rounds it. */
function brightness({ width, height, data }: Pixels): Uint8Array {
  const values = new Uint8Array(width * height);
  for (let at = 0; at < values.length; at++) {
    const [red, green, blue] = [data[4 * at] ?? 0, data[4 * at + 1] ?? 0, data[4 * at + 2] ?? 0];
    values[at] = (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16;
  }
  return values;
}
