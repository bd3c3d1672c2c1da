/** The jobs that the server remembers, newest first. */
import { computed, signal } from "@preact/signals";
import { ServerUnavailable } from "chromarpc/web";
import { client, isTokenWanted, noteFailure, serverState } from "./connection.ts";
import { hasEnded, noteJob, runs, selectedId } from "./runs.ts";
import { isHidden } from "./undo.ts";

const ACTIVE_MS = 1500;
const IDLE_MS = 6000;
const LENGTH = 60;

/** Newest first. */
export const history = computed(() =>
  [...runs.value.values()]
    .filter(({ jobId }) => !isHidden(jobId))
    .sort((a, b) => b.createTime.getTime() - a.createTime.getTime()),
);
/** Whether the server was asked for its jobs at least once. */
export const isHistoryKnown = signal(false);

/** Asks for the list now and then, more often while something runs; never from a hidden tab. */
export function followHistory(): void {
  async function look(): Promise<void> {
    let isActive = false;
    if (!document.hidden && !isTokenWanted.value && serverState.value !== "down") {
      try {
        const jobs = await client.listJobs({ limit: LENGTH });
        for (const job of jobs) noteJob(job);
        const known = new Set(jobs.map(({ jobId }) => jobId));
        const isListWhole = jobs.length < LENGTH;
        // What the server forgot goes, unless it is being looked at.
        const kept = [...runs.value].filter(
          ([id]) => known.has(id) || !isListWhole || id === selectedId.value,
        );
        if (kept.length < runs.value.size) runs.value = new Map(kept);
        isActive = jobs.some(({ state }) => !hasEnded(state));
        isHistoryKnown.value = true;
      } catch (error) {
        if (!(error instanceof ServerUnavailable)) noteFailure(error);
      }
    }
    setTimeout(() => void look(), isActive ? ACTIVE_MS : IDLE_MS);
  }
  void look();
}
