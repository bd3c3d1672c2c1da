/** What a replay came to, in words: the same sentences as the Python client's report. */

import { SAME_DB } from "../pixels/similarity.ts";
import type { Result } from "./session.ts";

/** From here on hardly anybody sees a difference. */
const EYE_DB = 40;
const MAX_REASON_CHARS = 80;

/** The numbers of a replay. */
export interface Summary {
  readonly samples: number;
  readonly drawn: number;
  readonly notDrawn: number;
  /** Reasons without their details, the most frequent first. */
  readonly reasons: ReadonlyMap<string, number>;
  readonly identical: number;
  readonly belowMinPsnr: number;
  readonly minPsnrDb: number;
  readonly medianPsnrDb: number | null;
  readonly lowestPsnrDb: number | null;
}

/** One step's similarity. */
export interface CurvePoint {
  readonly step: number;
  readonly medianPsnrDb: number;
  readonly lowestPsnrDb: number;
}

/** The numbers of results, none of which is still to come. */
export function summaryOf(results: readonly Result[], minPsnrDb: number): Summary {
  const values = results.flatMap(({ similarity }) => (similarity ? [similarity.psnrDb] : []));
  const reasons = new Map<string, number>();
  for (const { similarity, reason } of results) {
    const short = shortReason(reason);
    if (similarity === undefined) reasons.set(short, (reasons.get(short) ?? 0) + 1);
  }
  return {
    samples: results.length,
    drawn: values.length,
    notDrawn: results.length - values.length,
    reasons: new Map([...reasons].sort(([, a], [, b]) => b - a)),
    identical: results.filter(({ similarity }) => similarity?.identical).length,
    belowMinPsnr: values.filter((value) => value < minPsnrDb).length,
    minPsnrDb,
    medianPsnrDb: values.length > 0 ? medianOf(values) : null,
    lowestPsnrDb: values.length > 0 ? Math.min(...values) : null,
  };
}

/** What was drawn, what was not, and why. */
export function countLine({ samples, drawn, notDrawn, reasons }: Summary): string {
  let line = `${drawn} of ${samples} ${samples === 1 ? "sample" : "samples"} drawn again`;
  if (notDrawn > 0) {
    const said = [...reasons].map(([reason, count]) => (reasons.size > 1 ? `${count} ${reason}` : reason));
    line += `; ${notDrawn} not: ${said.join(", ")}`;
  }
  return `${line}.`;
}

/** How alike they are, for a stranger. */
export function verdictLine(summary: Summary): string {
  const { drawn, identical, belowMinPsnr, minPsnrDb, medianPsnrDb, lowestPsnrDb } = summary;
  if (drawn === 0 || medianPsnrDb === null || lowestPsnrDb === null) return "No sample could be drawn again.";
  if (identical === drawn)
    return `${drawn > 1 ? "Every picture is" : "The picture is"} the trainer's own, byte for byte.`;
  const parts = identical > 0 ? [`${identical} identical to the trainer's file, byte for byte`] : [];
  parts.push(`median ${decibels(medianPsnrDb)}, lowest ${decibels(lowestPsnrDb)}`);
  parts.push(`${belowMinPsnr > 0 ? belowMinPsnr : "none"} below ${minPsnrDb} dB`);
  const seen =
    belowMinPsnr > 0
      ? "Some differ visibly"
      : lowestPsnrDb >= EYE_DB
        ? "The same to the eye"
        : "Alike, with small differences";
  return `${seen}: ${parts.join("; ")}.`;
}

/** How near a picture is, in a few words. */
export function nearness({ similarity }: Result): string {
  if (similarity === undefined) return "";
  if (similarity.identical) return "identical";
  return similarity.samePixels ? "same pixels" : `${similarity.psnrDb.toFixed(1)} dB`;
}

/** The similarity of each step of which something was drawn. */
export function curveOf(results: readonly Result[]): CurvePoint[] {
  const steps = new Map<number, number[]>();
  for (const { row, similarity } of results)
    if (similarity !== undefined)
      steps.set(row.file.step, [...(steps.get(row.file.step) ?? []), similarity.psnrDb]);
  return [...steps]
    .sort(([a], [b]) => a - b)
    .map(([step, values]) => ({
      step,
      medianPsnrDb: medianOf(values),
      lowestPsnrDb: Math.min(...values),
    }));
}

/** A number of decibels, for people. */
export function decibels(value: number): string {
  return value >= SAME_DB ? "identical pixels" : `${value.toFixed(1)} dB`;
}

/** A reason without its details, so that equal ones are counted together. */
export function shortReason(reason: string | null): string {
  const [text = ""] = (reason || "not drawn").split(/ \(|: |; /);
  return text.length <= MAX_REASON_CHARS ? text : `${text.slice(0, MAX_REASON_CHARS - 1)}…`;
}

/** The lower one of two in the middle: a value that was measured. */
function medianOf(values: readonly number[]): number {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.floor((sorted.length - 1) / 2)] ?? Number.NaN;
}
