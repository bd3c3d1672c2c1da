/** A training run, redrawn: the button that takes its folder, and the grid of pairs that fills. */
import { useEffect, useRef } from "preact/hooks";
import { FleetingButton, stage } from "../fleeting-button.tsx";
import { CurveView } from "./curve-view.tsx";
import { countLine, curveOf, decibels, nearness, summaryOf, verdictLine } from "./facts.ts";
import { PairDialog } from "./pair-dialog.tsx";
import {
  begin,
  close,
  goOn,
  nameOf,
  openedKey,
  progress,
  type Replaying,
  replaying,
  type Shown,
  shownSamples,
  starts,
  stop,
} from "./replaying.ts";
import { chosenFolder } from "./run-folder.ts";
import { keyOf, MIN_PSNR_DB } from "./session.ts";

/** Where a folder is given. */
export function ReplayButton() {
  return <FolderButton text="Redraw a training run …" label="Redraw a training run" />;
}

function FolderButton({ text, label }: { text: string; label: string }) {
  return (
    <label class="button quiet">
      {text}
      <input
        type="file"
        class="visually-hidden"
        aria-label={label}
        // @ts-expect-error Not in the standard, and in every browser.
        webkitdirectory
        onChange={(event) => {
          const files = [...(event.currentTarget.files ?? [])];
          event.currentTarget.value = "";
          if (files.length > 0) void begin(chosenFolder(files));
        }}
      />
    </label>
  );
}

/** The replay; nothing where there is none. */
export function ReplayView() {
  const now = replaying.value;
  const article = useRef<HTMLElement>(null);
  const given = starts.value;
  useEffect(() => {
    const isCalm = matchMedia("(prefers-reduced-motion: reduce)").matches;
    if (given > 0)
      article.current?.scrollIntoView({ behavior: isCalm ? "auto" : "smooth", block: "nearest" });
  }, [given]);
  if (now === undefined) return null;
  return (
    <article ref={article} class="run replay" aria-label="Training run, redrawn">
      <Head now={now} />
      {now.phase === "working" && <ProgressLines />}
      {now.models.length > 0 && <ModelChoice models={now.models} />}
      {now.matches === false && !now.options.drawAnyway && now.phase === "done" && (
        <p class="warning">
          {now.assumptions.find((said) => said.startsWith("Neither"))}{" "}
          <FleetingButton heir={stage} onClick={() => void goOn({ drawAnyway: true })}>
            Draw all of them anyway
          </FleetingButton>
        </p>
      )}
      <Similarity />
      <Resolved now={now} />
      <Grid now={now} />
      {openedKey.value !== undefined && <PairDialog openedKey={openedKey.value} />}
    </article>
  );
}

function Head({ now }: { now: Replaying }) {
  const isWorking = now.phase === "working";
  return (
    <div class="progress">
      <div class="head">
        <h2 class="replay-name">{now.name || "A training run"}</h2>
        <span class="row tight">
          {(now.phase === "stopped" || now.phase === "failed") && (
            <FleetingButton heir={stage} onClick={() => void goOn()}>
              Go on
            </FleetingButton>
          )}
          {isWorking && (
            <FleetingButton heir={stage} onClick={stop}>
              Cancel replay
            </FleetingButton>
          )}
          {now.phase === "unusable" && (
            <FolderButton text="Choose another folder …" label="Choose another folder" />
          )}
          {!isWorking && (
            <FleetingButton heir={stage} class="quiet" onClick={close}>
              Close replay
            </FleetingButton>
          )}
        </span>
      </div>
      <SummaryLine now={now} />
    </div>
  );
}

function SummaryLine({ now }: { now: Replaying }) {
  if (now.phase === "unusable" || now.phase === "failed") {
    return (
      <p class="error" role="alert">
        {now.error}
      </p>
    );
  }
  const results = shownSamples.value.map(({ result }) => result);
  const summary = summaryOf(results, MIN_PSNR_DB);
  if (now.phase === "working") {
    const refused = results.filter(({ reason }) => reason !== null).length;
    const counted =
      results.length === 0 ? "" : `${summary.drawn} of ${results.length} samples drawn again so far`;
    return (
      <p class="status" role="status" data-state="running">
        {refused > 0 && counted ? `${counted}; ${refused} cannot be.` : counted && `${counted}.`}
      </p>
    );
  }
  const isGood = summary.drawn > 0 && summary.belowMinPsnr === 0;
  return (
    <>
      <p
        class="status"
        role="status"
        data-state={now.phase === "done" ? (isGood ? "succeeded" : "failed") : "cancelled"}
      >
        {now.phase === "stopped" ? `Stopped: ${countLine(summary)}` : countLine(summary)}
      </p>
      <p class="verdict">{verdictLine(summary)}</p>
    </>
  );
}

function ProgressLines() {
  const { line, done, total, drawing } = progress.value;
  return (
    <div class="progress">
      <progress aria-label="Samples drawn" {...(total > 0 ? { value: done, max: total } : {})} />
      {line !== "" && <p class="hint">{line}</p>}
      <ul class="drawing-now">
        {[...drawing].map(([key, text]) => {
          const [step, index] = key.split(" ").map(Number);
          return (
            <li key={key} class="hint">
              {nameOf({ step: step ?? 0, index: index ?? 0 })}: {text}
            </li>
          );
        })}
      </ul>
    </div>
  );
}

function ModelChoice({ models }: { models: readonly string[] }) {
  return (
    <label class="row tight">
      Draw with
      <select
        aria-label="Model to draw with"
        value=""
        onChange={(event) => void goOn({ model: event.currentTarget.value })}
      >
        <option value="">Choose a model …</option>
        {models.map((model) => (
          <option key={model} value={model}>
            {model}
          </option>
        ))}
      </select>
    </label>
  );
}

function Similarity() {
  const results = shownSamples.value.map(({ result }) => result);
  const points = curveOf(results);
  if (points.length === 0) return null;
  return <CurveView results={results} points={points} minPsnrDb={MIN_PSNR_DB} />;
}

function Resolved({ now: { run, server, assumptions, ignored } }: { now: Replaying }) {
  if (run === undefined) return null;
  const results = shownSamples.value.map(({ result }) => result);
  const drawn = results.find((result) => result.drawn !== undefined)?.drawn;
  const draws = [...new Set(results.filter((one) => one.drawn).map(({ noiseDraw }) => noiseDraw))].sort();
  const forms = [
    ...new Set(results.flatMap((one) => (one.drawn && one.lokrForm ? [one.lokrForm] : []))),
  ].sort();
  const { trainer } = run;
  const facts: readonly (readonly [string, string])[] = [
    ["Job", run.name],
    ["Base model", run.baseModel.split(/[/\\]/).at(-1) ?? ""],
    ["Network", run.networkType || "none: the whole model"],
    ["Transformer", trainer.quantize ? `quantized by ${trainer.qtype}` : "not quantized"],
    ["Text encoder", trainer.quantizeTe ? `quantized by ${trainer.qtype}` : "not quantized"],
    ["Type", trainer.dtype],
    ["Noise draw", draws.join(", ")],
    ["LoKr", forms.join(", ")],
    ["Drawn with", server ? `${server.model}, profile ${server.profile}, chromarpc ${server.version}` : ""],
    ["Device", drawn?.prepared?.device || server?.device || ""],
    ["Weights", drawn?.prepared?.modelRevision.slice(0, 16) ?? ""],
    ["Not replaced", run.unresolved.map((name) => `\${${name}}`).join(", ")],
  ];
  return (
    <details>
      <summary>
        What was resolved and assumed
        {ignored.length > 0 && `, and ${ignored.length} ${ignored.length === 1 ? "file" : "files"} left out`}
      </summary>
      <dl>
        {facts
          .filter(([, value]) => value !== "")
          .map(([name, value]) => (
            <>
              <dt key={name}>{name}</dt>
              <dd>{value}</dd>
            </>
          ))}
      </dl>
      <ul class="assumptions">
        {[...new Set(assumptions)].map((said) => (
          <li key={said}>{said}</li>
        ))}
        {ignored.slice(0, 50).map(({ name, reason }) => (
          <li key={name}>
            {name}: {reason}
          </li>
        ))}
        {ignored.length > 50 && <li>… and {ignored.length - 50} more</li>}
      </ul>
    </details>
  );
}

function Grid({ now: { samples } }: { now: Replaying }) {
  const steps = new Map<number, string[]>();
  for (const key of samples.keys()) {
    const step = Number(key.split(" ")[0]);
    steps.set(step, [...(steps.get(step) ?? []), key]);
  }
  return (
    <>
      {steps.size > 0 && <p class="hint">In each pair: the trainer's picture left, ours right.</p>}
      {[...steps].map(([step, keys]) => (
        <section key={step} class="replay-step" aria-label={`Step ${step}`}>
          <StepTitle step={step} />
          <ol>
            {keys.map((key) => (
              <Card key={key} sampleKey={key} />
            ))}
          </ol>
        </section>
      ))}
    </>
  );
}

function StepTitle({ step }: { step: number }) {
  const results = shownSamples.value.map(({ result }) => result).filter(({ row }) => row.file.step === step);
  const median = curveOf(results)[0]?.medianPsnrDb;
  return (
    <h3>
      Step {step}
      {median !== undefined && <span class="hint"> median {decibels(median)}</span>}
    </h3>
  );
}

function Card({ sampleKey }: { sampleKey: string }) {
  const shown = replaying.value?.samples.get(sampleKey)?.value;
  if (shown === undefined) return null;
  const { result, oursUrl } = shown;
  const { file } = result.row;
  const near = nearness(result);
  const isBelow = result.similarity !== undefined && result.similarity.psnrDb < MIN_PSNR_DB;
  return (
    <li class="pair-card" data-key={sampleKey}>
      {oursUrl ? (
        <button
          type="button"
          class="open"
          aria-label={`Open step ${file.step}, sample ${file.index}: ${near}`}
          onClick={() => {
            openedKey.value = keyOf(file);
          }}
        >
          <Thumbs shown={shown} />
        </button>
      ) : (
        <div class="open">
          <Thumbs shown={shown} />
        </div>
      )}
      <p class="caption-line">
        <span>Sample {file.index}</span>
        {near !== "" && <strong class={isBelow ? "error" : "near"}>{near}</strong>}
      </p>
      {result.reason !== null && <p class="reason">{result.reason}</p>}
    </li>
  );
}

function Thumbs({ shown: { result, theirsUrl, oursUrl } }: { shown: Shown }) {
  const { settings } = result.row;
  const ratio = { aspectRatio: settings ? `${settings.width} / ${settings.height}` : "1" };
  return (
    <span class="thumbs">
      <span class="thumb" style={ratio}>
        {theirsUrl ? (
          <img src={theirsUrl} alt="The trainer's" loading="lazy" decoding="async" />
        ) : (
          <span>—</span>
        )}
      </span>
      <span class="thumb" style={ratio}>
        {oursUrl ? (
          <img src={oursUrl} alt="Ours" loading="lazy" decoding="async" />
        ) : (
          <span class="hint">{result.reason === null ? "…" : "not drawn"}</span>
        )}
      </span>
    </span>
  );
}
