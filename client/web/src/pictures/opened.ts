/** A picture's file, opened: its bytes, what it says of itself, and what is known of how it was drawn. */
import { parametersFacts } from "./a1111.ts";
import { comfyuiFacts } from "./comfyui.ts";
import { type Fact, fact, getFact, isOurs, isSame, namesOf, type PictureFacts, shown } from "./facts.ts";
import { PARAMETERS_KEY, type PictureFile, RECORD_KEY, readPicture } from "./files.ts";
import { recordedFacts, Unreadable } from "./recorded.ts";

/** One picture, and what is known of it. */
export interface OpenedPicture {
  /** Its file's. */
  readonly name: string;
  readonly data: Uint8Array<ArrayBuffer>;
  readonly file: PictureFile;
  readonly facts: PictureFacts;
}

/**
 * Reads a picture.
 *
 * @throws NoPicture it cannot be read; a sentence for people that names no file.
 */
export async function openPicture(name: string, data: Uint8Array<ArrayBuffer>): Promise<OpenedPicture> {
  const file = await readPicture(data);
  return { name, data, file, facts: sized(factsOf(file), file) };
}

/** What is known of a picture, line by line, as the command line prints it. */
export function explanation({ name, file, facts }: OpenedPicture): string[] {
  const drawnBy = facts.program ? `drawn by ${facts.program}` : "nobody says by what it was drawn";
  const head = `${name}: ${file.kind}, ${file.widthPx}×${file.heightPx}, ${drawnBy}`;
  if (!facts.program) return [head, ...facts.remarks.map((remark) => `  ${remark}`)];
  return [
    head,
    ...namesOf(facts).flatMap((known) => {
      const found = getFact(facts, known);
      if (found === undefined) return [];
      return [`  ${known}: ${shown(found)}${found.note ? `  (${found.note})` : ""}`];
    }),
    ...facts.remarks.map((remark) => `  note: ${remark}`),
  ];
}

function factsOf({ texts }: PictureFile): PictureFacts {
  const broken: string[] = [];
  const record = texts.get(RECORD_KEY);
  if (record !== undefined) {
    try {
      return recordedFacts(record);
    } catch (error) {
      if (!(error instanceof Unreadable)) throw error;
      broken.push(error.message);
    }
  }
  const parameters = texts.get(PARAMETERS_KEY);
  const found = comfyuiFacts(texts) ?? (parameters === undefined ? undefined : parametersFacts(parameters));
  if (found !== undefined) return { ...found, remarks: [...broken, ...found.remarks] };
  const remarks = [...broken, "it does not say what it was drawn with"];
  return { program: "", facts: new Map(), request: undefined, remarks, urls: [] };
}

/** The size that was drawn is the file's, unless both are told and differ. */
function sized(found: PictureFacts, file: PictureFile): PictureFacts {
  const facts = new Map<string, Fact>(found.facts);
  const remarks = [...found.remarks];
  if (found.program && !isOurs(found) && !facts.has("output.format")) {
    facts.set("output.format", fact(file.kind.toLowerCase()));
  }
  for (const [name, side] of [
    ["width", file.widthPx],
    ["height", file.heightPx],
  ] as const) {
    const pixels = BigInt(side);
    const told = facts.get(name);
    if (told?.value === undefined) {
      facts.set(name, fact(pixels, "the file's"));
    } else if (!isSame(told.value, pixels)) {
      remarks.push(`the file's ${name} is ${side}, and it says ${shown(told)}: it was resized, or floored`);
      if (!isOurs(found)) facts.set(name, fact(pixels, `the file's; ${shown(told)} was asked for`));
    }
  }
  return { ...found, facts, remarks };
}
