/** One sample and its redrawing in full size: a slider between them, side by side, or their difference. */
import { signal } from "@preact/signals";
import { useEffect, useRef } from "preact/hooks";
import { held } from "../drops.ts";
import { bringIntoSight, compareWith, explained } from "../pictures/state.ts";
import { printable } from "../pictures/texts.ts";
import { nearness } from "./facts.ts";
import { drawnOf, openedKey, replaying, shownSamples } from "./replaying.ts";
import { keyOf } from "./session.ts";

type Mode = "slider" | "side by side" | "difference";

const MODES: readonly Mode[] = ["slider", "side by side", "difference"];
/** Smaller pictures are shown enlarged. */
const MIN_SHOWN_PX = 512;
const mode = signal<Mode>("slider");
const position = signal(50);
const gain = signal(8);

export function PairDialog({ openedKey: key }: { openedKey: string }) {
  const dialog = useRef<HTMLDialogElement>(null);
  useEffect(() => dialog.current?.showModal(), []);
  const shown = replaying.value?.samples.get(key)?.value;
  if (shown?.oursUrl === undefined || shown.theirsUrl === undefined) return null;
  const { result, theirsUrl, oursUrl } = shown;
  const { similarity } = result;
  const { file, settings } = result.row;
  const width = settings?.width ?? MIN_SHOWN_PX;
  const height = settings?.height ?? MIN_SHOWN_PX;
  const box = {
    "--ratio": `${width / height}`,
    aspectRatio: `${width} / ${height}`,
    maxWidth: `${Math.max(width, MIN_SHOWN_PX)}px`,
  };
  const name = `Step ${file.step}, sample ${file.index}`;
  return (
    <dialog
      ref={dialog}
      class={held.value === "picture" ? "pair-dialog over" : "pair-dialog"}
      aria-label={name}
      onClose={() => {
        openedKey.value = undefined;
      }}
      onKeyDown={(event) => {
        if (event.target instanceof HTMLInputElement) return;
        if (event.key === "ArrowRight") step(key, 1);
        if (event.key === "ArrowLeft") step(key, -1);
      }}
    >
      <div class="head">
        <h2>
          {name}: {nearness(result)}
        </h2>
        <button type="button" class="quiet" aria-label="Close" onClick={() => dialog.current?.close()}>
          ✕
        </button>
      </div>
      <div class="row tight actions">
        <div role="radiogroup" aria-label="How to compare" class="modes">
          {MODES.map((one) => (
            <label key={one} class="check">
              <input
                type="radio"
                name="pair-mode"
                checked={mode.value === one}
                onChange={() => {
                  mode.value = one;
                }}
              />
              {one}
            </label>
          ))}
        </div>
        <span class="row tight last">
          <button type="button" onClick={() => step(key, -1)}>
            Previous
          </button>
          <button type="button" onClick={() => step(key, 1)}>
            Next
          </button>
        </span>
      </div>
      {mode.value === "side by side" ? (
        <div class="pair">
          <div class="frame" style={box}>
            <img src={theirsUrl} alt="The trainer's" />
          </div>
          <div class="frame" style={box}>
            <img src={oursUrl} alt="Ours" />
          </div>
        </div>
      ) : (
        <div
          class={`frame overlay ${mode.value}`}
          style={mode.value === "difference" ? { ...box, filter: `brightness(${gain.value})` } : box}
          onPointerDown={drag}
          onPointerMove={drag}
        >
          <img src={theirsUrl} alt="The trainer's" draggable={false} />
          <img
            class="over"
            src={oursUrl}
            alt="Ours"
            draggable={false}
            style={mode.value === "slider" ? { clipPath: `inset(0 0 0 ${position.value}%)` } : {}}
          />
          {mode.value === "slider" && (
            <span class="edge" style={{ left: `${position.value}%` }} aria-hidden="true" />
          )}
        </div>
      )}
      {mode.value !== "difference" && (
        <p class="sides hint" style={mode.value === "slider" ? widthOf(box) : {}}>
          <span>the trainer's</span>
          <span>ours</span>
        </p>
      )}
      {mode.value === "slider" && (
        <input
          type="range"
          class="wide"
          style={widthOf(box)}
          min="0"
          max="100"
          step="0.5"
          aria-label="Where our picture begins"
          value={position.value}
          onInput={(event) => {
            position.value = Number(event.currentTarget.value);
          }}
        />
      )}
      {mode.value === "difference" && (
        <label class="row tight gain">
          <span>Difference × {gain.value}</span>
          <input
            type="range"
            min="1"
            max="32"
            aria-label="Amplification"
            value={gain.value}
            onInput={(event) => {
              gain.value = Number(event.currentTarget.value);
            }}
          />
        </label>
      )}
      <Beside sampleKey={key} />
      <dl>
        {similarity && (
          <>
            <dt>Similarity</dt>
            <dd>
              {similarity.samePixels ? "same pixels" : `${similarity.psnrDb.toFixed(2)} dB PSNR`}, SSIM{" "}
              {similarity.ssim.toFixed(4)}, largest difference {similarity.largestDifference} of 255
            </dd>
          </>
        )}
        {settings && (
          <>
            <dt>Prompt</dt>
            <dd>{settings.prompt}</dd>
            {settings.negativePrompt !== "" && (
              <>
                <dt>Negative text</dt>
                <dd>{settings.negativePrompt}</dd>
              </>
            )}
            <dt>Settings</dt>
            <dd>
              {width} × {height}, seed {`${settings.seed}`}, {settings.steps} steps, guidance{" "}
              {settings.guidanceScale}, {result.noiseDraw} noise
            </dd>
          </>
        )}
        <dt>Adapter</dt>
        <dd>
          {result.row.checkpoint === null
            ? "none yet"
            : `${result.row.checkpoint} × ${settings?.networkMultiplier ?? 1}`}
        </dd>
      </dl>
      {result.drawn?.warnings.map((message) => (
        <p key={message} class="warning">
          {message}
        </p>
      ))}
    </dialog>
  );
}

/** The way to a third picture: why does another program's differ from this sample? */
function Beside({ sampleKey }: { sampleKey: string }) {
  const one = explained.value;
  return (
    <div class="row tight">
      {one !== undefined && (
        <button
          type="button"
          onClick={async () => {
            const sample = drawnOf(sampleKey);
            openedKey.value = undefined;
            if (sample !== undefined) await compareWith(sample);
            bringIntoSight();
          }}
        >
          Compare ours with {printable(one.picture.name)}
        </button>
      )}
      <p class="hint">
        Drop {one === undefined ? "a" : "another"} picture here to see what differs between it and ours.
      </p>
    </div>
  );
}

/** Only as wide as the picture. */
function widthOf({ aspectRatio: _, ...box }: Record<string, string>): Record<string, string> {
  return box;
}

/** Moves the edge to where the pointer is. */
function drag(event: PointerEvent & { readonly currentTarget: HTMLElement }): void {
  if (mode.value !== "slider" || event.buttons === 0) return;
  const { left, width } = event.currentTarget.getBoundingClientRect();
  position.value = Math.max(0, Math.min(100, ((event.clientX - left) / width) * 100));
}

/** Opens the pair so many further on. */
function step(key: string, by: number): void {
  const keys = shownSamples.value
    .filter(({ oursUrl }) => oursUrl)
    .map(({ result }) => keyOf(result.row.file));
  const next = keys[(keys.indexOf(key) + by + keys.length) % keys.length];
  if (next !== undefined) openedKey.value = next;
}
