/** A picture from anywhere: what it was drawn with, into the form with it, or beside another. */
import { useEffect, useRef, useState } from "preact/hooks";
import { FleetingButton, stage } from "../fleeting-button.tsx";
import { drawnOf, latestKey, shownSamples } from "../replay/replaying.ts";
import { runs, selectedId, submissions } from "../runs.ts";
import { ComparisonView } from "./comparison-view.tsx";
import { getFact, isOurs, namesOf, type PictureFacts, shown } from "./facts.ts";
import { jsonText } from "./json.ts";
import { isWhole } from "./pixels.ts";
import { urlsIn } from "./settings.ts";
import {
  close,
  compareWith,
  compareWithPrevious,
  compareWithRun,
  comparison,
  explained,
  failure,
  openings,
  previous,
  type ShownPicture,
  takeSettings,
  untaken,
} from "./state.ts";
import { printable } from "./texts.ts";

/** As the trainer names its samples: time, step, number. */
const SAMPLE = /^\d+__\d+_\d+\.(jpe?g|png|webp)$/i;

export function PictureView() {
  const element = useRef<HTMLElement>(null);
  const asked = openings.value;
  const one = explained.value;
  useEffect(() => {
    if (asked === 0 || element.current === null) return;
    element.current.focus({ preventScroll: true });
    element.current.scrollIntoView({ block: "start" });
  }, [asked]);
  // What is drawn then stands above.
  useEffect(() => {
    if (submissions.value > 0 && element.current !== null) stage()?.scrollIntoView();
  }, [submissions.value]);
  if (one === undefined && failure.value === undefined) return null;
  return (
    <article ref={element} class="run explained" aria-label="Explained picture" tabIndex={-1}>
      <div class="head">
        <h2>{one ? headOf(one) : "Nothing was opened"}</h2>
        <FleetingButton heir={stage} aria-label="Close the picture" onClick={close}>
          Close
        </FleetingButton>
      </div>
      {failure.value !== undefined && (
        <p class="error" role="alert">
          {printable(failure.value)}
        </p>
      )}
      {one !== undefined && <Explanation key={asked} one={one} />}
    </article>
  );
}

function headOf({ picture }: ShownPicture): string {
  const { kind, widthPx, heightPx } = picture.file;
  const { program } = picture.facts;
  const drawnBy = program ? `drawn by ${program}` : "nobody says by what it was drawn";
  return printable(`${picture.name}: ${kind}, ${widthPx}×${heightPx}, ${drawnBy}`);
}

function Explanation({ one }: { one: ShownPicture }) {
  const { facts } = one.picture;
  const isComparing = comparison.value !== undefined;
  return (
    <>
      {!isComparing && <Thumbnail one={one} />}
      <Actions one={one} />
      {isComparing && <ComparisonView />}
      <Remarks one={one} />
      {facts.program !== "" && (
        <>
          <details open={!isComparing}>
            <summary>What it was drawn with</summary>
            <FactList facts={facts} />
          </details>
          {facts.request !== undefined && (
            <details>
              <summary>
                {isOurs(facts)
                  ? "The request that draws it again"
                  : "A request for the same here, as far as it is known"}
              </summary>
              <pre>{jsonText(facts.request)}</pre>
            </details>
          )}
        </>
      )}
    </>
  );
}

function Thumbnail({ one }: { one: ShownPicture }) {
  const [isBroken, setBroken] = useState(false);
  // An image whose head alone is whole loads without an error.
  useEffect(() => void isWhole(one.picture).then((whole) => setBroken(!whole)), [one]);
  if (one.url === undefined) return <p class="hint">It has too many pixels to be shown.</p>;
  if (isBroken) return <p class="warning">Its pixels cannot be shown: they are broken.</p>;
  return <img class="dropped" src={one.url} alt={printable(one.picture.name)} />;
}

function Actions({ one }: { one: ShownPicture }) {
  const [isAsking, setAsking] = useState(false);
  const run = runs.value.get(selectedId.value);
  const [index, setIndex] = useState(0);
  const drawn = (run?.pictures ?? []).flatMap(({ image }, number) => (image === undefined ? [] : [number]));
  const chosen = drawn.includes(index) ? index : drawn[0];
  const sample = drawnOf(latestKey.value);
  const hasSamples = shownSamples.value.some(({ result }) => result.drawn !== undefined);
  const { request } = one.picture.facts;
  const urls = request === undefined ? [] : urlsIn(request);
  const take = (withUrls: boolean): void => {
    setAsking(false);
    takeSettings(one, withUrls);
  };
  return (
    <>
      <div class="row tight">
        {request !== undefined && (
          <button type="button" data-once onClick={() => (urls.length > 0 ? setAsking(true) : take(false))}>
            Take its settings
          </button>
        )}
        {run !== undefined && chosen !== undefined && (
          <button type="button" onClick={() => void compareWithRun(run, chosen)}>
            Compare with the run shown
          </button>
        )}
        {drawn.length > 1 && (
          <label class="check">
            Its picture
            <select value={chosen} onChange={(event) => setIndex(Number(event.currentTarget.value))}>
              {drawn.map((number) => (
                <option key={number} value={number}>
                  {number + 1}
                </option>
              ))}
            </select>
          </label>
        )}
        {sample !== undefined && (
          <button type="button" onClick={() => void compareWith(sample)}>
            Compare with {sample.name}
          </button>
        )}
        {previous.value !== undefined && (
          <button type="button" onClick={compareWithPrevious}>
            Compare with {printable(previous.value.picture.name)}
          </button>
        )}
      </div>
      {sample === undefined && hasSamples && (
        <p class="hint">To compare it with a sample of the training run above, open that sample.</p>
      )}
      {isAsking && <UrlQuestion urls={urls} take={take} />}
    </>
  );
}

/** Nothing is fetched from an address that somebody did not see. */
function UrlQuestion({ urls, take }: { urls: readonly string[]; take: (withUrls: boolean) => void }) {
  const question = useRef<HTMLElement>(null);
  useEffect(() => question.current?.focus(), []);
  return (
    <section ref={question} class="question" aria-labelledby="fetch-question" tabIndex={-1}>
      <p id="fetch-question">The picture has the server fetch, once you draw:</p>
      <ul>
        {urls.map((url) => (
          <li key={url} class="hash">
            {printable(url)}
          </li>
        ))}
      </ul>
      <div class="row tight">
        <FleetingButton heir={stage} onClick={() => take(false)}>
          Take the rest only
        </FleetingButton>
        <FleetingButton heir={stage} onClick={() => take(true)}>
          Take these adapters too
        </FleetingButton>
      </div>
    </section>
  );
}

function Remarks({ one }: { one: ShownPicture }) {
  const { facts, name } = one.picture;
  const left = untaken.value;
  return (
    <>
      <div role="status">
        {left !== undefined && (
          <>
            <p>
              {left.length === 0
                ? "The form has all of its settings."
                : "The form has its settings, but for:"}
            </p>
            <Sentences label="What the form could not take" sentences={left} />
          </>
        )}
      </div>
      <Sentences label="Notes" sentences={facts.remarks} />
      {facts.program === "" && (
        <p class="hint">
          {SAMPLE.test(name)
            ? "It is named like a sample that a trainer drew while it trained. Samples carry no record; their "
            : "If a trainer drew it while it trained: samples carry no record, their "}
          run’s folder tells. “Redraw a training run” reads it.
        </p>
      )}
    </>
  );
}

function Sentences({ label, sentences }: { label: string; sentences: readonly string[] }) {
  if (sentences.length === 0) return null;
  return (
    <ul class="warnings" aria-label={label}>
      {sentences.map((sentence) => (
        <li key={sentence} class="warning">
          {printable(sentence)}
        </li>
      ))}
    </ul>
  );
}

function FactList({ facts }: { facts: PictureFacts }) {
  return (
    <dl>
      {namesOf(facts).map((name) => {
        const found = getFact(facts, name);
        if (found === undefined) return null;
        return (
          <>
            <dt>{printable(name)}</dt>
            <dd class={found.value === undefined ? "unknown" : ""}>
              {printable(shown(found))} {found.note && <span class="hint">({printable(found.note)})</span>}
            </dd>
          </>
        );
      })}
    </dl>
  );
}
