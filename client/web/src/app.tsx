/** The page's frame: the form at the left, what comes of it at the right, earlier runs below. */
import { useEffect, useRef } from "preact/hooks";
import { CompareView } from "./compare-view.tsx";
import { isTokenWanted, retry, serverInfo, serverState, token } from "./connection.ts";
import { deviceLine, devicesOf } from "./devices.ts";
import { DropView } from "./drop-view.tsx";
import { FormView } from "./form-view.tsx";
import { HistoryView } from "./history-view.tsx";
import { InspectionDialog } from "./inspection-dialog.tsx";
import { PictureButton } from "./pictures/picture-button.tsx";
import { PictureView } from "./pictures/picture-view.tsx";
import { explained, failure } from "./pictures/state.ts";
import { ReplayButton, ReplayView } from "./replay/replay-view.tsx";
import { replaying } from "./replay/replaying.ts";
import { RunView } from "./run-view.tsx";
import { comparedIds, runs, selectedId, submissions } from "./runs.ts";
import { UndoView } from "./undo-view.tsx";

export function App() {
  const run = runs.value.get(selectedId.value);
  const isExplaining = explained.value !== undefined || failure.value !== undefined;
  const isComparing = comparedIds.value.length === 2;
  const stage = useRef<HTMLElement>(null);
  const asked = submissions.value;
  // On a narrow screen the result stands below the form.
  useEffect(() => {
    const isNarrow = matchMedia("(width <= 50em)").matches;
    const isCalm = matchMedia("(prefers-reduced-motion: reduce)").matches;
    if (asked > 0 && isNarrow) stage.current?.scrollIntoView({ behavior: isCalm ? "auto" : "smooth" });
  }, [asked]);
  return (
    <div class="app">
      <header>
        <h1>
          <img src="./icon.svg" alt="" width="24" height="24" /> chromarpc
        </h1>
        <div class="ways-in">
          <PictureButton />
          <ReplayButton />
        </div>
        <ServerLine />
      </header>
      {serverState.value === "down" && (
        <div class="banner" role="alert">
          <span>The server cannot be reached: it is starting, or down. Trying again …</span>
          <button type="button" onClick={() => retry()}>
            Try now
          </button>
        </div>
      )}
      {isTokenWanted.value && <TokenForm />}
      <main>
        <FormView />
        <section ref={stage} class="stage" aria-label="Result" tabIndex={-1}>
          <UndoView />
          <ReplayView />
          {isComparing ? <CompareView /> : run && <RunView key={run.jobId} run={run} />}
          {!isComparing && !run && !replaying.value && !isExplaining && <Welcome />}
          <PictureView />
          <HistoryView />
        </section>
      </main>
      <InspectionDialog />
      <DropView />
    </div>
  );
}

function ServerLine() {
  const info = serverInfo.value;
  if (serverState.value !== "up" || info === undefined) return <p class="server-line">…</p>;
  const waiting = info.queue?.queuedJobs ?? 0;
  return (
    <p class="server-line">
      <span class="dot" aria-hidden="true" />
      <span title={info.devices.map(deviceLine).join("\n")}> {devicesOf(info)}</span> · chromarpc{" "}
      {info.version}
      {waiting > 0 && ` · ${waiting} waiting`}
    </p>
  );
}

function TokenForm() {
  return (
    <form
      class="banner"
      onSubmit={(event) => {
        event.preventDefault();
        token.value = String(new FormData(event.currentTarget).get("token") ?? "").trim();
        isTokenWanted.value = false;
        retry();
      }}
    >
      <label>
        {token.value
          ? "The server does not take this token (any more). Another one:"
          : "The server wants a token:"}
        <input name="token" type="password" autocomplete="off" required />
      </label>
      <button type="submit">Use it</button>
    </form>
  );
}

function Welcome() {
  return (
    <div class="welcome">
      <p>Write what to draw and press “Draw”. The picture comes into being here, step by step.</p>
      <p class="hint">
        To see what a picture was drawn with, drop it anywhere on this page. To redraw the samples of a
        training run, drop the folder that ai-toolkit left. Files stay in this browser, but for adapters that
        the server does not have.
      </p>
    </div>
  );
}
