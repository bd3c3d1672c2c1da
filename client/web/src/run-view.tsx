/** One run: how far it is, its pictures as they sharpen, and what to do with them. */
import { signal } from "@preact/signals";
import { useEffect } from "preact/hooks";
import { CopyRequest } from "./copy-request.tsx";
import { whyAgain } from "./devices.ts";
import { FleetingButton, stage } from "./fleeting-button.tsx";
import { reuse } from "./form.ts";
import { cancel, forget, hasEnded, type Picture, type Run, redraw, warningsOf } from "./runs.ts";
import { bytes, duration } from "./words.ts";

const STAGES: Readonly<Record<string, string>> = {
  downloading: "Fetching files",
  reading: "Reading weights",
  merging: "Merging adapters",
  quantizing: "Quantizing weights",
  compiling: "Compiling kernels",
  unknown: "Getting ready",
};
/** Beats while something is waited for, so that the time that is left goes down between steps. */
const now = signal(Date.now());

export function RunView({ run }: { run: Run }) {
  const isActive = !hasEnded(run.state);
  useEffect(() => {
    if (!isActive) return;
    const timer = setInterval(() => {
      now.value = Date.now();
    }, 250);
    return () => clearInterval(timer);
  }, [isActive]);
  const warnings = warningsOf(run);
  return (
    <article class="run" aria-busy={isActive}>
      <Progress run={run} />
      <div class={run.pictures.length > 1 ? "pictures several" : "pictures"}>
        {run.pictures.map((picture, index) => (
          <PictureView key={index} run={run} picture={picture} index={index} />
        ))}
      </div>
      <div class="row tight actions">
        {run.plan && (
          <button
            type="button"
            onClick={() => run.plan && reuse(run.plan)}
            title="Puts them into the form, with the same seed"
          >
            Use these settings
          </button>
        )}
        {run.plan && <CopyRequest plan={run.plan} />}
        {run.isDamaged && (
          <FleetingButton heir={stage} onClick={() => void redraw(run.jobId)}>
            Draw again
          </FleetingButton>
        )}
        {!isActive && (
          <FleetingButton heir={stage} class="danger last" onClick={() => forget(run.jobId)}>
            Delete
          </FleetingButton>
        )}
      </div>
      {warnings.length > 0 && (
        <ul class="warnings" aria-label="Warnings">
          {warnings.map(({ code, field, message }) => (
            <li key={`${code}${field}`} class="warning">
              {message}
            </li>
          ))}
        </ul>
      )}
      <Facts run={run} />
    </article>
  );
}

function Progress({ run }: { run: Run }) {
  const again = run.restarted && whyAgain(run.restarted, hasEnded(run.state));
  return (
    <div class="progress">
      {/* Nothing else ever stands where Cancel stood. */}
      <div class="head">
        <p class="status" role="status" data-state={run.state}>
          {statusOf(run)}
        </p>
        {!hasEnded(run.state) && (
          <FleetingButton
            heir={stage}
            class="danger"
            aria-disabled={run.isCancelling}
            onClick={() => void (run.isCancelling || cancel(run.jobId))}
          >
            Cancel
          </FleetingButton>
        )}
      </div>
      <progress aria-label="Progress" max={1} {...barOf(run)} />
      {again && <p class="warning">{again}</p>}
      {run.reconnects > 0 && <p class="warning">The connection is lost; the job goes on. Trying again …</p>}
      {run.error && (
        <p class="error" role="alert">
          {run.error}
        </p>
      )}
    </div>
  );
}

/** What the bar shows: the loading stage, or the steps; it runs to and fro while nothing is known. */
function barOf(run: Run): { value?: number } {
  if (run.loading && !hasEnded(run.state)) return { value: run.loading.fraction };
  if (run.state === "succeeded") return { value: 1 };
  if (hasEnded(run.state) || run.doneSteps > 0) return { value: run.doneSteps / (run.totalSteps || 1) };
  return {};
}

function statusOf(run: Run): string {
  switch (run.state) {
    case "succeeded":
      return run.durationMs === undefined ? "Done" : `Done in ${duration(run.durationMs)}`;
    case "failed":
      return "Failed";
    case "cancelled":
      return `Cancelled after ${run.doneSteps} of ${run.totalSteps} steps`;
  }
  if (run.isCancelling) return "Cancelling …";
  if (run.loading)
    return `${STAGES[run.loading.stage] ?? STAGES.unknown} … ${Math.round(run.loading.fraction * 100)} %`;
  if (run.queuePosition > 0) {
    const wait = run.estimatedWaitMs ? `, about ${duration(run.estimatedWaitMs)}` : "";
    return run.queuePosition === 1
      ? `Next in the queue${wait}`
      : `Number ${run.queuePosition} in the queue${wait}`;
  }
  if (run.doneSteps === 0) return "Starting …";
  const left = run.endsAt === undefined ? "" : ` · ${duration(run.endsAt - now.value)} left`;
  return `Step ${run.doneSteps} of ${run.totalSteps}${left}`;
}

function PictureView({ run, picture, index }: { run: Run; picture: Picture; index: number }) {
  const planned = run.plan?.prompts[index];
  const name = `chromarpc-${run.jobId.slice(0, 8)}-${index}.${picture.image?.extension ?? "png"}`;
  const url = picture.imageUrl ?? picture.previewUrl;
  return (
    <figure>
      <div class={url ? "frame" : "frame empty"} style={ratioOf(run, index)}>
        {url ? (
          <img
            src={url}
            class={picture.imageUrl ? "final" : "preview"}
            data-step={picture.previewStep}
            alt={
              picture.imageUrl
                ? (planned?.prompt ?? "")
                : `${planned?.prompt}, unfinished, step ${picture.previewStep}`
            }
          />
        ) : (
          <span class="hint">
            {hasEnded(run.state) ? (run.isWhole ? "No picture" : "Fetching the picture …") : "…"}
          </span>
        )}
        {!picture.imageUrl && picture.step > 0 && !hasEnded(run.state) && (
          <span class="badge">
            {picture.step} / {picture.totalSteps}
          </span>
        )}
      </div>
      <figcaption>
        <span class="prompt">{planned?.prompt || "(empty prompt)"}</span>
        <span class="hint">
          {planned && `${planned.width} × ${planned.height} · seed ${planned.seed}`}
          {picture.image && ` · ${bytes(picture.image.data.length)}`}
        </span>
        {picture.imageUrl && (
          <a
            class="button"
            href={picture.imageUrl}
            download={name}
            aria-label={run.pictures.length > 1 ? `Download picture ${index + 1}` : "Download"}
          >
            Download
          </a>
        )}
      </figcaption>
    </figure>
  );
}

/** The shape of one of a run's pictures, as its frame's style. */
export function ratioOf(run: Run, index: number) {
  const planned = run.plan?.prompts[index];
  if (planned === undefined) return {};
  return { aspectRatio: `${planned.width} / ${planned.height}`, "--ratio": planned.width / planned.height };
}

function Facts({ run }: { run: Run }) {
  const { plan, prepared, completed } = run;
  const [first] = plan?.prompts ?? [];
  if (plan === undefined || first === undefined) return null;
  return (
    <details class="facts">
      <summary>
        {plan.servedModel} · {first.sampleSteps} steps · guidance {first.guidanceScale}
        {plan.loras.map(({ path, networkMultiplier }) => ` · ${shortName(path)} × ${networkMultiplier}`)}
      </summary>
      <dl>
        <dt>Job</dt>
        <dd class="hash">{run.jobId}</dd>
        <dt>Profile</dt>
        <dd>
          {plan.profile}
          {plan.settings !== "reference" && `, as ${plan.settings}`}
        </dd>
        <dt>Sampler</dt>
        <dd>
          {first.sampler}, schedule {first.schedule}
          {first.shift !== undefined && `, shift ${first.shift}`}
        </dd>
        {prepared && (
          <>
            <dt>Device</dt>
            <dd>
              {prepared.device}
              {prepared.secondDevice && `, guidance on two: ${prepared.deviceId}`}
            </dd>
            <dt>Weights</dt>
            <dd>
              {prepared.weights.source}, in {duration(prepared.weights.durationMs)}
              {prepared.storedAs && `, stored as ${prepared.storedAs}`}
            </dd>
            {prepared.adapters.map((adapter) => (
              <>
                <dt>{shortName(adapter.path)}</dt>
                <dd>
                  {adapter.format}, rank {adapter.rank}, {adapter.matchedKeyCount} keys
                  {adapter.placement === "beside" && ", beside the weights"}
                </dd>
              </>
            ))}
          </>
        )}
        {completed && (
          <>
            <dt>Time</dt>
            <dd>
              waiting {duration(completed.timings.queuedMs)}, loading {duration(completed.timings.loadingMs)},
              drawing {duration(completed.timings.denoisingMs)}, decoding{" "}
              {duration(completed.timings.decodingMs)}
            </dd>
            <dt>Memory</dt>
            <dd>{bytes(completed.peakMemoryBytes)}</dd>
          </>
        )}
      </dl>
    </details>
  );
}

/** An adapter's name without its folders; a hash cut short. */
export function shortName(path: string): string {
  return path.startsWith("sha256:") ? path.slice(0, 15) : (path.split("/").at(-1) ?? path);
}
