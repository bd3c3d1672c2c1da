/** Two runs in one place, and what differs between what they were asked for. */
import { signal } from "@preact/signals";
import type { Plan } from "chromarpc/web";
import { loras } from "./connection.ts";
import { FleetingButton, stage } from "./fleeting-button.tsx";
import { PairModes, PicturePair } from "./picture-pair.tsx";
import { ratioOf, shortName } from "./run-view.tsx";
import { comparedIds, type Run, runs } from "./runs.ts";

const promptIndex = signal(0);

export function CompareView() {
  const [left, right] = comparedIds.value.map((id) => runs.value.get(id));
  if (left === undefined || right === undefined) return null;
  const count = Math.min(left.pictures.length, right.pictures.length);
  const index = Math.min(promptIndex.value, Math.max(0, count - 1));
  const [leftUrl, rightUrl] = [left, right].map((run) => run.pictures[index]?.imageUrl);
  const [ratio, rightRatio] = [left, right].map((run) => ratioOf(run, index));
  return (
    <article class="run comparison" aria-label="Comparison">
      <div class="row tight actions">
        <PairModes group="mode" />
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
        <FleetingButton
          heir={stage}
          onClick={() => {
            comparedIds.value = [];
          }}
        >
          Close
        </FleetingButton>
      </div>
      {leftUrl && rightUrl ? (
        <PicturePair
          left={{ url: leftUrl, name: "Left run", ratio: ratio ?? {} }}
          right={{ url: rightUrl, name: "Right run", ratio: rightRatio ?? {} }}
          label="Where the right run begins"
        />
      ) : (
        <div class="frame empty" style={ratio}>
          <span class="hint">Fetching the pictures …</span>
        </div>
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
    ["settings", plan.settings],
  ]);
  if (prompt !== undefined) {
    facts.set("prompt", prompt.prompt);
    facts.set("seed", String(prompt.seed));
    facts.set("steps", String(prompt.sampleSteps));
    facts.set("sampler", prompt.sampler);
    facts.set("schedule", prompt.schedule);
    if (prompt.shift !== undefined) facts.set("shift", String(prompt.shift));
    facts.set("guidance", String(prompt.guidanceScale));
    facts.set("size", `${prompt.width} × ${prompt.height}`);
    if (prompt.neg) facts.set("negative text", prompt.neg);
  }
  for (const [name, value] of Object.entries(plan.trainer ?? {}))
    facts.set(`trainer: ${name}`, String(value));
  for (const { path, networkMultiplier } of plan.loras) facts.set(nameOf(path), `× ${networkMultiplier}`);
  return facts;
}
