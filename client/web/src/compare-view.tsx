/** Two runs in one place: one over the other with a slider between them, side by side, or their difference. */
import { signal } from "@preact/signals";
import type { Plan } from "chromarpc/web";
import { loras } from "./connection.ts";
import { shortName } from "./run-view.tsx";
import { comparedIds, type Run, runs } from "./runs.ts";

type Mode = "slider" | "side by side" | "difference";

const MODES: readonly Mode[] = ["slider", "side by side", "difference"];
const mode = signal<Mode>("slider");
const position = signal(50);
const promptIndex = signal(0);

export function CompareView() {
  const [left, right] = comparedIds.value.map((id) => runs.value.get(id));
  if (left === undefined || right === undefined) return null;
  const count = Math.min(left.pictures.length, right.pictures.length);
  const index = Math.min(promptIndex.value, Math.max(0, count - 1));
  const [leftUrl, rightUrl] = [left, right].map((run) => run.pictures[index]?.imageUrl);
  const planned = left.plan?.prompts[index];
  const ratio = planned
    ? { aspectRatio: `${planned.width} / ${planned.height}`, "--ratio": planned.width / planned.height }
    : {};
  return (
    <article class="run comparison" aria-label="Comparison">
      <div class="row tight actions">
        <div role="radiogroup" aria-label="How to compare" class="modes">
          {MODES.map((name) => (
            <label key={name} class="check">
              <input
                type="radio"
                name="mode"
                checked={mode.value === name}
                onChange={() => {
                  mode.value = name;
                }}
              />
              {name}
            </label>
          ))}
        </div>
        {count > 1 && (
          <label>
            Picture{" "}
            <select
              value={index}
              onChange={(event) => {
                promptIndex.value = Number(event.currentTarget.value);
              }}
            >
              {Array.from({ length: count }, (_, number) => (
                <option key={number} value={number}>
                  {number + 1}
                </option>
              ))}
            </select>
          </label>
        )}
        <button
          type="button"
          onClick={() => {
            comparedIds.value = [...comparedIds.value].reverse();
          }}
        >
          Swap
        </button>
        <button
          type="button"
          onClick={() => {
            comparedIds.value = [];
          }}
        >
          Close
        </button>
      </div>
      {leftUrl && rightUrl ? (
        mode.value === "side by side" ? (
          <div class="pictures several">
            <img class="final" src={leftUrl} alt="Left run" />
            <img class="final" src={rightUrl} alt="Right run" />
          </div>
        ) : (
          <div class={`frame overlay ${mode.value}`} style={ratio}>
            <img class="final" src={leftUrl} alt="Left run" />
            <img
              class="final over"
              src={rightUrl}
              alt="Right run"
              style={mode.value === "slider" ? { clipPath: `inset(0 0 0 ${position.value}%)` } : {}}
            />
            {mode.value === "slider" && (
              <span class="edge" style={{ left: `${position.value}%` }} aria-hidden="true" />
            )}
          </div>
        )
      ) : (
        <div class="frame empty" style={ratio}>
          <span class="hint">Fetching the pictures …</span>
        </div>
      )}
      {mode.value === "slider" && (
        <input
          type="range"
          class="wide"
          min="0"
          max="100"
          step="0.5"
          aria-label="Where the right run begins"
          value={position.value}
          onInput={(event) => {
            position.value = Number(event.currentTarget.value);
          }}
        />
      )}
      <Differences left={left} right={right} index={index} />
    </article>
  );
}

function Differences({ left, right, index }: { left: Run; right: Run; index: number }) {
  const [one, other] = [left.plan, right.plan].map((plan) =>
    plan ? factsOf(plan, index) : new Map<string, string>(),
  );
  const names = [...new Set([...(one?.keys() ?? []), ...(other?.keys() ?? [])])];
  const differing = names.filter((name) => one?.get(name) !== other?.get(name));
  if (differing.length === 0) return <p class="hint">Both were asked for the same.</p>;
  return (
    <table>
      <thead>
        <tr>
          <th scope="col">What differs</th>
          <th scope="col">left</th>
          <th scope="col">right</th>
        </tr>
      </thead>
      <tbody>
        {differing.map((name) => (
          <tr key={name}>
            <th scope="row">{name}</th>
            <td>{one?.get(name) ?? "—"}</td>
            <td>{other?.get(name) ?? "—"}</td>
          </tr>
        ))}
      </tbody>
    </table>
  );
}

/** What whoever uploaded it called it. */
function nameOf(path: string): string {
  return loras.value.find((lora) => lora.path === path)?.filename || shortName(path);
}

function factsOf(plan: Plan, index: number): Map<string, string> {
  const prompt = plan.prompts[index];
  const facts = new Map<string, string>([
    ["model", plan.servedModel],
    ["profile", plan.profile],
  ]);
  if (prompt !== undefined) {
    facts.set("prompt", prompt.prompt);
    facts.set("seed", String(prompt.seed));
    facts.set("steps", String(prompt.sampleSteps));
    facts.set("guidance", String(prompt.guidanceScale));
    facts.set("size", `${prompt.width} × ${prompt.height}`);
    if (prompt.neg) facts.set("negative text", prompt.neg);
  }
  for (const [name, value] of Object.entries(plan.trainer ?? {}))
    facts.set(`trainer: ${name}`, String(value));
  for (const { path, networkMultiplier } of plan.loras) facts.set(nameOf(path), `× ${networkMultiplier}`);
  return facts;
}
