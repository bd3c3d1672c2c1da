/** Two pictures in one place: one over the other with a slider between them, side by side, or their difference. */
import { signal } from "@preact/signals";
import type { CSSProperties } from "preact";

type Mode = "slider" | "side by side" | "difference";

const MODES: readonly Mode[] = ["slider", "side by side", "difference"];
const mode = signal<Mode>("slider");
const position = signal(50);

/** One of the two. */
export interface PairedPicture {
  readonly url: string;
  readonly name: string;
  /** Its shape, as a frame's style. */
  readonly ratio: CSSProperties;
}

/** How the two are compared, to choose from. */
export function PairModes({ group }: { group: string }) {
  return (
    <div role="radiogroup" aria-label="How to compare" class="modes">
      {MODES.map((name) => (
        <label key={name} class="check">
          <input
            type="radio"
            name={group}
            checked={mode.value === name}
            onChange={() => {
              mode.value = name;
            }}
          />
          {name}
        </label>
      ))}
    </div>
  );
}

interface PairProps {
  readonly left: PairedPicture;
  readonly right: PairedPicture;
  /** Of the slider. */
  readonly label: string;
}

export function PicturePair({ left, right, label }: PairProps) {
  if (mode.value === "side by side") {
    return (
      <div class="pair">
        {[left, right].map(({ url, name, ratio }) => (
          <div key={name} class="frame" style={ratio}>
            <img class="final" src={url} alt={name} />
          </div>
        ))}
      </div>
    );
  }
  // The edge lies above the slider's thumb.
  const { aspectRatio: _, ...width } = left.ratio;
  const isSlider = mode.value === "slider";
  return (
    <>
      <div class={`frame overlay ${mode.value}`} style={left.ratio}>
        <img class="final" src={left.url} alt={left.name} />
        <img
          class="final over"
          src={right.url}
          alt={right.name}
          style={isSlider ? { clipPath: `inset(0 0 0 ${position.value}%)` } : {}}
        />
        {isSlider && <span class="edge" style={{ left: `${position.value}%` }} aria-hidden="true" />}
      </div>
      {isSlider && (
        <input
          type="range"
          class="wide"
          style={width}
          min="0"
          max="100"
          step="0.5"
          aria-label={label}
          value={position.value}
          onInput={(event) => {
            position.value = Number(event.currentTarget.value);
          }}
        />
      )}
    </>
  );
}
