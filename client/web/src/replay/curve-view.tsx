/** The curve of similarity over the steps of the training: each sample a point, the median of each step a line. */
import { useEffect, useRef, useState } from "preact/hooks";
import { SAME_DB } from "../pixels/similarity.ts";
import { type CurvePoint, nearness } from "./facts.ts";
import type { Result } from "./session.ts";
import { keyOf } from "./session.ts";

const HEIGHT = 220;
const [LEFT, RIGHT, TOP, BOTTOM] = [48, 12, 34, 30];
/** What is closer is drawn here; equal pixels above. */
const TOP_DB = 60;
/** As much room as the number of a step takes. */
const LABEL_PX = 64;

interface Props {
  readonly results: readonly Result[];
  readonly points: readonly CurvePoint[];
  readonly minPsnrDb: number;
}

export function CurveView({ results, points, minPsnrDb }: Props) {
  const place = useRef<HTMLDivElement>(null);
  const [width, setWidth] = useState(600);
  useEffect(() => {
    const observer = new ResizeObserver(([entry]) =>
      setWidth(Math.max(200, entry?.contentRect.width ?? 600)),
    );
    if (place.current) observer.observe(place.current);
    return () => observer.disconnect();
  }, []);
  const drawn = results.filter(({ similarity }) => similarity !== undefined);
  const lowest = Math.min(minPsnrDb, ...points.map(({ lowestPsnrDb }) => lowestPsnrDb));
  const floor = Math.max(0, Math.floor((lowest - 3) / 10) * 10);
  const last = Math.max(1, ...points.map(({ step }) => step));
  const x = (step: number): number => LEFT + 8 + ((width - LEFT - RIGHT - 16) * step) / last;
  const y = (psnrDb: number): number => {
    if (psnrDb >= SAME_DB) return TOP / 2 + 2;
    const share = (Math.min(psnrDb, TOP_DB) - floor) / (TOP_DB - floor);
    return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP - 6) * share;
  };
  const marks = Array.from({ length: (TOP_DB - floor) / 10 + 1 }, (_, number) => floor + 10 * number);
  const labels = some(
    points.map(({ step }) => step),
    Math.max(2, Math.floor((width - LEFT - RIGHT) / LABEL_PX)),
  );
  return (
    <div ref={place} class="curve-place">
      <svg
        class="curve"
        width={width}
        height={HEIGHT}
        viewBox={`0 0 ${width} ${HEIGHT}`}
        role="img"
        aria-label="Similarity to the trainer's pictures over the steps of the training"
      >
        <rect class="band" x={LEFT} y="6" width={width - LEFT - RIGHT} height={TOP - 8} rx="4" />
        <text x={LEFT - 6} y={TOP / 2 + 6} text-anchor="end">
          same
        </text>
        {marks.map((value) => (
          <g key={value}>
            <line class="grid" x1={LEFT} x2={width - RIGHT} y1={y(value)} y2={y(value)} />
            <text x={LEFT - 6} y={y(value) + 4} text-anchor="end">
              {value} dB
            </text>
          </g>
        ))}
        {labels.map((step) => (
          <text key={step} x={x(step)} y={HEIGHT - 8} text-anchor="middle">
            {step}
          </text>
        ))}
        <line class="limit" x1={LEFT} x2={width - RIGHT} y1={y(minPsnrDb)} y2={y(minPsnrDb)} />
        {points.length > 1 && (
          <polyline
            class="median"
            points={points.map(({ step, medianPsnrDb }) => `${x(step)},${y(medianPsnrDb)}`).join(" ")}
          />
        )}
        {drawn.map((result) => {
          const { file } = result.row;
          const value = result.similarity?.psnrDb ?? 0;
          const kind = result.similarity?.samePixels ? "identical" : value < minPsnrDb ? "below" : "";
          return (
            <circle key={keyOf(file)} class={kind} cx={x(file.step)} cy={y(value)} r="4.5">
              <title>{`step ${file.step}, sample ${file.index}: ${nearness(result)}`}</title>
            </circle>
          );
        })}
      </svg>
    </div>
  );
}

/** So few of the steps that their labels do not touch, the first and the last among them. */
function some(steps: readonly number[], most: number): number[] {
  if (steps.length <= most) return [...steps];
  const picked = Array.from(
    { length: most },
    (_, number) => steps[Math.round((number * (steps.length - 1)) / (most - 1))],
  );
  return [...new Set(picked)].filter((step) => step !== undefined);
}
