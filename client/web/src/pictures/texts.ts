/** Texts and numbers as the command line reads and writes them, so that both tell the same of one picture. */

const FRACTION = /^[+-]?(?:\d+(?:_\d+)*\.?(?:\d+(?:_\d+)*)?|\.\d+(?:_\d+)*)(?:e[+-]?\d+(?:_\d+)*)?$/i;

/** Without white space around it. */
export function strip(text: string): string {
  let [begin, end] = [0, text.length];
  while (begin < end && isSpace(text.charAt(begin))) begin += 1;
  while (begin < end && isSpace(text.charAt(end - 1))) end -= 1;
  return text.slice(begin, end);
}

/** What Python takes for white space: some controls more than JavaScript, and no byte order mark. */
function isSpace(character: string): boolean {
  const isControl = (character >= "\x1c" && character <= "\x1f") || character === "\x85";
  return isControl || (character !== "\ufeff" && /\s/.test(character));
}

/** What stands before and after the first mark; `after` is undefined where there is none. */
export function partition(text: string, mark: string): { before: string; after: string | undefined } {
  const at = text.indexOf(mark);
  if (at < 0) return { before: text, after: undefined };
  return { before: text.slice(0, at), after: text.slice(at + mark.length) };
}

/** The shortest decimal that reads back as the same number, with a point or an exponent. */
export function fractionText(value: number): string {
  if (Number.isNaN(value)) return "nan";
  if (!Number.isFinite(value)) return value > 0 ? "inf" : "-inf";
  const [digits = "0", power = "0"] = value.toExponential().split("e");
  const exponent = Number(power);
  if (Object.is(value, -0)) return "-0.0";
  if (exponent < -4 || exponent >= 16) {
    return `${digits}e${exponent < 0 ? "-" : "+"}${String(Math.abs(exponent)).padStart(2, "0")}`;
  }
  const plain = String(value);
  return plain.includes(".") ? plain : `${plain}.0`;
}

/** A finite number out of a text, or none. */
export function fractionOf(text: string): number | undefined {
  const plain = strip(text);
  if (!FRACTION.test(plain)) return undefined;
  const value = Number(plain.replaceAll("_", ""));
  return Number.isFinite(value) ? value : undefined;
}

/** One byte a character. */
export function latin1(data: Uint8Array): string {
  let text = "";
  for (let at = 0; at < data.length; at += 4096) text += String.fromCharCode(...data.subarray(at, at + 4096));
  return text;
}

/** With U+FFFD for what is none. */
export function utf8(data: Uint8Array): string {
  return new TextDecoder("utf-8", { ignoreBOM: true }).decode(data);
}

export function isUtf8(data: Uint8Array): boolean {
  try {
    new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(data);
    return true;
  } catch {
    return false;
  }
}

/** The order of characters, not of JavaScript's halves of them. */
export function compareTexts(one: string, other: string): number {
  const [first, second] = [[...one], [...other]];
  for (let at = 0; at < Math.min(first.length, second.length); at++) {
    const step = (first[at]?.codePointAt(0) ?? 0) - (second[at]?.codePointAt(0) ?? 0);
    if (step !== 0) return step;
  }
  return first.length - second.length;
}

/** Without what would steer whatever shows it, such as the direction of writing. */
export function printable(text: string): string {
  return text.replace(/[\p{C}\p{Z}]/gu, (found) => (found === " " || found === "\n" ? found : "\ufffd"));
}
