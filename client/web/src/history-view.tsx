/** Earlier runs. */
import { useEffect, useRef } from "preact/hooks";
import { client, serverState } from "./connection.ts";
import { FleetingButton, stage } from "./fleeting-button.tsx";
import { history, isHistoryKnown } from "./history.ts";
import { comparedIds, hasEnded, type Run, selectedId } from "./runs.ts";
import { thumbnails } from "./thumbnails.ts";

export function HistoryView() {
  const items = history.value;
  const compared = comparedIds.value;
  return (
    <nav class="history" aria-label="Earlier runs">
      <div class="label">
        <h2>Runs</h2>
        {compared.length === 1 && (
          <span class="hint" role="status">
            Choose a second run to compare with.{" "}
            <FleetingButton
              heir={stage}
              class="quiet"
              onClick={() => {
                comparedIds.value = [];
              }}
            >
              Never mind
            </FleetingButton>
          </span>
        )}
      </div>
      {items.length === 0 && <p class="hint">{isHistoryKnown.value ? "Nothing was drawn yet." : "…"}</p>}
      <ol>
        {items.map((run) => (
          <Item key={run.jobId} run={run} />
        ))}
      </ol>
    </nav>
  );
}

function Item({ run }: { run: Run }) {
  const element = useRef<HTMLLIElement>(null);
  const compared = comparedIds.value;
  const isCompared = compared.includes(run.jobId);
  const isSelected = compared.length < 2 && selectedId.value === run.jobId;
  const thumbnail =
    run.pictures[0]?.imageUrl ?? run.pictures[0]?.previewUrl ?? thumbnails.value.get(run.jobId);
  const isDone = run.state === "succeeded";

  // A picture is fetched when its place comes into sight.
  useEffect(() => {
    if (!isDone || thumbnail !== undefined || element.current === null || serverState.value !== "up") return;
    const observer = new IntersectionObserver((entries) => {
      if (!entries.some(({ isIntersecting }) => isIntersecting)) return;
      observer.disconnect();
      void thumbnails.fetch(client, run.jobId);
    });
    observer.observe(element.current);
    return () => observer.disconnect();
  }, [isDone, thumbnail, run.jobId, serverState.value]);

  function choose(): void {
    if (compared.length === 1 && !isCompared && isDone) {
      comparedIds.value = [...compared, run.jobId];
      return;
    }
    comparedIds.value = [];
    selectedId.value = run.jobId;
  }

  const prompt = run.plan?.prompts[0]?.prompt ?? "";
  return (
    <li ref={element} class={isSelected || isCompared ? "item selected" : "item"}>
      <button type="button" class="open" aria-current={isSelected} title={prompt} onClick={choose}>
        <span class="thumb">
          {thumbnail ? <img src={thumbnail} alt="" /> : <span class="hint">{wordOf(run)}</span>}
        </span>
        <span class="caption">{prompt || "(empty prompt)"}</span>
        {!hasEnded(run.state) && (
          <progress value={run.doneSteps} max={run.totalSteps || 1} aria-label="Progress" />
        )}
        {(run.state === "failed" || run.state === "cancelled") && <span class="hint">{run.state}</span>}
      </button>
      {isDone && (
        <button
          type="button"
          class="quiet compare"
          aria-pressed={isCompared}
          aria-label={`Compare: ${prompt || "(empty prompt)"}`}
          onClick={() => {
            comparedIds.value = isCompared
              ? compared.filter((id) => id !== run.jobId)
              : [...compared.slice(-1), run.jobId];
          }}
        >
          {isCompared ? "✓ Compare" : "Compare"}
        </button>
      )}
    </li>
  );
}

function wordOf(run: Run): string {
  switch (run.state) {
    case "queued":
      return run.queuePosition > 0 ? `#${run.queuePosition}` : "queued";
    case "running":
      return "drawing";
    case "succeeded":
      return "…";
    default:
      return "—";
  }
}
