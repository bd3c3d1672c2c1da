/** Which noise draw a run's trainer had, and whether its base model is the same: samples without adapter tell. */
import type { NoiseDraw } from "chromarpc/web";

export const DRAWS: readonly NoiseDraw[] = ["float32", "legacy"];
/** From here on a picture is the same one. */
const MATCH_DB = 30;
const ROUGH_MATCH_DB = 20;
/** How much closer the right draw is than the other, where other things differ as well. */
const CLEAR_MARGIN_DB = 8;
/** Small or plain pictures may be alike in both draws; then another one is tried. */
const DECIDING_MARGIN_DB = 3;
export const MOST_TRIED = 3;

/** One sample, drawn with both noise draws. */
export interface Trial {
  readonly step: number;
  readonly index: number;
  /** Of what could be drawn. */
  readonly psnrDb: ReadonlyMap<NoiseDraw, number>;
}

/** What the trials say. */
export interface Calibration {
  readonly trials: readonly Trial[];
  /** The one that matches; without one, what the date of the samples suggests. */
  readonly noiseDraw: NoiseDraw;
  /** Null where nothing could be tried. */
  readonly matches: boolean | null;
  /** Whether only samples with an adapter could be tried. */
  readonly withAdapter: boolean;
}

/** Whether no other sample has to be tried. */
export function decides(trial: Trial): boolean {
  return matches(trial) && marginDb(trial) >= DECIDING_MARGIN_DB;
}

/** The result of trials, the last of which ended them. */
export function judge(trials: readonly Trial[], likely: NoiseDraw, withAdapter: boolean): Calibration {
  const tried = trials.filter(({ psnrDb }) => psnrDb.size > 0);
  if (tried.length === 0) return { trials, noiseDraw: likely, matches: null, withAdapter };
  const matching = largest(tried.filter(matches), (trial) => [marginDb(trial)]);
  const draw = matching && largest([...matching.psnrDb], ([, value]) => [value])?.[0];
  return { trials, noiseDraw: draw ?? likely, matches: matching !== undefined, withAdapter };
}

/** The result, for people. */
export function sentenceOf(calibration: Calibration): string {
  const { noiseDraw, trials, withAdapter } = calibration;
  if (calibration.matches === null)
    return `No sample could be tried: the noise draw (${noiseDraw}) is taken from the samples' date.`;
  const trial = largest(trials, (one) => [
    Number(matches(one)),
    matches(one) ? marginDb(one) : closestDb(one),
  ]);
  const measured = [...(trial?.psnrDb ?? [])]
    .sort(([a], [b]) => (a < b ? -1 : 1))
    .map(([draw, value]) => `${draw} ${value.toFixed(1)} dB`)
    .join(", ");
  const where = `sample ${trial?.index} of step ${trial?.step}: ${measured}`;
  if (calibration.matches) return `The noise draw is ${noiseDraw} (${where}).`;
  if (withAdapter)
    return `Neither noise draw gives the trainer's picture (${where}): base, settings or adapter differ.`;
  return (
    `Neither noise draw gives the trainer's picture of step 0, where there is no adapter yet (${where}): ` +
    "the base model or the settings differ, not the LoRA."
  );
}

function closestDb({ psnrDb }: Trial): number {
  return Math.max(0, ...psnrDb.values());
}

/** How much closer the closer draw is than the other; 0 where only one could be drawn. */
function marginDb({ psnrDb }: Trial): number {
  return psnrDb.size > 1 ? Math.max(...psnrDb.values()) - Math.min(...psnrDb.values()) : 0;
}

/** Whether the closer draw is the trainer's picture. */
function matches(trial: Trial): boolean {
  const closest = closestDb(trial);
  return closest >= MATCH_DB || (closest >= ROUGH_MATCH_DB && marginDb(trial) >= CLEAR_MARGIN_DB);
}

/** The first of the largest. */
function largest<T>(items: readonly T[], rank: (item: T) => readonly number[]): T | undefined {
  let best: T | undefined;
  for (const item of items) if (best === undefined || isBefore(rank(best), rank(item))) best = item;
  return best;
}

function isBefore(a: readonly number[], b: readonly number[]): boolean {
  const at = a.findIndex((value, index) => value !== b[index]);
  return at >= 0 && (a[at] ?? 0) < (b[at] ?? 0);
}
