/** What differs between two pictures, field by field. */
import { compared, type Fact, getFact, inOrder, isSame, namesOf, type PictureFacts, shown } from "./facts.ts";

const NOT_THERE = "none";

/** One field of two pictures. */
export interface Difference {
  readonly name: string;
  /** As people read them. */
  readonly first: string;
  readonly second: string;
  /** Whether both are known and not the same. */
  readonly differs: boolean;
  /** Whether both are known. */
  readonly isKnown: boolean;
  readonly note: string;
}

/** All fields that one of them has, the most telling first. */
export function compareFacts(first: PictureFacts, second: PictureFacts): Difference[] {
  return inOrder([...namesOf(first), ...namesOf(second)])
    .filter((name) => !isFolded(name, first, second) && !isImplied(name, first, second))
    .map((name) =>
      name === "versions"
        ? versionsOf(first, second)
        : compare(name, getFact(first, name), getFact(second, name)),
    );
}

/** Whether a field is told without being asked for all: it differs, or only one of them tells it. */
export function isTold({ differs, isKnown, first, second }: Difference): boolean {
  return differs || (!isKnown && first !== second);
}

/** Line by line, as the command line prints them: those that are told, or all, without notes at equal ones. */
export function linesOf(differences: readonly Difference[], isAll: boolean): string[] {
  return differences
    .filter((difference) => isAll || isTold(difference))
    .map((difference) => lineOf(isTold(difference) ? difference : { ...difference, note: "" }));
}

/** `NAME: A → B`, or one value where they are the same. */
export function lineOf({ name, first, second, differs, note }: Difference): string {
  const values = first === second && !differs ? first : `${first} → ${second}`;
  return `${name}: ${values}${note ? `  (${note})` : ""}`;
}

function compare(name: string, one: Fact | undefined, other: Fact | undefined): Difference {
  const facts = [one, other].filter((found) => found !== undefined);
  const isKnown = facts.every(({ value }) => value !== undefined);
  const [first, second] = [one, other].map((found) => found && compared(found));
  return {
    name,
    first: one ? shown(one) : NOT_THERE,
    second: other ? shown(other) : NOT_THERE,
    differs: isKnown && (facts.length === 1 || !isSame(first, second)),
    isKnown,
    note: [...new Set(facts.map(({ note }) => note).filter((note) => note !== ""))].join("; "),
  };
}

function tellsVersions({ facts }: PictureFacts): boolean {
  return [...facts.keys()].some((name) => name.startsWith("versions."));
}

/** Versions one by one are told only where both tell them so. */
function isFolded(name: string, first: PictureFacts, second: PictureFacts): boolean {
  const count = [first, second].filter(tellsVersions).length;
  return name === "versions" ? count === 2 : name.startsWith("versions.") && count === 1;
}

/** Both sides of the one line about versions, where one of them tells of each by itself. */
function versionsOf(one: PictureFacts, other: PictureFacts): Difference {
  const [first = "", second = ""] = [one, other].map((picture) => {
    const each = [...picture.facts].filter(([name]) => name.startsWith("versions."));
    const together = getFact(picture, "versions");
    return (
      each.map(([name, known]) => `${name.slice("versions.".length)} ${shown(known)}`).join(", ") ||
      (together ? shown(together) : "unknown")
    );
  });
  return { name: "versions", first, second, differs: false, isKnown: false, note: "" };
}

/** Of an adapter that only one of them has, one line is enough. */
function isImplied(name: string, first: PictureFacts, second: PictureFacts): boolean {
  if (!name.startsWith("loras.") || name.endsWith(".path")) return false;
  const path = `${name.slice(0, name.lastIndexOf("."))}.path`;
  return first.facts.has(path) !== second.facts.has(path);
}
