/** Two pictures beside each other: their fields, the most telling first, and their pixels. */
import { useState } from "preact/hooks";
import { FleetingButton, stage } from "../fleeting-button.tsx";
import { type PairedPicture, PairModes, PicturePair } from "../picture-pair.tsx";
import { comparison, endComparison, type ShownPicture } from "./state.ts";
import { printable } from "./texts.ts";

export function ComparisonView() {
  const [isAll, setAll] = useState(false);
  const found = comparison.value;
  if (found === undefined) return null;
  const { first, second, told, all, pixels } = found;
  const lines = isAll ? all : told;
  const [left, right] = [paired(first), paired(second)];
  return (
    <section class="differences" aria-label="Comparison of two pictures">
      <div class="head">
        <h3>
          {printable(first.picture.name)} → {printable(second.picture.name)}
        </h3>
        <FleetingButton heir={stage} onClick={endComparison}>
          Close the comparison
        </FleetingButton>
      </div>
      <label class="check">
        <input type="checkbox" checked={isAll} onChange={(event) => setAll(event.currentTarget.checked)} />
        Equal fields too
      </label>
      {lines.length === 0 && <p>No field differs that is known of both.</p>}
      <ul class="lines" aria-label="What differs">
        {lines.map((line) => (
          <Line key={line} line={printable(line)} isEqual={!told.includes(line)} />
        ))}
      </ul>
      <p role="status">{pixels ?? "pixels: …"}</p>
      {left && right && (
        <>
          <PairModes group="picture-mode" />
          <PicturePair left={left} right={right} label="Where the right picture begins" />
        </>
      )}
    </section>
  );
}

/** `NAME: A → B`, its name first for the eye. */
function Line({ line, isEqual }: { line: string; isEqual: boolean }) {
  const at = line.indexOf(":");
  return (
    <li class={isEqual ? "equal" : ""}>
      <span class="name">{line.slice(0, at + 1)}</span>
      {line.slice(at + 1)}
    </li>
  );
}

function paired({ picture, url }: ShownPicture): PairedPicture | undefined {
  if (url === undefined) return undefined;
  const { widthPx, heightPx } = picture.file;
  const ratio = { aspectRatio: `${widthPx} / ${heightPx}`, "--ratio": widthPx / heightPx };
  return { url, name: printable(picture.name), ratio };
}
